"""Plans for a memory budget: what is predicted, what is chosen, and what is refused."""

import json
import subprocess
import sys

import pytest
import streaming
import torch
from helpers import ROOT
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.budget.dry_run import dry_run
from samerge_ext.budget.holding import planned_way
from samerge_ext.budget.plan import MemoryBudgetError, Plan, Way, plan
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.sealed import read_sealed, write_sealed
from samerge_ext.cli.commands import app
from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe
from samerge_ext.sizes import parse_bytes

CONFIG = sm.SAMergingConfig(progress=False, steps=3)
CPU = torch.device("cpu")


def ways(module, weights, config=CONFIG):
    return plan(module, weights, streaming.make_batches(), streaming.logits, config)


def test_sizes_as_people_write_them():
    assert [parse_bytes(size) for size in (7, "16GB", "0.5 GiB", "300mb")] == [7, 16 * 10**9, 2**29, 300 * 10**6]
    for wrong in ("16 apples", 0, "-3GB"):
        with pytest.raises(ValueError, match="memory_budget"):
            sm.SAMergingConfig(memory_budget=wrong)


def test_a_dry_run_leaves_the_module_and_counts_what_is_held_twice():
    module = streaming.make(1, width=64)
    weights = streaming.make_packed(streaming.make(width=64))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batches = {task: held[0] for task, held in streaming.make_batches().items()}
    peaks = [
        dry_run(module, weights, batches, streaming.logits, device=CPU, streamed=streamed).peak for streamed in (False, True)
    ]
    assert 2 * weights.base.nbytes < peaks[0] < 3 * weights.base.nbytes, "merged weights, gradient, activations"
    assert peaks[1] < peaks[0] - 1.5 * weights.base.nbytes
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("streamed", [False, True])
def test_a_dry_run_leaves_no_gradient_on_modules_of_the_users(streamed):
    head = torch.nn.Linear(37, 3, dtype=torch.float64)
    head.weight.grad = own = torch.ones_like(head.weight)
    batches = {task: held[0] for task, held in streaming.make_batches().items()}
    module, weights = streaming.make(1, blocks=1), streaming.make_packed(streaming.make(blocks=1))
    dry_run(module, weights, batches, lambda module, batch, task: head(module(batch)), device=CPU, streamed=streamed)
    assert head.bias.grad is None and head.weight.grad is own and own.eq(1).all()


def test_activations_count():
    module, weights = streaming.make(1), streaming.make_packed(streaming.make())
    peaks = []
    for rows in (4, 4096):
        batches = {task: torch.zeros(rows, 5, dtype=torch.long) for task in streaming.TASKS}
        peaks.append(dry_run(module, weights, batches, streaming.logits, device=CPU, streamed=True).peak)
    inputs = 4096 * 5 * 16 * 8  # of one unit
    assert peaks[1] > peaks[0] + 5 * inputs


def test_rows_chosen_by_a_mask_count_as_all_of_them():
    def masked(module, batch, task):
        return module(batch)[batch[:, 0] > 3]

    batches = {task: held[0] for task, held in streaming.make_batches().items()}
    found = dry_run(streaming.make(1), streaming.make_packed(streaming.make()), batches, masked, device=CPU, streamed=True)
    assert found.answers == dict.fromkeys(streaming.TASKS, 4 * 37 * 8)


def test_a_forward_that_asks_for_values_is_said_to_be_unplannable():
    def asking(module, batch, task):
        return module(batch) * (2.0 if batch.sum() > 3 else 1.0)

    batches = {task: held[0] for task, held in streaming.make_batches().items()}
    with pytest.raises(ValueError, match="cannot be planned, since its forward asks for values"):
        dry_run(streaming.make(1), streaming.make_packed(streaming.make()), batches, asking, device=CPU, streamed=True)


def test_ways_from_the_fastest_to_the_smallest(packed_twice):
    in_memory, in_file = packed_twice
    found = ways(streaming.make(1), in_file).ways
    assert [way.name.split(",")[0] for way in found[:3]] == ["resident", "streamed from memory", "streamed from a packed file"]
    stored = in_memory.base.nbytes + in_memory.task_vectors.nbytes
    assert found[0].device_bytes > found[1].device_bytes
    assert found[1].device_bytes - found[2].device_bytes == stored - 2 * found[2].piece * 8 * 3
    assert [way.moved for way in found[:2]] == [0, 0] and found[2].moved >= 2 * 2 * stored


