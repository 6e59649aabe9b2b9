"""Writing model folders and files: whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections import namedtuple
from pathlib import Path

import pytest
import safetensors
import torch
from folders import DTYPES, assert_same, read_all, sample, save_bert, some_tensors
from safetensors.torch import load_file, save_file

from samerge_ext.checkpoints import saving as checkpoint_saving
from samerge_ext.checkpoints.companions import copy_companions
from samerge_ext.checkpoints.folder import open_checkpoint, read_config
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import atomic_write, require_space, require_target, save_checkpoint

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> Path:
    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return some_tensors()


def test_companions_without_weights_and_training_state(tmp_path):
    wanted = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.txt",
        "vocab.json",
        "merges.txt",
        "added_tokens.json",
        "special_tokens_map.json",
        "spiece.model",
        "sentencepiece.bpe.model",
        "preprocessor_config.json",
        "processor_config.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
    }
    unwanted = {
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "training_args.bin",
        "all_results.json",
        "README.md",
        "runs/events.out",
    }
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    for name in wanted | unwanted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(name)
    assert set(copy_companions(source / "model.safetensors", out)) == wanted
    copied = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    assert copied == {name: name for name in wanted}
    with pytest.raises(CheckpointError, match="absent is not a folder"):
        copy_companions(tmp_path / "absent", out)


@pytest.mark.parametrize("as_iterable", [False, True], ids=["mapping", "iterable"])
@pytest.mark.parametrize("shard_size", ["5GB", 200, "0.1 KB", 1])
def test_saved_folder_reads_back(tmp_path, shard_size, as_iterable):
    expected = {f"x.{dtype}": sample(dtype, 3, 8) for dtype in DTYPES}
    given = iter(expected.items()) if as_iterable else expected
    assert save_checkpoint(tmp_path / "new" / "out", given, shard_size=shard_size) == tmp_path / "new" / "out"
    assert_same(read_all(tmp_path / "new" / "out"), expected)
    shards = list((tmp_path / "new" / "out").glob("*.safetensors"))
    if shard_size == "5GB":
        assert [shard.name for shard in shards] == ["model.safetensors"]
    else:
        limit = {200: 200, "0.1 KB": 100, 1: 192}[shard_size]  # 192 bytes: the largest tensor alone
        assert len(shards) > 2
        assert all(load_file(shard) for shard in shards), "an empty shard"
        assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= max(limit, 192) for shard in shards)
    for shard in shards:
        with safetensors.safe_open(shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("shard_size", ["5GB", "30KB"])
def test_transformers_loads_what_is_saved(bert, tmp_path, shard_size):
    from transformers import AutoModelForMaskedLM

    model = AutoModelForMaskedLM.from_pretrained(bert)
    expected = {name: torch.randn_like(tensor) for name, tensor in read_all(bert).items()}
    save_checkpoint(tmp_path / "out", expected, companions_from=bert, shard_size=shard_size)
    loaded, report = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    state = loaded.state_dict()
    assert_same({name: state[name] for name in expected}, expected)
    assert loaded.config.hidden_size == model.config.hidden_size


def test_saves_views_of_one_buffer_and_strided_tensors(tmp_path):
    flat = torch.randn(100)
    expected = {"a": flat[:20].view(4, 5), "b": flat[32:52], "t": torch.randn(3, 4).t()}
    save_checkpoint(tmp_path / "out", expected)
    assert_same(read_all(tmp_path / "out"), {name: tensor.contiguous() for name, tensor in expected.items()})


def test_metadata_and_extra_files(tmp_path, bert, tensors):
    extra = {"README.md": "# é", "heads/news.safetensors": b"\0\1", "config.json": "{}"}
    save_checkpoint(tmp_path / "out", tensors, metadata={"method": "x"}, extra_files=extra, companions_from=bert)
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "method": "x"}
    assert (tmp_path / "out" / "README.md").read_text(encoding="utf-8") == "# é"
    assert (tmp_path / "out" / "heads" / "news.safetensors").read_bytes() == b"\0\1"
    assert read_config(tmp_path / "out") == {}, "an extra file wins over a companion"


@pytest.mark.parametrize(
    "name, message",
    [("../x", "outside"), ("/x", "outside"), ("model.safetensors", "subfolder"), ("a.safetensors", "subfolder")],
)
def test_extra_files_stay_inside_and_off_the_weights(tmp_path, tensors, name, message):
    with pytest.raises(CheckpointError, match=f"extra file '{name}'.*{message}"):
        save_checkpoint(tmp_path / "out", tensors, extra_files={name: b""})
    assert not list(tmp_path.iterdir())


def test_files_get_the_usual_permissions(tmp_path, tensors):
    previous = os.umask(0o027)
    try:
        save_checkpoint(tmp_path / "out", tensors, extra_files={"x.json": "{}"})
    finally:
        os.umask(previous)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_existing_target(tmp_path, tensors):
    out = tmp_path / "out"
    out.mkdir()
    save_checkpoint(out, tensors)  # an empty folder is no obstacle
    (out / "stale.txt").write_text("")
    with pytest.raises(CheckpointError, match=f"{out} exists and is not empty.*overwrite=True"):
        save_checkpoint(out, {"y": torch.ones(1)})
    with pytest.raises(CheckpointError, match=f"{out} exists and is not empty.*overwrite=True"):
        require_target(out)
    require_target(out, overwrite=True)
    require_target(tmp_path / "new")
    assert_same(read_all(out), tensors)
    save_checkpoint(out, {"y": torch.ones(1)}, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["model.safetensors"]
    assert tuple(read_all(out)) == ("y",)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwriting_the_folder_that_is_being_read(tmp_path, tensors):
    out = tmp_path / "out"
    save_checkpoint(out, tensors, extra_files={"config.json": "{}"})
    with open_checkpoint(out) as checkpoint:
        doubled = ((name, 2 * checkpoint.read(name)) for name in checkpoint.names)
        save_checkpoint(out, doubled, companions_from=out, overwrite=True)
    assert_same(read_all(out), {name: 2 * tensor for name, tensor in tensors.items()})
    assert read_config(out) == {}


def test_overwrite_deletes_only_model_folders(tmp_path, tensors):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(CheckpointError, match="thesis is not a model folder"):
        save_checkpoint(tmp_path / "thesis", tensors, overwrite=True)
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="file is a file"):
        save_checkpoint(tmp_path / "file", tensors, overwrite=True)
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == (tmp_path / "file").read_text() == "x"


def test_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch, tensors):
    out = save_checkpoint(tmp_path / "out", tensors)
    rename = os.rename

    def fails(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, "broken")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    with pytest.raises(OSError, match="broken"):
        save_checkpoint(out, {"y": torch.ones(1)}, overwrite=True)
    assert_same(read_all(out), tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("existing", [False, True])
def test_interruption_leaves_nothing(tmp_path, tensors, interruption, existing):
    out = tmp_path / "out"
    if existing:
        save_checkpoint(out, tensors)

    def interrupted():
        yield "a", torch.ones(4)
        yield "b", torch.ones(4)
        assert any(tmp_path.glob(".out.*/*.safetensors")), "nothing is half-written yet"
        raise interruption

    with pytest.raises(interruption):
        save_checkpoint(out, interrupted(), shard_size=16, overwrite=existing)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * existing
    if existing:
        assert_same(read_all(out), tensors)


@pytest.mark.parametrize(
    "bad, message",
    [
        ([], "there are no tensors"),
        ([("a", torch.ones(1)), ("a", torch.ones(1))], "two tensors are called 'a'"),
        ({"a": torch.ones(1, dtype=torch.complex128)}, "'a' .*complex128.*has no form in safetensors"),
        ({"a": torch.ones(1, device="meta")}, "'a' .*on meta.*has no form"),
        ({"a": torch.eye(3).to_sparse()}, "'a' .*sparse.*has no form"),
        (dict.fromkeys(("a", "b"), torch.ones(3)), "share memory, pass one of their names"),
    ],
    ids=["empty", "twice", "complex128", "meta", "sparse", "tied"],
)
def test_tensors_that_cannot_be_saved(tmp_path, bad, message):
    with pytest.raises(CheckpointError, match=message) as caught:
        save_checkpoint(tmp_path / "out", bad)
    assert str(tmp_path / "out") in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["5", "GB", "-1GB", 0, 1.5, "0KB"])
def test_bad_shard_size(tmp_path, tensors, size):
    with pytest.raises(ValueError, match="shard_size"):
        save_checkpoint(tmp_path / "out", tensors, shard_size=size)


@pytest.mark.parametrize("as_iterable", [False, True], ids=["mapping", "iterable"])
def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch, as_iterable):
    monkeypatch.setattr(checkpoint_saving.shutil, "disk_usage", lambda path: DiskUsage(1000, 901, 99))
    monkeypatch.setattr(checkpoint_saving, "save_file", lambda *arguments: pytest.fail("wrote without space"))
    tensors = {"a": torch.ones(25)}
    with pytest.raises(CheckpointError, match=f"{tmp_path}/out: 100 bytes are needed, 99 bytes are free"):
        save_checkpoint(tmp_path / "out", iter(tensors.items()) if as_iterable else tensors)
    assert not list(tmp_path.iterdir())
    with pytest.raises(CheckpointError, match="new/deep: 100 bytes are needed"):
        require_space(tmp_path / "new" / "deep", 100)
    require_space(tmp_path / "new" / "deep", 99)


def test_disk_that_fills_up_while_shards_are_written(tmp_path, monkeypatch):
    def full(tensors, path, metadata):
        if "b" in tensors:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(checkpoint_saving, "save_file", full)
    with pytest.raises(CheckpointError, match=r"no space to write .*out: 32 bytes are needed, \d+ bytes are free"):
        save_checkpoint(tmp_path / "out", {"a": torch.ones(4), "b": torch.ones(4)}, shard_size=16)
    assert not list(tmp_path.iterdir())


FILL = """
    import shutil, sys
    from collections import namedtuple
    import torch
    from samerge_ext.checkpoints.reading import CheckpointError
    from samerge_ext.checkpoints.saving import atomic_write, save_checkpoint

    shutil.disk_usage = lambda path: namedtuple("Usage", "free")(1 << 40)
    for tensors in ({"a": torch.ones(1 << 19)}, {"a": torch.ones(1 << 17), "b": torch.ones(1 << 18)}):
        try:
            save_checkpoint(sys.argv[1] + "/out", tensors, shard_size=1 << 20)
        except CheckpointError as error:
            print(error)
    try:
        with atomic_write(sys.argv[1] + "/state.pt") as file:
            torch.save({"a": torch.ones(1 << 19)}, file)
    except CheckpointError as error:
        print(error)
