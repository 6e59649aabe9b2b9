"""Tables, the plot and the model card of the demo."""

import json
from io import StringIO

import pytest
from rich.console import Console

from samerge_ext.demo import report
from samerge_ext.demo.report import Cell

CELLS = [
    Cell("average", 0, {"r8": 0.5, "icd": 0.3}, seconds=1.0, peak_bytes=2**20),
    Cell("average", 1, {"r8": 0.7, "icd": 0.3}, seconds=3.0, peak_bytes=3 * 2**20),
    Cell("experts", 0, {"r8": 0.9, "icd": 0.8}),
]


def test_rows_are_means_and_sample_deviations_over_seeds():
    header, (average, experts) = report.table_rows(CELLS)
    assert header == ["method", "r8", "icd", "mean", "seconds", "peak MiB"]
    assert average == ["average", "60.0 ± 14.1", "30.0 ± 0.0", "45.0 ± 7.1", "2.0 ± 1.4", "3"]
    assert experts == ["experts", "90.0", "80.0", "85.0", "–", "–"]


def test_the_gap_that_is_closed_is_told_where_both_its_ends_are_known():
    ends = [Cell(report.FLOOR, seed, {"r8": 0.5, "icd": 0.3}) for seed in (0, 1)]
    ends += [Cell(report.CEILING, 0, {"r8": 0.9, "icd": 0.7}), Cell(report.CEILING, 1, {"r8": 0.7, "icd": 0.5})]
    between = [Cell("WUDI", seed, {"r8": 0.6, "icd": 0.4}) for seed in (0, 1)]
    header, rows = report.table_rows([*ends, *between])
    assert [row[header.index("gap closed")] for row in rows] == ["0.0 ± 0.0", "100.0 ± 0.0", "37.5 ± 17.7"]
    assert "gap closed" not in report.table_rows([*ends[:2], *between])[0]
    header, rows = report.table_rows([*ends[:3], *between])  # one seed has no experts
    assert [row[header.index("gap closed")] for row in rows] == ["0.0", "100.0", "25.0"]


def test_both_tables_hold_every_row_uncut_in_a_narrow_terminal():
    console = Console(width=40, file=StringIO())
    console.print(report.accuracy_table(CELLS), crop=False)
    for table in (console.file.getvalue(), report.markdown_table(CELLS)):
        assert "60.0 ± 14.1" in table and "experts" in table
    assert report.markdown_table(CELLS).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: | ---: |"


def test_a_cell_without_a_task_is_named():
    with pytest.raises(ValueError, match="TIES, seed 2"):
        report.table_rows([*CELLS, Cell("TIES", 2, {"r8": 0.5})])


def test_a_repeated_cell_is_named():
    with pytest.raises(ValueError, match="two results of average for seed 0"):
        report.table_rows([*CELLS, CELLS[0]])


def test_the_plot_is_a_png_file_and_nothing_else_is_left(tmp_path):
    report.plot_accuracies(CELLS, tmp_path / "accuracies.png")
    (path,) = tmp_path.iterdir()
    assert path.name == "accuracies.png" and path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_card_says_what_was_merged_how_and_how_well(tmp_path):
    config = {"rho": 0.07, "sam": "paper"}
    report.write_card(
        tmp_path / "README.md",
        base="all-MiniLM-L6-v2",
        method="SAMerging",
        config=config,
        descriptions={"r8": ["earnings", "trade"], "icd": ["eye", "ear"]},
        cells=CELLS,
        images=["accuracies.png"],
    )
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card.startswith("---\nbase_model: all-MiniLM-L6-v2\n")
    assert "- **r8**, 2 classes: earnings; trade" in card
    assert report.markdown_table(CELLS).strip() in card
    assert "![accuracies](accuracies.png)" in card
    assert json.loads(card.split("```json\n")[1].split("```")[0]) == config
    assert "Apache-2.0" in card and "no licence" in card
