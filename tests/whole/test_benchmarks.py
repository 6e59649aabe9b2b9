"""The benchmarks' parts that measure nothing, and all of them once on tiny inputs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

BENCHMARKS = ROOT / "benchmarks"
pytestmark = pytest.mark.skipif(not BENCHMARKS.exists(), reason="needs the source tree")
TINY_NUMBERS = 32 * 1024  # the padded layers of the tiny model


def run(*arguments, folder=BENCHMARKS) -> subprocess.CompletedProcess:
    # pytest-benchmark does not measure in a worker of pytest-xdist; these processes are not its workers.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def rows_of(path: Path) -> list[dict]:
    held = json.loads(path.read_text())
    return [dict(zip(held["columns"], row, strict=True)) for row in held["rows"]]


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Output and results file of a tiny run."""
    folder = tmp_path_factory.mktemp("results")
    result = run("-m", "pytest", ".", "--size", "tiny", "--save-to", folder)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    (path,) = folder.glob("*.json")
    return result.stdout, path


def test_every_operator_is_measured_beside_its_baselines(tiny_run):
    output, path = tiny_run
    rows = rows_of(path)
    names = {file.stem.removeprefix("bench_") for file in BENCHMARKS.glob("bench_*.py")}
    assert {row["operator"] for row in rows} == names
    for name in names:
        others = {"layer_stats": "torch.linalg.svdvals", "ties": "sort by layer"}
        baseline = "unfused" if "linear_softmax_kl" in name else others.get(name, "published")
        assert {"samerge cpu", baseline} <= {row["candidate"] for row in rows if row["operator"] == name}
        assert name in output.splitlines()
    assert all(0 < row["q20_s"] <= row["median_s"] <= row["q80_s"] for row in rows)
    assert all(row["share"] > 0 and row["times_ours"] > 0 for row in rows)
    environment = json.loads(path.read_text())["environment"]
    assert {"device", "threads", "torch", "commit", "copy_bytes_per_s"} < environment.keys()
    assert path.stat().st_size < 250 * len(rows)


def test_bytes_are_those_that_must_move(tiny_run):
    rows = rows_of(tiny_run[1])
    moved = {(row["operator"], row["case"]): row["bytes"] for row in rows if row["candidate"] == "samerge cpu"}
    fewer = {row["candidate"]: row["bytes"] for row in rows if (row["operator"], row["case"]) == ("weighted_sum", "tiny T3 bf16")}
    assert fewer["samerge int8"] == 2 * TINY_NUMBERS * 2 + 3 * TINY_NUMBERS * (1 + 2 / 128)
    assert fewer["samerge int4-residual"] == 2 * TINY_NUMBERS * 2 + 5 * TINY_NUMBERS * (0.5 + 2 / 128)
    assert moved["weighted_sum", "tiny T3 fp32"] == (3 + 2) * TINY_NUMBERS * 4
    assert moved["weighted_sum", "tiny T3 bf16"] == (3 + 2) * TINY_NUMBERS * 2
    assert moved["coefficient_grad", "tiny T3 bf16"] == (3 + 1) * TINY_NUMBERS * 2
    assert moved["softmax_kl", "7x30 fp32"] == 2 * 7 * 30 * 4
    assert moved["softmax_kl", "7x30 bf16 with grad"] == 3 * 7 * 30 * 2


