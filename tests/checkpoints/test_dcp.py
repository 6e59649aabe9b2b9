"""Checkpoints of torch.distributed.checkpoint, read as models: of one process and of several; and what in them is refused."""

import io
import os
import pickle
import zipfile

import processes
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoints_of_torch import save, tensors
from folders import assert_same, read_all
from helpers import assert_close
from torch.distributed.checkpoint import metadata as torchs

from samerge_ext.checkpoints.dcp_writing import save_dcp
from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import save_checkpoint
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination


@pytest.mark.parametrize("options", [{}, {"single_file_per_rank": False}, {"thread_count": 2}], ids=["one file", "many", "two"])
@pytest.mark.parametrize(
    "state",
    [
        lambda model: model,
        lambda model: {"model": model, "step": 3, "optimizer": {"state": {"w": {"exp_avg": torch.ones(3)}}}},
        lambda model: {"app": {"model": model, "optim": {"state": {"w": {"exp_avg": torch.ones(3)}}}}},
        lambda model: {**model, "train_state": io.BytesIO(b"x"), "optimizer": {"state": {"w": {"exp_avg": torch.ones(3)}}}},
    ],
    ids=["by itself", "under model", "under app.model", "beside an optimizer"],
)
def test_the_models_tensors_are_read(tmp_path, state, options):
    folder = save(state(tensors()), tmp_path / "dcp", **options)
    assert_same(read_all(folder), tensors())
    assert_same(read_all(folder / ".metadata"), tensors())


@pytest.mark.parametrize("start", [0, 1, 6, 17])
@pytest.mark.parametrize("count", [1, 4, 18])
def test_some_numbers_of_a_tensor(tmp_path, start, count):
    save(tensors(), tmp_path / "dcp")
    with open_checkpoint(tmp_path / "dcp") as checkpoint:
        for name in ("layers.0.weight", "turned"):
            expected = tensors()[name].reshape(-1)[start : start + count]
            out = torch.full_like(expected, torch.nan)
            checkpoint.read_into(name, start, out)
            assert torch.equal(out, expected), name


def as_megatron(folder):
    """Of what torch wrote, the form of Megatron-Core 0.16: no paths to tensors, every rank's plan, and common.pt."""
    from torch.distributed.checkpoint import planner

    with open(folder / ".metadata", "rb") as file:
        metadata = pickle.load(file)
    metadata.planner_data = None
    chunk = torchs.ChunkStorageMetadata(offsets=torch.Size([0]), sizes=torch.Size([3]))
    of_tensor = planner.TensorWriteData(chunk=chunk, properties=torchs.TensorProperties(), size=torch.Size([3]))
    items = [
        planner.WriteItem(index=torchs.MetadataIndex("a"), type=planner.WriteItemType.SHARD, tensor_data=of_tensor),
        planner.WriteItem(
            index=torchs.MetadataIndex("b"), type=planner.WriteItemType.BYTE_IO, bytes_io_data=planner.BytesIOWriteData(nbytes=3)
        ),
    ]
    metadata.all_local_plans = [planner.SavePlan(items=items, storage_data=None, planner_data=None)]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    torch.save({"iteration": 3}, folder / "common.pt")
    return folder


def test_a_checkpoint_of_megatron_is_read_and_merged(tmp_path):
    of_optimizer = {f"{of}optimizer.state.exp_avg.scale": torch.ones(3) for of in ("", "chained_1.")}
    extra = {"layers.0._extra_state/shard_0_1": io.BytesIO(b"x")}
    folders = [as_megatron(save({**tensors(), **of_optimizer, **extra}, tmp_path / name)) for name in ("base", "expert")]
    base, expert = folders
    assert_same(read_all(base), tensors())
    merge_files(FileMerge([("task", expert)], lambda *_: Combination([0.5]), base, base), tmp_path / "merged")
    assert (tmp_path / "merged" / "common.pt").read_bytes() == (base / "common.pt").read_bytes()
    save_dcp(tmp_path / "merged", tmp_path / "again", key=None)
    assert {"common.pt", "metadata.json"} <= {path.name for path in (tmp_path / "again").iterdir()}
    assert_same(read_all(tmp_path / "again"), tensors())


