"""Reading model folders: what is stored is what is read, and damage is named before anything is."""

import json
import os
from pathlib import Path

import pytest
import safetensors
import torch
from folders import DTYPES, assert_same, read_all, sample, save_bert, some_tensors
from processes import give_freed_tensors_back, in_a_process
from safetensors.torch import load_file, save_file

from samerge_ext.checkpoints import state_dicts
from samerge_ext.checkpoints.folder import open_checkpoint, read_config
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.memory import PeakMemory


def write_raw(path: Path, header, data: bytes = b"", length: int | None = None) -> Path:
    """A safetensors file with any header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def f32(begin: int, end: int, *shape: int) -> dict:
    return {"dtype": "F32", "shape": list(shape), "data_offsets": [begin, end]}


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return some_tensors()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_what_the_library_writes(tmp_path, dtype):
    expected = {str(shape): sample(dtype, *shape) for shape in [(3, 4), (0, 5), (1,), (2, 3, 2)]}
    if not str(dtype).startswith("torch.float4"):  # numbers stored in pairs have no scalars
        expected["()"] = sample(dtype)
    save_file(expected, tmp_path / "model.safetensors")
    assert_same(read_all(tmp_path), expected)


def test_every_type_the_library_writes_is_known():
    known = set(DTYPES)
    missing = [dtype for dtype in safetensors.torch._TYPES.values() if dtype not in known]
    assert not missing


def test_a_read_tensor_is_new_memory(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save(tensors, tmp_path / "model.bin")
    for name in ("model.safetensors", "model.bin"):
        with open_checkpoint(tmp_path / name) as checkpoint:
            checkpoint.read("w").zero_()
            assert torch.equal(checkpoint.read("w"), tensors["w"])


def test_order_is_that_of_the_bytes_not_of_the_header(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "a": f32(8, 12, 1), "b": f32(4, 8, 1), "c": f32(0, 4, 1)}
    path = write_raw(tmp_path / "x.safetensors", header, torch.tensor([1.0, 2.0, 3.0]).numpy().tobytes())
    assert [(name, tensor.item()) for name, tensor in read_all(path).items()] == [("c", 1), ("b", 2), ("a", 3)]


def test_shards_come_in_the_order_of_their_file_names(tmp_path):
    save_file({"z": torch.ones(1)}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": torch.ones(1)}, tmp_path / "model-00002-of-00002.safetensors")
    weight_map = {"a": "model-00002-of-00002.safetensors", "z": "model-00001-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert tuple(read_all(tmp_path)) == ("z", "a")


def test_reads_shards_of_transformers(bert):
    expected = {}
    for shard in bert.glob("model-*.safetensors"):
        expected.update(load_file(shard))
    assert_same(read_all(bert), expected)
    assert_same(read_all(bert / "model.safetensors.index.json"), expected)


def test_a_read_longer_than_the_kernel_gives_at_once(tmp_path, monkeypatch, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    assert_same(read_all(tmp_path), tensors)


def test_a_file_cut_off_while_open(tmp_path, tensors):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 8)
        with pytest.raises(CheckpointError, match="model.safetensors was cut off while '(scale|w)' was being read"):
            for name in checkpoint.names:
                checkpoint.read(name)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8], ids=str)
def test_reads_bin(tmp_path, dtype, legacy):
    expected = {"x": sample(dtype, 6, 4), "transposed": sample(dtype, 3, 5).t(), "scalar": sample(dtype)}
    torch.save(expected, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=not legacy)
    found = read_all(tmp_path)
    assert tuple(found) == tuple(expected)
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert_same(found, expected)


def test_reads_sharded_bin(tmp_path, tensors):
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"pytorch_model-{i}.bin"
        torch.save({name: tensor}, tmp_path / weight_map[name])
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert_same(read_all(tmp_path), tensors)


def test_bin_tells_tied_tensors_from_neighbours_in_one_storage(tmp_path):
    flat = torch.randn(12)
    expected = {"embed": flat[:6], "head": flat[:6], "next": flat[6:], "shaped": flat[:6].view(2, 3)}
    expected |= {"none": torch.empty(0), "also none": torch.empty(0)}  # without memory there is none to share
    torch.save(expected, tmp_path / "pytorch_model.bin")
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.names == ("embed", "next", "shaped", "none", "also none")
        assert checkpoint.tied == {"head": "embed"}
        assert torch.equal(checkpoint.read("head"), flat[:6])
        assert checkpoint.shape("head") == (6,)


def test_bin_is_mapped_again_and_still_right(tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(state_dicts, "MAX_MAPPED_BYTES", 1)
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert_same(read_all(tmp_path), tensors)


def test_bin_replaced_while_open(tmp_path, monkeypatch, tensors):
    monkeypatch.setattr(state_dicts, "MAX_MAPPED_BYTES", 1)
    torch.save(tensors, tmp_path / "a.bin")
    torch.save(tensors | {"w": torch.zeros(7, 5)}, tmp_path / "b.bin")
    with open_checkpoint(tmp_path / "a.bin") as checkpoint:
        os.replace(tmp_path / "b.bin", tmp_path / "a.bin")
        with pytest.raises(CheckpointError, match="a.bin changed while it was being read"):
            checkpoint.read("w")


class CreatesFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path, tensors, legacy):
    target = tmp_path / "created"
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors | {"x": CreatesFile(target)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin.*mkdir.*never run.*convert to safetensors") as caught:
        open_checkpoint(tmp_path)
    assert "weights_only" not in str(caught.value)
    assert not target.exists()
    torch.load(path, weights_only=False)
    assert target.exists(), "the pickle is harmless, so that this test shows nothing"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("keep", [0, 3, 100, -100])
def test_truncated_bin(tmp_path, tensors, keep, legacy):
    path = tmp_path / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=not legacy)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="pytorch_model.bin.*(truncated|damaged)"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        ([torch.ones(1)], "holds a list, not a state dict"),
        ({"state_dict": {"w": torch.ones(1)}, "epoch": 3}, "'state_dict' is a dict.*state dict by itself"),
        ({"w": torch.ones(1), "step": 3}, "'step' is a int"),
        ({"w": torch.eye(3).to_sparse()}, "'w' is sparse"),
    ],
    ids=["list", "training state", "number", "sparse"],
)
def test_bin_that_is_no_state_dict(tmp_path, content, message):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=f"pytorch_model.bin.*{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 60, -1])
def test_truncated_safetensors(tmp_path, tensors, keep):
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="model.safetensors: .* the file has .*download it or save it again"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "header, data_bytes, message",
    [
        (b"{not json", 0, "not valid JSON"),
        (b"\xff\xfe{}", 0, "not valid JSON"),
        (b"[" * 100_000, 0, "not valid JSON"),
        (b"[1]", 0, "not a JSON object"),
        (b'{"a": {}, "a": {}}', 0, "names 'a' twice"),
        ({"a": 3}, 0, "'a' lacks a valid"),
        ({"a": {"dtype": "F32", "shape": [1]}}, 4, "'a' lacks a valid"),
        ({"a": f32(0, 4, True)}, 4, "'a' lacks a valid"),
        ({"a": f32(4, 8, -1)}, 8, "'a' lacks a valid"),
        ({"a": f32(0, 4, 1) | {"dtype": "Q5"}}, 4, "'a' has type Q5.*convert it to one of F64"),
        ({"a": f32(0, 4, 2)}, 4, r"'a', F32 \[2\], takes 8 bytes and its data_offsets span 4"),
        ({"a": f32(0, 4, 1), "b": f32(4, 12, 2)}, 8, "'b' should end at byte"),
        ({"a": f32(0, 4, 1), "b": f32(8, 12, 1)}, 12, "'b' begins at byte.*after a gap"),
        ({"a": f32(4, 8, 1)}, 8, "'a' begins at byte.*after a gap"),
        ({"a": f32(0, 8, 2), "b": f32(4, 12, 2)}, 12, "'b' begins at byte.*inside the tensor before it"),
        ({"a": f32(0, 4, 1)}, 7, "3 bytes at its end belong to no tensor"),
        ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "'a' has an odd number of F4"),
    ],
)
def test_header_that_lies(tmp_path, header, data_bytes, message):
    path = write_raw(tmp_path / "model.safetensors", header, bytes(data_bytes))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert str(path) in str(caught.value)


def test_header_longer_than_the_format_allows(tmp_path):
    path = write_raw(tmp_path / "model.safetensors", {}, length=200_000_000)
    os.truncate(path, 300_000_000)  # sparse: takes no space
    with pytest.raises(CheckpointError, match="more than the format's"):
        open_checkpoint(path)


def test_git_lfs_pointer(tmp_path):
    for name in ("model.safetensors", "pytorch_model.bin"):
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
        with pytest.raises(CheckpointError, match=f"{name} is a git-lfs pointer.*git lfs pull"):
            open_checkpoint(tmp_path / name)


@pytest.fixture
def sharded(tmp_path) -> Path:
    save_checkpoint(tmp_path / "m", {"a": torch.ones(4), "b": torch.ones(4)}, shard_size=16)
    return tmp_path / "m"


def edit_index(folder: Path, edit) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    edit(index["weight_map"])
    path.write_text(json.dumps(index))


def test_index_names_a_missing_shard(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors is missing.*'b'"):
        open_checkpoint(sharded)


def test_index_names_a_tensor_that_its_shard_lacks(sharded):
    edit_index(sharded, lambda weight_map: weight_map.update(c="model-00001-of-00002.safetensors"))
    with pytest.raises(CheckpointError, match="index.json places 'c' in model-00001-of-00002.safetensors"):
        open_checkpoint(sharded)


def test_tensor_in_two_shards(sharded):
    save_file({"a": torch.ones(4), "b": torch.ones(4)}, sharded / "model-00002-of-00002.safetensors")
    with pytest.raises(CheckpointError, match="'a' is in both .*model-00001-of-00002.* and .*model-00002-of-00002"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("shard", ["../outside.safetensors", "/outside.safetensors", ""])
def test_index_leads_out_of_its_folder(sharded, shard):
    edit_index(sharded, lambda weight_map: weight_map.update(a=shard))
    with pytest.raises(CheckpointError, match="index.json.*is outside of its folder"):
        open_checkpoint(sharded)


@pytest.mark.parametrize("text, message", [("{", "not valid JSON"), ("[]", "JSON list"), ("{}", "no weight_map")])
def test_bad_index(sharded, text, message):
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"model.safetensors.index.json.*{message}"):
        open_checkpoint(sharded)


def test_safetensors_come_before_bin(tmp_path):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    torch.save({"x": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    assert read_all(tmp_path)["x"] == 1


def test_folder_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match="holds none of model.safetensors.*download"):
        open_checkpoint(tmp_path)
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match="by name: other.safetensors"):
        open_checkpoint(tmp_path)
    assert read_all(tmp_path / "other.safetensors")["x"] == 1


def test_path_that_is_nothing_readable(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder nor a file; download"):
        open_checkpoint(tmp_path / "bert-base")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="model.onnx: a weight file ends in"):
        open_checkpoint(tmp_path / "model.onnx")
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="model.gguf is a GGUF file: .* `samerge from-gguf model.gguf"):
        open_checkpoint(tmp_path / "model.gguf")


def test_adapter(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    save_file({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match="PEFT adapter.*as an expert of its base.*merge_and_unload"):
            open_checkpoint(path)


def test_unknown_tensor(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        for method in (checkpoint.shape, checkpoint.dtype, checkpoint.read):
            with pytest.raises(CheckpointError, match=f"{tmp_path} has no tensor 'v'"):
                method("v")


def test_files_are_closed(sharded):
    def open_files():
        return [os.readlink(link) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]

    with open_checkpoint(sharded) as checkpoint:
        checkpoint.read("a")
        assert any(str(sharded) in name for name in open_files())
    (sharded / "model-00002-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        open_checkpoint(sharded)
    assert not any(str(sharded) in name for name in open_files())


def growth_while_reading(folder: Path) -> int:
    """Bytes of memory, at most."""
    give_freed_tensors_back()
    with open_checkpoint(folder) as checkpoint:
        with PeakMemory() as peak:
            for name in checkpoint.names:
                checkpoint.read(name)
    return peak.rise


@pytest.mark.parametrize("name, allowed_mb", [("model.safetensors", 16 + 8), ("pytorch_model.bin", 64 + 16 + 16 + 8)])
def test_memory_stays_at_one_tensor(tmp_path, name, allowed_mb):
    """In tensors of 16 MiB, 304 MiB of safetensors or 160 of .bin, of which up to 64 + 16 stay mapped."""
    size = 16 << 20
    if name == "model.safetensors":
        header = {f"t{i}": f32(i * size, (i + 1) * size, size // 4) for i in range(19)}
        path = write_raw(tmp_path / name, header)
        os.truncate(path, path.stat().st_size + 19 * size)
    else:
        torch.save({f"t{i}": torch.zeros(size // 4) for i in range(10)}, tmp_path / name)
    assert 15 < in_a_process(growth_while_reading, tmp_path) / 2**20 < allowed_mb


def test_read_config(bert, tmp_path):
    assert read_config(bert)["hidden_size"] == 32
    assert read_config(bert / "model.safetensors.index.json")["hidden_size"] == 32
    with pytest.raises(CheckpointError, match="config.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        read_config(tmp_path)