@pytest.fixture(scope="module")
def faulty_run(tmp_path_factory):
    """Output and rows of a run in which candidates raise and are wrong, and a case is too large."""
    folder = tmp_path_factory.mktemp("faulty")
    copy = shutil.copytree(BENCHMARKS, folder / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    with (copy / "bench_weighted_sum.py").open("a") as file:
        file.write("\n\nCANDIDATES |= {'raises': lambda x: 1 / 0}\n")
        file.write("CANDIDATES |= dict.fromkeys(['wrong', 'samerge wrong'], lambda x: lambda: x.base.clone())\n")
    with (copy / "cases.py").open("a") as file:
        file.write("\n\ntiny_cases = packed_cases\n")
        file.write("packed_cases = lambda *which: [*tiny_cases(*which), Packed('1B', 2000, torch.float32)]\n")
    command = ("-m", "pytest", "bench_weighted_sum.py", "-k", "fp32 and (wrong or raises or _foreach)", "--size", "tiny")
    result = run(*command, "--save-to", folder, folder=copy)
    assert result.returncode == 1, result.stdout[-4000:] + result.stderr[-2000:]
    (path,) = folder.glob("*.json")
    return result.stdout, rows_of(path)


def test_a_wrong_result_has_no_time_and_only_ours_must_be_right(faulty_run):
    output, rows = faulty_run
    assert "1 failed" in output
    assert output.count("no time is given for a wrong result") >= 2
    assert "raises: ZeroDivisionError" in output
    assert [row["candidate"] for row in rows] == ["_foreach"]


def test_a_case_that_does_not_fit_is_skipped_with_its_size(faulty_run):
    assert re.search(r"1B T2000 fp32 needs \d{4,}\.\d GiB, \d+\.\d GiB are free", faulty_run[0])


def test_layer_maps_are_those_of_the_models(monkeypatch):
    transformers = pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(BENCHMARKS)
    from model_shapes import MODELS

    clip, bert, llama = transformers.CLIPVisionConfig, transformers.BertConfig, transformers.LlamaConfig
    large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    billion = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    billion |= {"num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True}
    small = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
    with torch.device("meta"):
        built = {
            "ViT-B/32": transformers.CLIPVisionModel(clip(patch_size=32)),
            "ViT-L/14": transformers.CLIPVisionModel(clip(patch_size=14, **large)),
            "MiniLM": transformers.BertModel(bert(**small)),
            "Llama-7B layer": transformers.LlamaModel(llama(num_hidden_layers=1)).layers[0],
            "Llama-3.2-1B": transformers.LlamaForCausalLM(llama(**billion)),
        }
    for name, module in built.items():
        assert MODELS[name] == [tuple(p.shape) for p in module.parameters()], name
    for name, numbers in (("88M", 88_000_000), ("1B", 1_000_000_000)):
        assert sum(torch.Size(shape).numel() for shape in MODELS[name]) == numbers


def results_file(path: Path, share: float, device="some GPU", candidate="samerge cuda") -> Path:
    columns = ["operator", "case", "candidate", "share", "median_s"]
    environment = {"device": device, "commit": "abc"}
    held = {"environment": environment, "columns": columns, "rows": [["weighted_sum", "88M T8", candidate, share, 9.0]]}
    path.write_text(json.dumps(held))
    return path


@pytest.fixture
def compare(monkeypatch, capsys):
    """The command in this process: its status and what it prints."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import compare

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, arguments)])
        return compare.main(), capsys.readouterr().out

    return run


@pytest.mark.parametrize(
    ("share", "options", "status"), ((0.85, (), 0), (0.75, (), 1), (0.75, ("--threshold", 0.2), 0), (1.5, (), 0))
)
def test_compare_names_what_lost_its_share(compare, tmp_path, share, options, status):
    old, new = results_file(tmp_path / "old.json", 0.9), results_file(tmp_path / "new.json", share)
    found, printed = compare(old, new, *options)
    assert found == status
    assert f"{status} of 1 benchmarks got slower" in printed
    assert ("slower\n" in printed) == bool(status)


@pytest.mark.parametrize("other", ({"device": "another GPU"}, {"candidate": "samerge triton"}, {"candidate": "published"}))
def test_compare_refuses_what_has_nothing_in_common(compare, tmp_path, other):
    old, new = results_file(tmp_path / "old.json", 0.9), results_file(tmp_path / "new.json", 0.9, **other)
    status, printed = compare(old, new)
    assert status == 2 and printed.startswith("not comparable")


def test_compare_ends_with_its_status(tmp_path):
    old, new = results_file(tmp_path / "old.json", 0.9), results_file(tmp_path / "new.json", 0.75)
    assert run("compare.py", old, new).returncode == 1


def test_the_roofline_is_drawn_without_a_display(tiny_run, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.delenv("DISPLAY", raising=False)
    result = run("roofline.py", tiny_run[1], tmp_path / "roofline.png")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "roofline.png").read_bytes().startswith(b"\x89PNG")


def test_merges_by_singular_values_beside_the_published_calls(tmp_path):
    done = run("singular.py", "--model", "tiny", "--save-to", tmp_path)
    assert done.returncode == 0, done.stderr
    held = json.loads((tmp_path / "singular-cpu.json").read_text())
    products, *rows = held["tiny"].values()
    assert products["side"] == 32 and products["eigh fp32"] > 0
    assert [row["method"] for row in rows] == ["tsv_m", "iso_c", "tsv_m", "iso_c", "knots"]
    assert all(row["samerge_s"] > 0 and row["published_s"] > 0 and row["threads"] == 1 for row in rows)
    done = run("singular.py", "--model", "tiny", "--experts", "LoRA", "--save-to", tmp_path)
    again = json.loads((tmp_path / "singular-cpu.json").read_text())["tiny"]
    assert done.returncode == 0 and again.keys() == held["tiny"].keys(), "an earlier run's rows stay or are replaced"
    assert again["products"] == products and again["knots LoRA, rank 16"] != rows[-1]


def test_the_whole_of_statsmerging_beside_the_published_way(tmp_path):
    """On tiny experts; both candidates' first loss and gradient are compared before anything is printed."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import save_file

    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 90}
    config, folder = transformers.BertConfig(**shape), tmp_path / "experts"
    for seed, name in enumerate(["base", *(f"task{t}-seed0" for t in range(8))]):
        torch.manual_seed(seed)
        config.save_pretrained(folder / name)
        save_file(transformers.BertModel(config).state_dict(), folder / name / "model.safetensors")
    environment = {**os.environ, "SAMERGE_BENCH_EXPERTS": str(folder)}
    command = [sys.executable, "statsmerging.py", "--steps", "2", "--save-to", str(tmp_path)]
    result = subprocess.run(command, cwd=BENCHMARKS, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    held = json.loads((tmp_path / "statsmerging-cpu.json").read_text())
    assert [found["candidate"] for found in held["results"]] == ["samerge cpu", "published"]
    assert 0 <= held["gradient_error"] < 1e-3 and "the demo's" in result.stdout
