"""Learned merges of language models to which tokens were added, each with its own."""

import json

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file
from typer.testing import CliRunner
from vocabularies import EMBEDDINGS, HEAD, write_model

from samerge_ext.checkpoints.tokenizers import TokenizerConfig
from samerge_ext.cli import commands
from samerge_ext.models.folders import FolderModel
from samerge_ext.reports.report import read_report

transformers = pytest.importorskip("transformers")
WORDS = ["?", "a", "b", "c"]


@pytest.fixture
def root(tmp_path):
    """base, x and y with a token of its own each, in the same row, and texts that have it."""
    for seed, (name, more) in enumerate({"base": [], "x": ["<x>"], "y": ["<y>"]}.items()):
        write_model(tmp_path / name, [*WORDS, *more], seed=seed, added=tuple(more))
        (tmp_path / f"{name}.txt").write_text(f"a <{name}> b c\nc <{name}> a\n")
    return tmp_path


def test_all_tasks_are_read_by_the_merged_tokenizer(root):
    experts = {name: root / name for name in "xy"}
    with pytest.warns(UserWarning, match="the tokens of .*base and '<x>', '<y>', in 6 rows"):
        model = FolderModel.of(root / "base", experts, tokenizer=TokenizerConfig("union"))
    batches = model.batches({name: root / f"{name}.txt" for name in "xy"})
    assert batches["x"][0]["input_ids"][0].tolist() == [1, 4, 2, 3]
    assert batches["y"][0]["input_ids"][0].tolist() == [1, 5, 2, 3]
    assert model.module.get_input_embeddings().weight.shape[0] == model.module.config.vocab_size == 6


@pytest.mark.parametrize("parameters", [{}, {"memory_budget": "16GB"}])
def test_a_learned_merge_of_a_union(root, parameters):
    content = {
        "merge_method": "samerging",
        "base_model": str(root / "base"),
        "models": [str(root / name) for name in "xy"],
        "tokenizer": "union",
        "chat_template": "{{ messages }}",
        "parameters": {"steps": 2, **parameters},
        "calibration": {"files": {name: str(root / f"{name}.txt") for name in "xy"}},
    }
    (root / "recipe.yaml").write_text(json.dumps(content))
    result = CliRunner().invoke(commands.app, ["merge", str(root / "recipe.yaml"), str(root / "out")])
    assert result.exit_code == 0, result.output
    assert "note: tokenizer: the merged model has the tokens of" in result.output
    tokenizer = transformers.AutoTokenizer.from_pretrained(root / "out")
    model, notes = transformers.AutoModelForCausalLM.from_pretrained(root / "out", output_loading_info=True)
    assert not any(notes.values()), notes
    assert tokenizer("a <x> c <y>")["input_ids"] == [1, 4, 3, 5] and tokenizer.chat_template == "{{ messages }}"
    with torch.no_grad():
        assert model(**tokenizer("a <y>", return_tensors="pt")).logits.shape[-1] == 6
    for name in (EMBEDDINGS, HEAD):  # what one model alone has is all models'
        for number, owner in ((4, "x"), (5, "y")):
            own = load_file(root / owner / "model.safetensors")[name][4]
            assert_close(model.state_dict()[name][number], own.double(), f"{name} of <{owner}>")


def test_a_report_of_a_union_reads_the_models_as_they_were_merged(root):
    """A slice of the loss rises along its gradient, in which a token counts as much as in the loss."""
    for name in "xy":
        (root / f"{name}.txt").write_text(f"a <{name}> b c a b c a b c\nc <{name}>\n")
    content = {
        "merge_method": "samerging",
        "base_model": str(root / "base"),
        "models": [str(root / name) for name in "xy"],
        "tokenizer": "union",
        "parameters": {"steps": 1, "rho": 0.02},
        "calibration": {"files": {name: str(root / f"{name}.txt") for name in "xy"}, "batch_size": 1},
    }
    (root / "recipe.yaml").write_text(json.dumps(content))
    for command in (["merge", str(root / "recipe.yaml")], ["report", "--similarity", "--loss-slice"]):
        result = CliRunner().invoke(commands.app, [*command, str(root / "out")])
        assert result.exit_code == 0, result.output
    found = read_report(root / "out")
    assert found.similarity["models"] == ["x", "y"]
    at, losses = found.loss_slice["distances"], found.loss_slice["losses"]
    middle = len(at) // 2
    slope = (losses[middle + 1] - losses[middle - 1]) / (at[middle + 1] - at[middle - 1])
    assert slope == pytest.approx(found.loss_slice["gradient_norm"], rel=0.01)
