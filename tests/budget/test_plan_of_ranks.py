"""Plans of merges by several ranks, made by one process: what a rank holds, receives and is refused."""

import functools
import json
from dataclasses import asdict, replace

import classifiers
import pytest
import streaming
import torch
import yaml
from classifiers import LABELS
from safetensors.torch import save_file
from typer.testing import CliRunner

import samerge_ext as sm
from samerge_ext.budget.holding import planned_way
from samerge_ext.budget.plan import MemoryBudgetError, plan
from samerge_ext.checkpoints.sealed import write_sealed
from samerge_ext.cli.commands import app
from samerge_ext.packing.layout import BLOCK

TASKS = ("red", "green", "blue")
CONFIG = sm.SAMergingConfig(progress=False, steps=2)


@functools.cache
def planned(ranks):
    return plan(*problem(), CONFIG, ranks=ranks)


def problem():
    module, packed, batches = streaming.chain(TASKS)
    return module, packed, batches, streaming.logits


@pytest.mark.parametrize("ranks", [2, 4])
def test_what_comes_to_a_rank_is_what_the_formulas_say(ranks):
    """docs/distributed.md, of whole blocks in fp32, and λ of the others in every pass."""
    resident, streamed = planned(ranks).ways[:2]
    units, whole = 3 * streaming.padded_unit(ranks), 4 * ranks * -(-9 // ranks) * BLOCK
    coefficients = 4 * ranks * len(TASKS) * 6
    share = (ranks - 1) / ranks
    assert streamed.received == 2 * share * (-(-len(TASKS) // ranks) * 3 * units + coefficients)
    assert resident.received == 2 * share * (2 * whole + coefficients)


def test_nodes_send_what_others_of_them_have():
    """Of 4 ranks 3 send to each, and on two nodes 2 of these are on the other one."""
    for nodes, share in ((1, 0), (2, 2 / 3), (4, 1)):
        found = replace(planned(4), nodes=nodes)
        assert found.from_other_nodes(found.ways[1]) == share * found.ways[1].received


@pytest.mark.parametrize(("ranks", "nodes"), [(3, 2), (2, 4), (1, 2)])
def test_nodes_have_as_many_ranks_each(ranks, nodes):
    with pytest.raises(ValueError, match=f"{ranks} ranks on {nodes} nodes: every node has as many; give a multiple"):
        plan(*problem(), CONFIG, ranks=ranks, nodes=nodes)


def test_ranks_hold_their_part_of_the_stores(width=1024):
    """From memory a rank's own numbers are there, from a file two pieces of them: the rest is alike."""
    base, *experts = (torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(3))) for _ in range(4))
    packed = sm.PackedWeights.from_modules(base, dict(zip(TASKS, experts, strict=True)))
    stored = packed.base.nbytes + packed.task_vectors.nbytes
    ways = plan(base, packed, {task: [torch.randn(2, width)] for task in TASKS}, streaming.logits, CONFIG, ranks=2).ways
    memory, file = ways[1:3]
    assert file.piece == width * width // 2
    assert memory.device_bytes - file.device_bytes == stored // 2 - 2 * file.piece * 4 * (1 + len(TASKS))


def test_of_more_ranks_than_tasks_each_runs_a_part_of_a_batch():
    """Of weights as small as these, what counts are activations and the experts' logits, of half as many rows each time."""
    module, packed, _ = streaming.chain(TASKS)
    batches = {task: [torch.randn(200_000, 40)] for task in TASKS}
    three, six, twelve = (
        plan(module, packed, batches, streaming.logits, CONFIG, ranks=ranks).ways[0].device_bytes for ranks in (3, 6, 12)
    )
    assert three - six > 200_000 // 2 * 40 * 4 * 3
    assert 1.8 < (three - six) / (six - twelve) < 2.2


def test_other_ranks_than_began_a_run_plan_anew(tmp_path):
    streamed = planned(2).ways[1]
    for ranks in (2, 1):
        begun = {"memory_budget": "1TB", "host_memory_budget": None, "ranks": ranks, "way": asdict(streamed)}
        write_sealed(tmp_path / "plan.json", json.dumps(begun).encode())
        config = sm.SAMergingConfig(memory_budget="1TB", checkpoint_dir=tmp_path)
        found = planned_way(*problem(), config, teachers=True)
        assert (found == streamed) == (ranks == 1)


def test_a_budget_that_no_rank_can_keep_says_what_would():
    with pytest.raises(MemoryBudgetError) as error:
        planned(4).choose("1MB")
    first, *_, last = str(error.value).splitlines()
    assert first == "memory_budget=1 MB is not enough for a rank of this merge by 4:"
    assert "fewer tasks_per_batch, more ranks, or task vectors in fewer bits" in last


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    models = classifiers.write(folder)
    models_of = {
        "base_model": str(models / "base"),
        "models": [{"model": str(models / task)} for task in LABELS],
        "heads": ["classifier.*"],
    }
    files = {"mood": str(models / "mood.txt"), "topic": str(models / "topic.jsonl")}
    learned = {"calibration": {"files": files, "batch_size": 2}, "parameters": {"steps": 4}}

    def written(method):
        path = folder / f"{method}.yaml"
        of_method = {"parameters": {"weight": 0.5, "density": 0.4}} if method == "ties" else learned
        path.write_text(yaml.safe_dump(models_of | of_method | {"merge_method": method}))
        return str(path)

    return written


def check(*arguments):
    return CliRunner().invoke(app, ["check", *map(str, arguments)])


def test_the_command_says_what_a_rank_takes_and_receives(recipe):
    run = check(recipe("samerging"), "--ranks", 4, "--nodes", 2, "--memory-budget", "100GB")
    assert run.exit_code == 0, run.output
    lines = run.output.partition("memory of each of 4 ranks on 2 nodes, where this machine has ")[2].splitlines()
    assert lines[1].startswith("* resident: ")
    assert all(" received per step, " in line and line.endswith(" of it from other nodes") for line in lines[1:4])


def test_the_command_says_what_a_rank_of_files_writes(recipe):
    run = check(recipe("ties"), "--ranks", 2)
    assert run.exit_code == 0 and "by 2 ranks, each of which writes up to " in run.output, run.output


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("statsmerging", ["--ranks", "2"], "statsmerging is merged by one process; only samerging and adamerging"),
        ("samerging", ["--ranks", "3", "--nodes", "2"], "3 ranks on 2 nodes: every node has as many"),
        ("ties", ["--nodes", "2"], "1 ranks on 2 nodes: every node has as many"),
    ],
)
def test_the_command_refuses_what_the_merge_would(recipe, method, options, message):
    run = check(recipe(method), *options)
    assert run.exit_code == 1 and message in run.output, run.output


