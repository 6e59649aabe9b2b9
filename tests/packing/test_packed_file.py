"""Packed files: the numbers that packing in memory gives, in a file that is checked when it is opened."""

import os

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

import samerge_ext as sm
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.memory import PeakMemory
from samerge_ext.packing import into_file, into_memory, stores
from samerge_ext.packing.packed_file import PackedFileWriter
from samerge_ext.packing.quantised import FORMATS
from samerge_ext.packing.stores import parts

QUANTISED = [{"task_vector_dtype": form} for form in FORMATS]


@pytest.fixture
def folders(tmp_path):
    base = tiny.make(0, torch.float32)
    for name, module in {"base": base, **tiny.make_experts(base)}.items():
        save(tmp_path / name, dict(module.state_dict()))
    return tmp_path / "base", {task: tmp_path / task for task in tiny.TASKS}


def save(folder, tensors):
    folder.mkdir(exist_ok=True)
    tensors = {n: t.contiguous() for n, t in tensors.items() if n != "tied.weight"}
    if folder.name != "base":
        tensors["head.weight"] = torch.randn(3, 2)
    save_file(tensors, folder / "model.safetensors")


def pack(folders, **settings):
    return sm.PackedWeights.from_folders(*folders, heads="head.*", **settings)


def test_what_leaves_the_range_of_its_type_is_refused(tmp_path):
    for name, value in (("base", 6e4), ("a", -6e4), ("b", 7e4)):
        save(tmp_path / name, {"w": torch.tensor([value, 1.0])})
    for base, expert, message in (("base", "a", "expert 'a' .*: 'w' minus the base's"), ("b", "a", "base .*: 'w'")):
        with pytest.raises(ValueError, match=f"{message} overflows torch.float16; set dtype to float32 or bfloat16"):
            pack((tmp_path / base, {"a": tmp_path / expert}), dtype=torch.float16, file=tmp_path / "packed")
        assert not list(tmp_path.glob("packed*"))


@pytest.mark.parametrize("dtypes", [{}, {"task_vector_dtype": torch.bfloat16}, {"dtype": torch.float64}, *QUANTISED])
def test_a_packed_file_holds_what_packing_in_memory_gives(folders, tmp_path, monkeypatch, dtypes):
    expected = pack(folders, **dtypes)
    for packed in (pack(folders, file=tmp_path / "packed", **dtypes), sm.PackedWeights.open(tmp_path / "packed")):
        assert packed.layout == expected.layout and packed.tasks == expected.tasks and packed.folder == expected.folder
        assert torch.equal(packed.layout.block_layer, expected.layout.block_layer)
        monkeypatch.setattr(stores, "READ_AT_ONCE", 2048)
        whole = packed.in_memory()
        assert torch.equal(whole.base, expected.base) and whole.experts == expected.experts
        assert packed.task_vector_form == whole.task_vector_form == expected.task_vector_form
        for part, held in parts(expected.task_vectors).items():
            assert torch.equal(parts(whole.task_vectors)[part], held)
        for field in ("unchanged", "aliases", "buffers", "expert_buffers", "heads"):
            torch.testing.assert_close(getattr(packed, field), getattr(expected, field), rtol=0, atol=0)
        coefficients = torch.rand(3, packed.layout.num_layers, dtype=packed.coefficient_dtype)
        assert torch.equal(packed.merge(coefficients), expected.merge(coefficients))
        one_by_one = dict(packed.tensors(coefficients))
        whole = expected.state_dict(expected.merge(coefficients))
        assert all(torch.equal(one_by_one[name], tensor) for name, tensor in whole.items())
    assert sorted(os.listdir(tmp_path)) == ["base", "blue", "green", "packed", "red"]


def test_weights_are_read_into_the_memory_that_is_asked_for(folders, tmp_path):
    """A GPU's, or the host's where they do not fit the GPU; `meta` stands for it, and comes last: it holds no numbers."""
    packed, expected = pack(folders, file=tmp_path / "packed"), pack(folders)
    for device in ("cpu", "meta"):
        found = packed.in_memory(device)
        for tensor in (found.base, found.task_vectors, found.layout.block_layer):
            assert tensor.device.type == device
        assert device == "meta" or torch.equal(found.task_vectors, expected.task_vectors)


def test_safetensors_reads_it_too(folders, tmp_path):
    expected = pack(folders)
    pack(folders, file=tmp_path / "packed.safetensors")
    tensors = load_file(tmp_path / "packed.safetensors")
    assert torch.equal(tensors["base"], expected.base) and torch.equal(tensors["task_vectors/1"], expected.task_vectors[1])


def test_a_file_of_the_same_folders_is_opened_and_of_others_made_again(folders, tmp_path):
    file = tmp_path / "packed"
    pack(folders, file=file)
    made = os.stat(file).st_ino
    pack(folders, file=file)
    assert os.stat(file).st_ino == made
    pack(folders, file=file, task_vector_dtype=torch.bfloat16)
    assert os.stat(file).st_ino != made
    made = os.stat(file).st_ino
    base = tiny.make(0, torch.float32)
    save(folders[1]["red"], dict(tiny.make_experts(base, scale=0.7)["red"].state_dict()))
    packed = pack(folders, file=file, task_vector_dtype=torch.bfloat16)
    assert os.stat(file).st_ino != made
    assert torch.equal(packed.in_memory().task_vectors, pack(folders, task_vector_dtype=torch.bfloat16).task_vectors)