def test_numbers_that_are_stored_as_their_conjugates(tmp_path):
    mirrored = torch.randn(4, 3, dtype=torch.complex64).conj()
    save({"w": mirrored}, tmp_path / "dcp")
    assert torch.equal(read_all(tmp_path / "dcp")["w"], mirrored)


def write_sharded(folder):
    """As two processes: rows of a tensor, columns of one, and a whole one; and a module of FSDP's with its optimizer."""
    from torch.distributed.checkpoint.state_dict import get_state_dict
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    child = os.fork()
    rank = int(child == 0)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    placements = {"layers.0.weight": Shard(0), "turned": Shard(1), "part": Replicate(), "ids": Shard(0)}
    state = {name: distribute_tensor(tensors()[name].contiguous(), mesh, [place]) for name, place in placements.items()}
    dcp.save({"model": {**state, "scale": tensors()["scale"]}}, checkpoint_id=folder / "tensors")
    module = sharded_module()
    for layer in module:
        fully_shard(layer, mesh=mesh)
    fully_shard(module, mesh=mesh)
    optimizer = torch.optim.Adam(module.parameters())
    model, state_of_optimizer = get_state_dict(module, optimizer)
    dcp.save({"model": model, "optim": state_of_optimizer}, checkpoint_id=folder / "fsdp")
    dist.destroy_process_group()
    if child == 0:
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def sharded_module():
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Linear(7, 3, bias=False))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    processes.in_a_process(write_sharded, folder)
    return folder


def test_parts_of_two_processes_are_one_tensor(sharded):
    expected = {name: tensors()[name].contiguous() for name in ("layers.0.weight", "turned", "part", "ids", "scale")}
    assert len(list((sharded / "tensors").glob("*.distcp"))) == 2
    assert_same(read_all(sharded / "tensors"), expected)
    with open_checkpoint(sharded / "tensors") as checkpoint:
        for name, tensor in expected.items():
            for start in range(tensor.numel()):
                out = torch.empty(min(3, tensor.numel() - start), dtype=tensor.dtype)
                checkpoint.read_into(name, start, out)
                assert torch.equal(out, tensor.reshape(-1)[start : start + 3]), (name, start)


def test_a_training_state_of_fsdp_is_merged(sharded, tmp_path):
    expert = sharded_module().state_dict()
    assert_same(read_all(sharded / "fsdp"), expert)
    base = save_checkpoint(tmp_path / "base", {name: torch.ones_like(tensor) for name, tensor in expert.items()})
    half = Combination([0.5])
    merge_files(FileMerge([("task", sharded / "fsdp")], lambda *_: half, base, base), tmp_path / "out")
    for name, tensor in read_all(tmp_path / "out").items():
        assert_close(tensor, 0.5 + 0.5 * expert[name].double())


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


@pytest.mark.parametrize("where", ["state_dict_metadata", "planner_data", "storage_data", "storage_meta"])
def test_code_in_metadata_is_never_run(tmp_path, monkeypatch, where):
    monkeypatch.chdir(tmp_path)
    save({"model": tensors()}, tmp_path / "dcp")
    content = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    if isinstance(getattr(content, where), dict):
        getattr(content, where)["x"] = Evil()
    else:
        setattr(content, where, Evil())
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(content))
    message = r"dcp/.metadata refers to posix.mkdir, which torch.distributed.checkpoint does not write for tensors, and code"
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "dcp")
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("called", [b"cbuiltins\neval\n(S'1'\ntR.", b"ctorch\nload\n(S'x'\ntR.", b"ctorch.serialization\nos\n."])
def test_what_is_no_class_of_metadata_is_refused(tmp_path, called):
    (tmp_path / ".metadata").write_bytes(called)
    with pytest.raises(CheckpointError, match=r"\.metadata refers to \w+"):
        open_checkpoint(tmp_path)