def test_the_fastest_way_that_fits_is_chosen_or_it_is_said_what_would():
    resident, memory, file = (
        Way("device", False, None, 900, 900, 0),
        Way("device", True, None, 700, 700, 0),
        Way("file", True, 1024, 90, 90, 1),
    )
    found = Plan((resident, memory, file), CPU, frozenset({"device", "file"}))
    assert [found.choose(budget) for budget in (900, 899, 700, 699, 90)] == [resident, memory, memory, file, file]
    with pytest.raises(MemoryBudgetError) as error:
        found.choose("0.05KB")
    lines = str(error.value).splitlines()
    assert lines[1] == "  resident: 900 B, 850 B too much" and "the least is 90 B" in lines[-1]
    with pytest.raises(MemoryBudgetError, match="numbers at a time would: keep the weights in a packed file"):
        Plan((resident, memory, file), CPU, frozenset({"device"})).choose(100)


def test_beside_a_gpu_the_hosts_memory_counts_too(monkeypatch):
    host, file = Way("host", True, 1024, 90, 800, 1), Way("file", True, 1024, 90, 200, 1)
    found = Plan((host, file), torch.device("cuda"), frozenset({"host", "file"}))
    assert found.choose(90) == host, "this machine has more than 800 bytes"
    assert [found.choose(90, budget) for budget in (800, 799, 200)] == [host, file, file]
    with pytest.raises(MemoryBudgetError, match="memory_budget=90 B with 199 B on the host is not enough") as error:
        found.choose(90, 199)
    assert "200 B of the host's memory, 1 B too much" in str(error.value)
    assert "the least is 90 B with 200 B on the host" in str(error.value)
    monkeypatch.setattr("samerge_ext.budget.plan.machine_bytes", lambda: 700)
    assert found.choose(90) == file


@pytest.mark.parametrize("content", [b"", b'{"memory_budget": "1GB", "way": {"store": "file"}}', b"00000000\n{}"])
def test_a_damaged_plan_is_told_with_the_mend(tmp_path, content):
    (tmp_path / "plan.json").write_bytes(content)
    config = sm.SAMergingConfig(memory_budget="1GB", checkpoint_dir=tmp_path)
    module, weights = streaming.make(1), streaming.make_packed(streaming.make())
    with pytest.raises(CheckpointError, match="plan.json is empty, cut off or damaged: .* delete it to begin again"):
        planned_way(module, weights, streaming.make_batches(), streaming.logits, config, teachers=True)


def test_a_host_budget_is_for_a_gpu_and_goes_with_a_budget(packed_twice):
    with pytest.raises(ValueError, match="host_memory_budget goes with a memory_budget"):
        sm.SAMergingConfig(host_memory_budget="1GB")
    with pytest.raises(ValueError, match="host_memory_budget='much'"):
        sm.SAMergingConfig(memory_budget="1GB", host_memory_budget="much")
    config = sm.SAMergingConfig(memory_budget="1GB", host_memory_budget="1GB")
    with pytest.raises(ValueError, match="is for a merge on a GPU"):
        sm.samerging(streaming.make(1), packed_twice[0], streaming.make_batches(), streaming.logits, config=config)


def test_a_budget_decides_how_a_merge_runs_and_is_kept_for_its_continuation(tmp_path, monkeypatch):
    in_file = streaming.packed_twice(tmp_path, streaming.make(blocks=1))[1]
    made = []
    monkeypatch.setattr(
        "samerge_ext.budget.plan.MergedModel",
        lambda *args, **settings: made.append(settings["streamed"]) or sm.MergedModel(*args, **settings),
    )

    def run(budget, folder=None):
        config = sm.SAMergingConfig(progress=False, steps=3, memory_budget=budget, checkpoint_dir=folder)
        module = streaming.make(1, blocks=1)
        return sm.samerging(module, in_file, streaming.make_batches(), streaming.logits, config=config).coefficients

    plenty = run("1TB")
    sizes = [way.device_bytes for way in ways(streaming.make(1, blocks=1), in_file).ways]
    streamed = run(sizes[0] * 2, tmp_path)
    assert made == [False, False]
    torch.testing.assert_close(streamed, plenty, rtol=0, atol=0)
    begun = json.loads(read_sealed(tmp_path / "plan.json"))
    begun["way"].update(streamed=True, store="file", piece=2048)
    write_sealed(tmp_path / "plan.json", json.dumps(begun).encode())
    (tmp_path / "state.pt").unlink()
    torch.testing.assert_close(run(sizes[0] * 2, tmp_path), plenty, rtol=1e-10, atol=0)
    assert made[-1] is True
    begun["host_memory_budget"] = "1GB"
    write_sealed(tmp_path / "plan.json", json.dumps(begun).encode())
    (tmp_path / "state.pt").unlink()
    run(sizes[0] * 2, tmp_path)
    assert made[-1] is False, "another budget is planned for anew"
    with pytest.raises(MemoryBudgetError, match="not enough for this merge"):
        run("1MB")
    assert len(made) == 4, "refused before any work"