def test_damage_truncation_and_absence_are_errors(folders, tmp_path):
    file = tmp_path / "packed"
    with pytest.raises(CheckpointError, match="packed does not exist"):
        sm.PackedWeights.open(file)
    packed = pack(folders, file=file)
    whole = file.read_bytes()
    spoilt = bytearray(whole)
    spoilt[-len(whole) // 2] ^= 4
    file.with_name("spoilt").write_bytes(spoilt)
    with pytest.raises(CheckpointError, match="is damaged, its checksum is"):
        sm.PackedWeights.open(file.with_name("spoilt"))
    file.with_name("short").write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match="should end at byte .* delete it, and it is made again from the"):
        sm.PackedWeights.open(file.with_name("short"))
    with pytest.raises(CheckpointError, match="no packed file of version"):
        sm.PackedWeights.open(folders[0] / "model.safetensors")
    os.truncate(file, len(whole) // 3)  # while it is open
    with pytest.raises(CheckpointError, match="was cut off while"):
        packed.merge(packed.coefficients(0.3))


def test_a_flipped_bit_anywhere_in_the_header_is_noticed(folders, tmp_path):
    """Whether it is in a name, an offset, a checksum or the space at its end."""
    pack(folders, file=tmp_path / "packed")
    length = 8 + int.from_bytes((tmp_path / "packed").read_bytes()[:8], "little")
    with open(tmp_path / "packed", "r+b") as file:
        for place in range(length):
            (byte,) = os.pread(file.fileno(), 1, place)
            os.pwrite(file.fileno(), bytes([byte ^ 1 << place % 8]), place)
            with pytest.raises(CheckpointError, match="packed"):
                sm.PackedWeights.open(tmp_path / "packed", verify=False)
            os.pwrite(file.fileno(), bytes([byte]), place)
    sm.PackedWeights.open(tmp_path / "packed")


def test_two_packers_of_one_file_disturb_neither(folders, tmp_path, monkeypatch):
    """The second runs from start to end in the middle of the first, with other numbers; each has what it packed."""
    write, others = PackedFileWriter.write, []

    def meanwhile(self, *arguments):
        monkeypatch.setattr(PackedFileWriter, "write", write)
        others.append(pack(folders, file=tmp_path / "packed", dtype=torch.float64))
        write(self, *arguments)

    monkeypatch.setattr(PackedFileWriter, "write", meanwhile)
    first = pack(folders, file=tmp_path / "packed")
    for found, dtype in [(first, torch.float32), (others[0], torch.float64)]:
        expected = pack(folders, dtype=dtype)
        assert torch.equal(found.in_memory().base, expected.base)
        assert torch.equal(found.in_memory().task_vectors, expected.task_vectors)
    assert sorted(os.listdir(tmp_path)) == ["base", "blue", "green", "packed", "red"]


@pytest.mark.parametrize("file", [None, "packed"])
def test_a_model_that_changes_while_it_is_packed_is_named(folders, tmp_path, monkeypatch, file):
    def touched(*arguments):
        os.utime(folders[1]["green"] / "model.safetensors", ns=(0, 0))
        return outline(*arguments)

    outline = into_memory.outline
    monkeypatch.setattr(into_memory, "outline", touched)
    monkeypatch.setattr(into_file, "outline", touched)
    with pytest.raises(CheckpointError, match="green/model.safetensors changed while it was being packed; merge again"):
        pack(folders, file=file and tmp_path / file)


def test_nothing_is_left_where_packing_fails(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("samerge_ext.packing.packed_file.os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        pack(folders, file=tmp_path / "packed")
    assert not [name for name in os.listdir(tmp_path) if name.startswith("packed")]


def test_what_needs_weights_whole_says_so(folders, tmp_path):
    packed = pack(folders, file=tmp_path / "packed")
    with pytest.raises(TypeError, match=r"stay in .*packed; what needs them whole takes packed.in_memory\(\)"):
        sm.layer_stats(packed)
    assert torch.equal(sm.layer_stats(packed.in_memory()), sm.layer_stats(pack(folders)))


def test_packing_into_a_file_holds_one_layer_at_a_time(tmp_path):
    torch.manual_seed(0)
    base = {f"layer{i}": torch.randn(1 << 20) for i in range(24)}  # 96 MiB
    save_file(base, tmp_path / "base.safetensors")
    save_file({name: tensor + 0.1 for name, tensor in base.items()}, tmp_path / "expert.safetensors")
    experts = {str(i): tmp_path / "expert.safetensors" for i in range(4)}
    del base
    with PeakMemory() as peak:
        packed = sm.PackedWeights.from_folders(tmp_path / "base.safetensors", experts, file=tmp_path / "packed")
    assert peak.rise < 64 << 20, "of 480 MiB"
    with PeakMemory() as peak:
        store = packed.store(piece=1 << 20)
        for start in range(0, packed.layout.numel, 1 << 20):
            store.fetch(start, 1 << 20)
    assert peak.rise < 64 << 20