def test_code_in_a_part_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"w": torch.ones(3)}, tmp_path / "dcp")
    torch.save([Evil(), torch.ones(3)], evil := io.BytesIO())
    (tmp_path / "dcp/__0_0.distcp").write_bytes(evil.getvalue())
    content = pickle.loads((tmp_path / "dcp/.metadata").read_bytes())
    (place,) = content.storage_data.values()
    place.offset, place.length = 0, len(evil.getvalue())
    (tmp_path / "dcp/.metadata").write_bytes(pickle.dumps(content))
    with open_checkpoint(tmp_path / "dcp") as checkpoint, pytest.raises(CheckpointError, match="'w' is stored with code"):
        checkpoint.read("w")
    assert not (tmp_path / "evil").exists()


def changed(folder, change):
    """The checkpoint's metadata, changed as torch's own classes."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    change(content, content.state_dict_metadata["w"], next(iter(content.storage_data.values())))
    (folder / ".metadata").write_bytes(pickle.dumps(content))


def set_size(content, tensor, place):
    tensor.size = torch.Size([4, 3])


def set_outside(content, tensor, place):
    tensor.chunks[0].offsets = torch.Size([1, 0])
    (index,) = content.storage_data
    content.storage_data = {torchs.MetadataIndex("w", [1, 0]): place}


def set_twice(content, tensor, place):
    tensor.size = torch.Size([10, 3])
    tensor.chunks.append(tensor.chunks[0])


def set_nowhere(content, tensor, place):
    content.storage_data = {}


def set_file(content, tensor, place):
    place.relative_path = "../../secret"


def set_missing(content, tensor, place):
    place.relative_path = "__7_0.distcp"


def set_beyond(content, tensor, place):
    place.length += 10**6


def set_compressed(content, tensor, place):
    place.transform_descriptors = ["zstd"]


def set_none(content, tensor, place):
    content.planner_data = {"w": ("optimizer", "w")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_size, r"the parts of 'w' do not have the numbers of \[4, 3\]"),
        (set_outside, r"a part of 'w' lies outside of \[5, 3\]"),
        (set_twice, "two parts of 'w' have numbers in common"),
        (set_nowhere, r"does not say where the part of 'w' at \[0, 0\] lies"),
        (set_file, "'../../secret' is outside of its folder"),
        (set_missing, "__7_0.distcp is missing; .*.metadata places tensors in it"),
        (set_beyond, "__0_0.distcp is cut off: 'w' should end at byte"),
        (set_compressed, r"'w' is written through \['zstd'\], which is not read here"),
        (set_none, "describes no model's tensors, but 'optimizer'; save the model's state dict"),
    ],
)
def test_metadata_that_do_not_describe_whole_tensors_are_refused(tmp_path, change, message):
    save({"w": torch.randn(5, 3)}, tmp_path / "dcp")
    changed(tmp_path / "dcp", change)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path / "dcp")


def another_type(content, tensor, place):
    tensor.properties.dtype = torch.int32


def another_shape(content, tensor, place):
    tensor.size = tensor.chunks[0].sizes = torch.Size([3, 5])


@pytest.mark.parametrize("change", [another_type, another_shape])
def test_a_part_that_is_another_tensor_is_refused(tmp_path, change):
    save({"w": torch.randn(5, 3)}, tmp_path / "dcp")
    changed(tmp_path / "dcp", change)
    with open_checkpoint(tmp_path / "dcp") as checkpoint, pytest.raises(CheckpointError, match="'w' is damaged.*.metadata says"):
        checkpoint.read("w")


def test_a_compressed_part_is_refused(tmp_path):
    save({"w": torch.zeros(500, 300)}, tmp_path / "dcp")
    path = tmp_path / "dcp/__0_0.distcp"
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)

    def shorter(content, tensor, place):
        place.length = path.stat().st_size

    changed(tmp_path / "dcp", shorter)
    with open_checkpoint(tmp_path / "dcp") as checkpoint, pytest.raises(CheckpointError, match="its archive is compressed"):
        checkpoint.read("w")


def test_a_folder_above_says_which_one_it_is(tmp_path):
    save(tensors(), tmp_path / "pytorch_model_fsdp_0")
    with pytest.raises(CheckpointError, match="pass one of the models in it: pytorch_model_fsdp_0"):
        open_checkpoint(tmp_path)
    (tmp_path / "pytorch_model_fsdp_0/.metadata").unlink()
    with pytest.raises(CheckpointError, match=r"torch.distributed.checkpoint without its \.metadata: copy that too"):
        open_checkpoint(tmp_path)