def test_a_process_stays_within_its_plan(tmp_path):
    """A model of 9 M parameters with six experts in a process of its own, by each way: measured beside predicted."""
    script = ROOT / "benchmarks" / "large_models.py"
    options = ["--shape", "test", "--ways", "resident,memory,smallest", "--work", tmp_path, "--out", tmp_path / "out.json"]
    subprocess.run([sys.executable, script, *options], check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["ways"]
    assert [row["plan"]["streamed"] for row in rows] == [False, True, True] and rows[2]["plan"]["store"] == "file"
    for row in rows:
        assert row["measured_bytes"] <= 1.15 * row["planned_bytes"], row
        assert row["measured_bytes"] >= 0.8 * row["planned_bytes"], row
    for row in rows[1:]:
        assert row["measured_bytes"] <= row["memory_budget"]
        difference = torch.tensor(row["coefficients"]) - torch.tensor(rows[0]["coefficients"])
        assert difference.norm() <= 1e-5 * torch.tensor(rows[0]["coefficients"]).norm()


@pytest.fixture(scope="module")
def llama_folders(tmp_path_factory):
    """A tiny causal language model, two experts and calibration texts, as `samerge check` and `samerge merge` take them."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers

    root = tmp_path_factory.mktemp("llama")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "one", "two", "three", "four"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 6}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, tie_word_embeddings=True))
    for name in ("base", "red", "green"):
        if name != "base":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter += 0.02 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "texts.txt").write_text("one two three\nfour two\ntwo three three four\n")
    recipe = {
        "merge_method": "samerging",
        "base_model": str(root / "base"),
        "models": [{"model": str(root / "red")}, {"model": str(root / "green")}],
        "calibration": {"files": {task: str(root / "texts.txt") for task in ("red", "green")}, "batch_size": 2},
        "parameters": {"steps": 2, "progress": False},
    }
    (root / "merge.yaml").write_text(json.dumps(recipe))
    return root


def test_the_command_plans_from_headers_and_merges_within_the_budget(llama_folders, tmp_path):
    run = CliRunner().invoke(app, ["check", str(llama_folders / "merge.yaml")])
    assert run.exit_code == 0, run.output
    lines = run.output.partition("of this machine:\n")[2].splitlines()
    assert lines[0].startswith("  resident: ") and "streamed from a packed file" in lines[2] and "read per step" in lines[2]
    refused = CliRunner().invoke(app, ["check", str(llama_folders / "merge.yaml"), "--memory-budget", "1MB"])
    assert refused.exit_code == 1 and "memory_budget=1 MB is not enough" in refused.output
    options = ["--parameter", "memory_budget=100GB"]
    merged = CliRunner().invoke(app, ["merge", str(llama_folders / "merge.yaml"), str(tmp_path / "out"), *options])
    assert merged.exit_code == 0, merged.output
    assert not (tmp_path / "out.state").exists()
    refused = CliRunner().invoke(
        app, ["merge", str(llama_folders / "merge.yaml"), str(tmp_path / "no"), "--parameter", "memory_budget=1MB"]
    )
    assert refused.exit_code == 1 and not (tmp_path / "no.state").exists(), "refused before any work"


def test_a_merge_from_a_packed_file_writes_the_same_model(llama_folders, tmp_path, monkeypatch):
    from safetensors.torch import load_file

    written = []
    for budget, keep in (("1TB", None), ("1TB", "file")):
        if keep:  # a model this small fits every budget that it can be planned for
            monkeypatch.setattr(Plan, "choose", lambda self, *_: next(way for way in self.ways if way.store == "file"))
        out = tmp_path / str(keep)
        recipe = load_recipe(llama_folders / "merge.yaml", {"parameters": {"memory_budget": budget}})
        result = run_recipe(recipe, out)
        assert (result.merged is None) == bool(keep)
        written.append(load_file(out / "model.safetensors"))
    assert written[0].keys() == written[1].keys()
    for name, tensor in written[0].items():
        torch.testing.assert_close(written[1][name], tensor, rtol=1e-5, atol=1e-6)
