"""The demo from end to end, on one block of the encoder and a few steps: table, cells, merged model."""

import json
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from samerge_ext.demo import cells, studies
from samerge_ext.demo.corpora import MissingData
from samerge_ext.demo.data import load_tasks
from samerge_ext.demo.experts import SMALL, backbone_folder

TINY = replace(SMALL, tasks=("election", "tweets"), layers=1, max_tokens=8, steps=3, warmup=1, batch=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the main study; called again, continues from the same cache."""
    try:
        backbone_folder()
        load_tasks(TINY.tasks)
    except MissingData as error:
        pytest.skip(str(error))
    root = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(studies, "SMALL", TINY)
        patch.setattr(cells, "STEPS", 2)

        def run(out="out", study="main"):
            console = Console(record=True, width=200)
            options = {"full": False, "seeds": 1, "out": root / out, "cache": root / "cache", "progress": False}
            return studies.run_study(study, console=console, **options), console.export_text(), root / out

        yield run


def test_the_table_has_every_method_with_its_cost(run):
    found, printed, out = run()
    rows = studies.main_rows(full=False)
    assert [cell.method for cell in found] == [row.label for row in rows]
    assert all(set(cell.accuracies) == set(TINY.tasks) for cell in found)
    assert all(cell.seconds > 0 and cell.peak_bytes is not None for cell in found if "Merging" in cell.method)
    table = (out / "main-small.md").read_text()
    for row in rows:
        assert row.label in printed and f"| {row.label} |" in table


def test_the_merged_folder_is_a_model_that_transformers_loads(run):
    from transformers import AutoModel, AutoTokenizer

    _, _, out = run()
    folder = out / "merged"
    module = AutoModel.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    for name in ("README.md", "coefficients.json", "coefficients.png", "accuracies.png", "heads/tweets.safetensors"):
        assert (folder / name).stat().st_size > 0, name
    summary = json.loads((folder / "coefficients.json").read_text())
    assert summary["method"] == "samerging" and summary["steps"] == 2
    base = cells.load_folder(cells.base_folder(TINY, out.parent / "cache")).state_dict()
    moved = [name for name, tensor in module.state_dict().items() if not torch.equal(tensor, base[name])]
    assert moved and not any(name.startswith("embeddings") for name in moved)


def test_finished_cells_are_not_computed_again(run, monkeypatch):
    before, _, _ = run()

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(cells, "KINDS", dict.fromkeys(cells.KINDS, fail))
    after, _, _ = run()
    assert after == before
    with pytest.raises(AssertionError, match="computed again"):
        run(study="tuning")


def test_an_unknown_study_is_refused(run):
    with pytest.raises(ValueError, match="no study 'mian'"):
        run(study="mian")
