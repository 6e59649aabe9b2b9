"""A report as a page: one HTML file that loads nothing and runs nothing, in the colours that the reader's system asks for."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from statistics import fmean
from typing import TYPE_CHECKING, Any

from samerge_ext.reports.chart import chart
from samerge_ext.reports.heat_map import heat_map
from samerge_ext.reports.report import Report, as_yaml
from samerge_ext.sizes import show_bytes

if TYPE_CHECKING:  # imported when a page is made
    from jinja2 import Environment

RUN = {  # of Report.run, in words
    "seconds": "seconds",
    "device": "device",
    "planned_bytes": "peak memory, planned",
    "gpu_peak_bytes": "peak memory of the GPU, measured",
    "peak_bytes": "peak memory of the process, measured",
}


def page(report: Report, title: str, loading: str) -> str:
    """The HTML. loading: the code that loads the merged model."""
    similar = report.similarity
    return rendered(
        "report.html",
        report=report,
        title=title,
        loading=loading,
        models=[[of["name"], of["role"], of["hub"] or of["path"], _bytes_of(of)] for of in report.models],
        files=[[f"{of['name']}: {f['file']}", f["bytes"], f["fingerprint"]] for of in report.models for f in of["files"]],
        coefficients=heat_map("Coefficients by task and layer", report.coefficients) if report.layers else None,
        ranges=[[t, *map(_number, (fmean(r.values()), min(r.values()), max(r.values())))] for t, r in _rows(report).items()],
        charts=learning_charts(report),
        slice=slice_chart({"": report}),
        cosines=_matrix(similar, "cosines", ".3f"),
        conflicts=_matrix(similar, "conflicts", ".1%"),
        similarity=heat_map("Mean cosine and share of sign conflicts by layer", similar["layers"]) if similar else None,
        norms=heat_map(f"Norms of the {similar['of']} by layer", similar["norms"]) if similar else None,
        scores=score_rows(report),
        recipe=as_yaml(report.recipe),
        settings=[[key, json.dumps(value, ensure_ascii=False)] for key, value in report.config.items()],
        run=run_rows(report),
    )


def learning_charts(report: Report) -> list[Any]:
    """Loss, each task's loss and the gradient norm over the steps."""
    history = report.history

    def measured(key: str) -> list[tuple[float, float]]:
        return [(each["step"], each[key]) for each in history if key in each]

    losses = {"of the step": measured("loss"), "of what is held back": measured("held_back_loss")}
    of_tasks = history[0].get("losses", {}) if history else {}
    tasks = {task: [(each["step"], each["losses"][task]) for each in history] for task in of_tasks}
    drawn = {"Loss": losses, "Loss of each task": tasks, "Norm of the gradient": {"norm": measured("gradient_norm")}}
    known = {title: {name: points for name, points in curves.items() if points} for title, curves in drawn.items()}
    return [chart(title, curves) for title, curves in known.items() if curves]


def slice_chart(reports: Mapping[str, Report]) -> Any:
    """The losses around λ of every report, by name; None where none has them."""
    curves = {
        name or "loss": list(zip(report.loss_slice["distances"], report.loss_slice["losses"], strict=True))
        for name, report in reports.items()
        if report.loss_slice
    }
    return chart("Loss around λ", curves, "distance from λ along the gradient") if curves else None


def run_rows(report: Report) -> list[list[str]]:
    """What differs between equal runs, in words."""
    shown = {key: show_bytes(value) if key.endswith("_bytes") else str(value) for key, value in report.run.items() if value}
    if "seconds" in shown:
        shown["seconds"] = f"{report.run['seconds']:.1f}"
    return [[words, shown[key]] for key, words in RUN.items() if key in shown]


def score_rows(report: Report) -> list[list[str]]:
    """task, score and number of texts or pictures, for every file that the merged model was evaluated on."""
    return [[task, _score(found), str(found.get("texts", found.get("pictures")))] for task, found in report.scores.items()]


def _score(found: Mapping[str, Any]) -> str:
    if "accuracy" in found:
        return f"accuracy {found['accuracy']:.2%}"
    return f"perplexity {found['perplexity']:.4f} of {found['tokens']} tokens"


def _rows(report: Report) -> dict[str, dict[str, float]]:
    return report.coefficients if report.layers else {}


def _bytes_of(model: dict) -> str:
    return show_bytes(sum(file["bytes"] for file in model["files"])) if model["files"] else "–"


def _matrix(similarity: dict, key: str, form: str) -> list[list[str]]:
    if not similarity:
        return []
    return [
        [name, *(format(value, form) if i != j else "–" for j, value in enumerate(row))]
        for i, (name, row) in enumerate(zip(similarity["models"], similarity[key], strict=True))
    ]


def _number(value: float) -> str:
    return f"{value:.3g}"


def rendered(template: str, **values: Any) -> str:
    """The HTML of a file in templates/."""
    return _environment().get_template(template).render(**values)


@functools.cache
def _environment() -> Environment:
    """Names of tasks and layers may hold anything: what is put into a page is escaped, and what a template lacks is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("samerge_ext.reports", "templates"), autoescape=True, undefined=StrictUndefined
    )
    environment.filters["number"] = _number
    return environment