"""


def test_a_disk_that_is_really_full(tmp_path):
    """The messages of the real library and kernel, in a 1 MiB file system of a private mount namespace."""
    mount = ["unshare", "--mount", "--map-root-user", "sh", "-c", 'mount -t tmpfs -o size=1m none "$0" && exec "$@"']
    inside = 'python="$1"; "$python" -c "$2" "$0" && ls -A "$0"'
    if not shutil.which("unshare") or subprocess.run([*mount, str(tmp_path), "true"], capture_output=True).returncode:
        pytest.skip("this system lets no user mount a file system of their own")
    command = [*mount, str(tmp_path), "sh", "-c", inside, str(tmp_path), sys.executable, textwrap.dedent(FILL)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"no space to write {tmp_path}/out",
        f"no space to write {tmp_path}/out",
        f"no space to write {tmp_path}/state.pt",
    ], "anything beyond these lines is a file left behind"


def test_atomic_write(tmp_path):
    path = tmp_path / "new" / "state.pt"
    with atomic_write(path) as file:
        torch.save({"a": torch.ones(2)}, file)
        assert not path.exists()
    assert torch.equal(torch.load(path)["a"], torch.ones(2))
    with atomic_write(path, "w") as file:
        file.write("é")
    assert path.read_bytes() == "é".encode()
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, ValueError])
def test_interrupted_atomic_write_keeps_the_old_file(tmp_path, interruption):
    path = tmp_path / "state.json"
    path.write_text("old")
    with pytest.raises(interruption):
        with atomic_write(path, "w") as file:
            file.write("half")
            file.flush()
            raise interruption
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_atomic_write_on_a_full_disk(tmp_path, size):
    path = tmp_path / "state.pt"
    with pytest.raises(CheckpointError, match=r"no space to write .*state.pt: \d+ bytes are free"):
        with atomic_write(path) as file:
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, file.fileno())
            os.close(full)
            torch.save({"a": torch.ones(size)}, file)
    assert not list(tmp_path.iterdir())


def test_full_disk_behind_the_exception_of_a_library(tmp_path):
    with pytest.raises(CheckpointError, match="no space to write .*state.pt"):
        with atomic_write(tmp_path / "state.pt"):
            try:
                raise OSError(errno.ENOSPC, "No space left on device")
            finally:
                raise RuntimeError("unexpected pos 704 vs 598")
    with pytest.raises(RuntimeError, match="unexpected"):
        with atomic_write(tmp_path / "state.pt"):
            raise RuntimeError("unexpected pos, and space to spare")
