"""The files of a report: made with a merged model's folder, and again in one that is there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.reading import read_json
from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.reports.card import model_card
from samerge_ext.reports.loading import loading_code
from samerge_ext.reports.page import page
from samerge_ext.reports.report import PAGE_FILE, REPORT_FILE, Report, understood

CARD = "README.md"


def report_files(
    report: Report, name: str, configuration: Mapping[str, Any] | None, *, card: str | None = None, with_page: bool = True
) -> dict[str, str]:
    """file -> its content: the model card, and with_page report.json and report.html.

    name: of the merged model's folder. configuration: its config.json. card: in place of the report's own.
    """
    library = "transformers" if configuration and "model_type" in configuration else None
    files = {CARD: card or model_card(report, loading_code("merged", configuration, report.heads), library)}
    if with_page:
        files[REPORT_FILE] = report.to_json()
        files[PAGE_FILE] = page(report, name, loading_code(name, configuration, report.heads))
    return files


def rewrite(folder: str | Path, report: Report) -> Path:
    """Writes a report's files into the folder of the merged model, without its card where there is one; returns the page."""
    folder = Path(folder)
    configuration = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
    with understood(folder):
        files = report_files(report, folder.resolve().name, configuration)
    for file, content in files.items():
        if file != CARD or not (folder / CARD).exists():
            with atomic_write(folder / file, "w") as out:
                out.write(content)
    return folder / PAGE_FILE
