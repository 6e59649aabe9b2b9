"""The model card: what a merge is, in Markdown, headed by the metadata that model hubs read."""

from __future__ import annotations

import html
import json
import re
from statistics import mean

from samerge_ext.reports.report import Report, as_yaml


def model_card(report: Report, loading: str, library: str | None = None) -> str:
    """Equal for equal merges, wherever they are written. loading: the code that loads the model. library: what loads it, where
    that is known.
    """
    rows = [[of["name"], of["role"], of["hub"] or of["path"].rstrip("/").rpartition("/")[2]] for of in report.models]
    coefficients = [
        [task, *(f"{value:.3f}" for value in (mean(row.values()), min(row.values()), max(row.values())))]
        for task, row in report.coefficients.items()
        if row
    ]
    experts = len(report.experts)
    steps = f", in {len(report.history)} steps" if report.history else ""
    sections = [
        _metadata(report, library),
        "# Merged model",
        f"{experts} models merged by `{report.method}` of samerge_ext {report.versions['samerge_ext']}{steps}.",
        _table(["model", "part", "from"], rows) if rows else "",
        f"## Load it\n\n{_fenced(loading, 'python')}",
        f"## Coefficients\n\n{_table(['task', 'mean λ', 'min λ', 'max λ'], coefficients)}" if coefficients else "",
        f"## Recipe\n\n{_fenced(as_yaml(report.recipe), 'yaml')}" if report.recipe else "",
        f"## Settings\n\n{_fenced(json.dumps(report.config, indent=2, ensure_ascii=False), 'json')}" if report.config else "",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _metadata(report: Report, library: str | None) -> str:
    """The hub links a model to those that it was made of; it refuses names that it does not know, as those of folders."""
    known = list(dict.fromkeys(of["hub"] for of in report.models if of["hub"]))
    lines = ["---"]
    if known:
        lines += ["base_model:", *(f"- {name}" for name in known), "base_model_relation: merge"]
    else:
        lines += ["# base_model: a list of the hub's names of the models, which are not known here"]
    lines += [f"library_name: {library}"] if library else []
    return "\n".join([*lines, "tags:", "- merge", "- samerge_ext", "---"])


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *([_cell(text) for text in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(text: str) -> str:
    """A text that stays in its cell, and is read as it is."""
    escaped = re.sub(r"([\\`*_\[\]|])", r"\\\1", " ".join(text.split()))
    return html.escape(escaped, quote=False)


def _fenced(text: str, language: str) -> str:
    """A block whose fence is longer than any inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
