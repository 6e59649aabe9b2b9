"""Files that take no more time or memory than their bytes, and messages that say what to do."""

import errno
import json
import os
import time
import zipfile

import pytest
import torch

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.reading import CheckpointError, cut, explained, naming, read_json, read_text, shown


def test_repeated_names_are_found_in_one_pass(tmp_path):
    entry = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    names = [f'"t{i}":{entry}' for i in range(60_000)]
    text = ("{" + ",".join([*names, names[-1]]) + "}").encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"model.safetensors.*'t59999' twice"):
        open_checkpoint(tmp_path)
    assert time.perf_counter() - started < 10  # and not minutes


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"x" * 2000: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, r"'x{10,60}\.\.\.x+' is no tensor's name"),
        ({"a\nb": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, r"'a\\nb' is no tensor's name"),
        ({"a": {"dtype": "F32", "shape": [0, 2**40, 2**40], "data_offsets": [0, 0]}}, "more numbers than there are"),
        ({"a": {"dtype": "F32", "shape": [1] * 100, "data_offsets": [0, 4]}}, "lacks a valid dtype, shape"),
        ({"__metadata__": {"format": 1}}, "__metadata__ is not made of texts"),
    ],
)
def test_headers_that_nobody_writes(tmp_path, entry, message):
    text = json.dumps(entry).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=message) as error:
        open_checkpoint(tmp_path)
    assert len(str(error.value)) < 1000


def test_a_compressed_state_dict_is_not_unpacked(tmp_path):
    torch.save({"w": torch.zeros(1000)}, tmp_path / "sound.bin")
    with zipfile.ZipFile(tmp_path / "sound.bin") as sound, zipfile.ZipFile(tmp_path / "bomb.bin", "w") as bomb:
        for entry in sound.infolist():
            bomb.writestr(entry.filename, sound.read(entry), zipfile.ZIP_DEFLATED)
    open_checkpoint(tmp_path / "sound.bin").close()
    with pytest.raises(CheckpointError, match="bomb.bin is a compressed archive"):
        open_checkpoint(tmp_path / "bomb.bin")


def test_state_dicts_without_numbers_of_their_own(tmp_path):
    torch.save({"w": torch.zeros(1).expand(1 << 40)}, tmp_path / "expanded.bin")
    torch.save({"w": torch.zeros(1 << 40, device="meta")}, tmp_path / "meta.bin")
    for name in ("expanded.bin", "meta.bin"):
        with pytest.raises(CheckpointError, match=f"{name}: 'w' .* is without numbers, or expanded"):
            open_checkpoint(tmp_path / name)
    (tmp_path / "archive.bin").write_bytes(b"a.txt" + bytes(1019))
    with pytest.raises(CheckpointError, match="archive.bin is truncated, damaged or not of torch.save"):
        open_checkpoint(tmp_path / "archive.bin")


def test_json_and_text_have_bounds(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    for text, message in [
        ("[" * 100_000, "is not valid JSON .*nested too deeply"),
        ('{"a":' * 100 + "1" + "}" * 100, "is not valid JSON .*nested more than 64 deep"),
        ("[]", "holds a JSON list in place of an object"),
        ("9" * 5000, "is not valid JSON"),
    ]:
        path.write_text(text)
        with pytest.raises(CheckpointError, match=f"config.json {message}"):
            read_json(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(CheckpointError, match="config.json is not valid JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match="config.json is not UTF-8"):
        read_text(path)
    monkeypatch.setattr("samerge_ext.checkpoints.reading.MAX_JSON_BYTES", 8)
    with pytest.raises(CheckpointError, match="config.json has more than 8 bytes"):
        read_json(path)


def test_values_in_messages_are_short():
    for value in ("x" * 10**6, [["x" * 10**6] * 100] * 100, {i: "y" * 1000 for i in range(1000)}, 10**100_000, object()):
        assert len(shown(value)) < 2000
    assert shown("abc") == "'abc'" and shown(5) == "5" and cut("abc") == "abc"


@pytest.mark.parametrize(
    ("code", "mend"),
    [
        (errno.EACCES, "permissions"), (errno.EROFS, "another place"), (errno.ENOTDIR, "check the path"),
        (errno.ENAMETOOLONG, "shorter"), (errno.EFBIG, "ulimit -f"), (errno.EMFILE, "ulimit -n"),
    ],
)  # fmt: skip
def test_errors_of_the_system_name_the_file_and_the_mend(code, mend):
    with pytest.raises(OSError) as error, naming("some/file"):
        raise OSError(code, os.strerror(code))
    text = explained(error.value)
    assert text.startswith(f"some/file: {os.strerror(code)}; ") and mend in text
    assert explained(OSError("said otherwise")) == "said otherwise"


def test_a_folder_in_place_of_a_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model.safetensors.index.json").write_text('{"weight_map": {"w": "x.safetensors"}}')
    (tmp_path / "model/x.safetensors").mkdir()
    with pytest.raises(CheckpointError, match="x.safetensors is missing"):
        open_checkpoint(tmp_path / "model")
