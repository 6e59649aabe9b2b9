"""Merges from file to file on a GPU: the CPU's numbers, pieces that do not matter, interruptions, faults, copies in time."""

import json
import sys
import threading

import pytest
import torch
from folders import assert_same, read_all, same_bytes
from helpers import assert_close, need_backend
from merges import OTHERS, TASKS, merge_of, rules, write
from safetensors.torch import save_file
from typer.testing import CliRunner

from samerge_ext import backend
from samerge_ext.checkpoints.adapter_tensors import PREFIX
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.checkpoints.sources import Source
from samerge_ext.cli.commands import app
from samerge_ext.elementwise import file_merge, file_pieces
from samerge_ext.elementwise.file_merge import merge_files
from samerge_ext.elementwise.piecewise import Combination

pytestmark = pytest.mark.gpu
EMULATED = "emulated_cuda" in sys.modules
SMALL = {"embed": (300, 300), "layers.0.weight": (40, 50), "layers.0.bias": (50,), "layers.1.weight": (40, 50), "scale": ()}


@pytest.fixture
def models(tmp_path):
    return write(tmp_path / "models", SMALL)


@pytest.fixture
def cpu_rounds_as_the_device():
    """The emulated device adds a product in two roundings, as the portable loops do; a GPU and the other loops in one."""
    need_backend("cpu")
    before = backend.cpu_level()
    backend._C.set_cpu_level("portable" if EMULATED else before)
    yield
    backend._C.set_cpu_level(before)


def on(device, merge, out, **keys):
    merge.device = device
    merge_files(merge, out, **keys)
    return read_all(out)


def of_adapters(models, method):
    """LoRA adapters on the base, one of them on a matrix alone."""
    for seed, task in enumerate(TASKS):
        (models / f"adapter-{task}").mkdir()
        first, second = (torch.randn(n, generator=torch.Generator().manual_seed(seed)) for n in ((2, 50), (40, 2)))
        names = [f"{PREFIX}layers.{i}.lora_{x}.weight" for i in range(1 + seed) for x in "AB"]
        tensors = {name: tensor.clone() for name, tensor in zip(names, [first, second] * 2)}
        save_file(tensors, models / f"adapter-{task}/adapter_model.safetensors")
        settings = json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1})
        (models / f"adapter-{task}/adapter_config.json").write_text(settings)
    merge = merge_of(models, method)
    merge.experts = [(task, models / f"adapter-{task}") for task in TASKS]
    return merge


def without_a_base(models):
    merge = merge_of(models, "arithmetic")
    merge.base = None
    return merge


def of_several_types(models):
    wide = {name: tensor.float() for name, tensor in read_all(models / "news").items()}
    save_checkpoint(models / "news", wide, overwrite=True, companions_from=models / "news")
    return merge_of(models, "ties", out_dtype=torch.float16)


CASES = {
    **{method: lambda models, method=method: merge_of(models, method) for method in ("arithmetic", "ties", "dare", "dare_ties")},
    **{method: lambda models, method=method: merge_of(models, method) for method in OTHERS},
    "wudi": lambda models: merge_of(models, "wudi"),
    "the whole vector": lambda models: merge_of(models, "ties", whole=True),
    "norms aligned": lambda models: merge_of(models, "arithmetic", align=True),
    "without a base": without_a_base,
    "adapters": lambda models: of_adapters(models, "dare_ties"),
    "several types": of_several_types,
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_a_gpu_gives_what_the_cpu_gives(cpu_rounds_as_the_device, tmp_path, case, dtype):
    merge = CASES[case](write(tmp_path / "models", SMALL, dtype))
    expected, found = on("cpu", merge, tmp_path / "cpu"), on("cuda", merge, tmp_path / "cuda")
    assert found.keys() == expected.keys() == SMALL.keys()
    for name, numbers in expected.items():
        assert found[name].dtype == numbers.dtype
        if EMULATED:
            assert same_bytes(found[name], numbers), name
        else:
            assert_close(found[name], numbers, name)


@pytest.mark.parametrize("case", ["arithmetic", "ties", "dare_ties", "the whole vector"])
def test_neither_pieces_nor_shards_nor_workers_matter(models, tmp_path, monkeypatch, threads, case):
    expected = on("cuda", CASES[case](models), tmp_path / "one")
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cuda", 1)
    threads(3)
    merge = CASES[case](models)
    merge.shard_bytes = 5000
    found = on("cuda", merge, tmp_path / "many")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) >= 3
    assert_same(found, expected)


class Killed(BaseException):
    pass


def killed_before(method, times, merge, out, monkeypatch):
    """Runs until ``method`` of the merge is called for the ``times``-th time."""
    left, original = [None] * times, getattr(file_merge._Run, method)

    def dying(*arguments):
        left.pop()
        if not left:
            raise Killed
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(file_merge._Run, method, dying)
        with pytest.raises(Killed):
            on("cuda", merge, out)


@pytest.mark.parametrize("whole", [False, True])
def test_an_interrupted_merge_goes_on_where_it_was(models, tmp_path, monkeypatch, whole):
    merge = merge_of(models, "ties", align=True, whole=whole, shard_bytes=5000)
    on("cuda", merge, tmp_path / "alone")
    killed_before("_check_unchanged", 2, merge, tmp_path / "out", monkeypatch)
    again, original = [], file_merge._Run._merge_tensor
    monkeypatch.setattr(file_merge._Run, "_merge_tensor", lambda self, *a: (again.append(a[0]), original(self, *a)))
    on("cuda:0", merge, tmp_path / "out")
    assert 0 < len(again) < len(SMALL), "the first shard is used"
    for path in (tmp_path / "alone").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name