def test_the_packed_file_of_ranks_takes_room_of_lora_experts_too(tmp_path):
    """They read the base from it; its bytes, and the factors', are written beside the model's."""
    models = classifiers.write(tmp_path)
    tasks, name, rank, width = [f"lora-{task}" for task in LABELS], "bert.encoder.layer.0.attention.self.query", 2, 16
    for seed, task in enumerate(tasks):
        (tmp_path / task).mkdir()
        settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank}
        (tmp_path / f"{task}/adapter_config.json").write_text(json.dumps(settings))
        torch.manual_seed(seed)
        factors = {"lora_A": torch.randn(rank, width), "lora_B": torch.randn(width, rank)}
        tensors = {f"base_model.model.{name}.{side}.weight": factor for side, factor in factors.items()}
        save_file(tensors, tmp_path / f"{task}/adapter_model.safetensors")
    said = {
        "merge_method": "samerging",
        "base_model": str(models / "base"),
        "models": [str(tmp_path / task) for task in tasks],
        "task_vector_dtype": "lora",
        "calibration": {"files": {task: str(models / "mood.txt") for task in tasks}, "batch_size": 2},
        "parameters": {"steps": 4},
    }
    (tmp_path / "merge.yaml").write_text(yaml.safe_dump(said))
    runs = [check(tmp_path / "merge.yaml", "--ranks", n, "--json") for n in (1, 2)]
    assert [run.exit_code for run in runs] == [0, 0], [run.output for run in runs]
    writes = [json.loads(run.stdout)["writes"] for run in runs]
    experts = {task: tmp_path / task for task in tasks}
    packed = sm.PackedWeights.describe(models / "base", experts, task_vector_dtype="lora")
    assert packed.task_vectors.nbytes == len(tasks) * 2 * rank * width * 4
    assert writes[1] - writes[0] == packed.base.nbytes + packed.task_vectors.nbytes