def test_what_a_gpu_began_the_cpu_begins_anew(models, tmp_path, monkeypatch):
    """The two may round differently."""
    killed_before("finish", 1, merge_of(models, shard_bytes=5000), tmp_path / "out", monkeypatch)
    found = on("cpu", merge_of(models, shard_bytes=5000), tmp_path / "out")
    assert_same(found, on("cpu", merge_of(models, shard_bytes=5000), tmp_path / "alone"))


def spoil(folder, name, value, place=7):
    tensors = read_all(folder)
    tensors[name].view(-1)[place] = value
    save_checkpoint(folder, tensors, overwrite=True, companions_from=folder)


DENSITIES = [("arithmetic", 1.0), ("ties", 0.3), ("ties", 0.0), ("dare", 0.0), ("dare_ties", 0.3)]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(("method", "density"), DENSITIES)
def test_numbers_that_are_none_name_their_file(models, tmp_path, method, density, value):
    """Also where they would be dropped."""
    spoil(models / "news", "layers.1.weight", value)
    merge = merge_of(models, method)
    merge.rule_of = rules(method, density)
    with pytest.raises(ValueError, match=r"expert 'news' \(.*news\): 'layers.1.weight' holds (NaN|Inf)"):
        on("cuda", merge, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.state").exists()


def test_an_overflow_is_told(models, tmp_path):
    merge = merge_of(models, out_dtype=torch.float16)
    merge.rule_of = lambda name, shape, dtype: Combination([1e7, 0.0])
    with pytest.raises(ValueError, match="overflows torch.float16"):
        on("cuda", merge, tmp_path / "out")


@pytest.mark.parametrize("whole", [False, True])
def test_a_mask_of_all_models_stays(models, tmp_path, monkeypatch, whole):
    """What is infinite in all of them, from the first of its pieces on, is written as it is, and what follows is merged."""
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cuda", 1)
    merge, name = merge_of(models, "arithmetic", whole=whole), "embed"
    expected = on("cuda", merge, tmp_path / "finite")
    expected[name] = torch.full_like(expected[name], -torch.inf).triu(1)
    for model in ("base", *TASKS):
        tensors = {**read_all(models / model), name: expected[name]}
        save_checkpoint(models / model, tensors, overwrite=True, companions_from=models / model)
    assert_same(on("cuda", merge, tmp_path / "out"), expected)


def test_the_command_takes_a_device(models, tmp_path):
    pytest.importorskip("pydantic", reason="pydantic, which recipes are read with, is not installed")
    lines = ["merge_method: ties", f"base_model: {models / 'base'}", "parameters: {weight: 0.5}", "models:"]
    (tmp_path / "ties.yaml").write_text("\n".join([*lines, *(f"  - model: {models / task}" for task in TASKS)]))
    for options in (["--device", "cuda"], ["--parameter", "device=cuda"]):
        done = CliRunner().invoke(app, ["merge", str(tmp_path / "ties.yaml"), str(tmp_path / "out"), "--overwrite", *options])
        assert done.exit_code == 0, done.output
        assert "device: cuda" in (tmp_path / "out/README.md").read_text()


class LateStream:
    """A stream whose copies are made when something waits for them, and not before."""

    def __init__(self, device=None):
        self.asked = []

    def record_event(self):
        return LateEvent(list(self.asked))

    def wait_event(self, event):
        for copy in event.asked:
            copy.make()


class LateEvent:
    def __init__(self, asked):
        self.asked = asked

    def synchronize(self):
        for copy in self.asked:
            copy.make()
            copy.waited_for = True


class LateCopy:
    def __init__(self, make):
        self.left, self.waited_for = [make], False

    def make(self):
        while self.left:
            self.left.pop()()


@pytest.mark.skipif(not EMULATED, reason="a GPU's copies are as late as they are; the emulated device's can be made late")
@pytest.mark.parametrize("case", ["arithmetic", "ties", "norms aligned", "the whole vector"])
def test_copies_are_waited_for(models, tmp_path, monkeypatch, case):
    """Of merged pieces before they are written, of what is read ahead before it is used, of what was read before its memory is
    read into again."""
    monkeypatch.setitem(file_pieces.BUFFER_BYTES, "cuda", 1)
    expected = on("cuda", CASES[case](models), tmp_path / "at-once")
    streams, at_once, read_into, copies = threading.local(), torch.Tensor.copy_, Source.read_into, {}
    current = lambda device=None: streams.__dict__.setdefault("current", LateStream())

    def copy_(self, source, non_blocking=False):
        if not non_blocking:
            return at_once(self, source)
        copy = copies[source.data_ptr()] = LateCopy(lambda: at_once(self, source))
        current().asked.append(copy)
        if self.is_cuda and not threading.current_thread().name.startswith("samerge-reader"):
            copy.make()  # what follows on the same stream needs no waiting
        return self

    def read_into_what_is_free(self, name, start, out):
        assert out.data_ptr() not in copies or copies[out.data_ptr()].waited_for
        read_into(self, name, start, out)

    monkeypatch.setattr(torch.cuda, "Stream", LateStream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: streams.__dict__.update(current=stream))
    monkeypatch.setattr(torch.Tensor, "copy_", copy_)
    monkeypatch.setattr(Source, "read_into", read_into_what_is_free)
    assert_same(on("cuda", CASES[case](models), tmp_path / "late"), expected)
    assert copies
