"""Between the bytes of a file and the JSON or YAML in them: what a reader of damaged files takes apart and puts together."""

import json
import struct
import zlib

import yaml


def split_json(data: bytes) -> tuple[object, bytes]:
    return json.loads(data), b""


def join_json(content: object, _: bytes = b"") -> bytes:
    return json.dumps(content).encode()


def split_header(data: bytes) -> tuple[object, bytes]:
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_header(content: object, rest: bytes) -> bytes:
    return with_header(json.dumps(content).encode(), rest)


def frame(text: bytes, sound: bytes) -> bytes:
    return with_header(text, split_header(sound)[1])


def with_header(text: bytes, rest: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + rest


def split_packed(data: bytes) -> tuple[object, bytes]:
    header, rest = split_header(data)
    return {"header": header, "about": json.loads(header.pop("__metadata__")["packed"])}, rest


def join_packed(content: object, rest: bytes) -> bytes:
    """With the checksum of the header that it makes, so that what is in it is looked at."""
    if not isinstance(content, dict) or not isinstance(content.get("header"), dict):
        return join_header(content, rest)
    about = json.dumps(content.get("about"))
    data = join_header({"__metadata__": {"checksum": "0" * 8, "packed": about}, **content["header"]}, b"")
    return data.replace(b"0" * 8, b"%08x" % zlib.crc32(data), 1) + rest


def split_sealed(data: bytes) -> tuple[object, bytes]:
    return json.loads(data.partition(b"\n")[2]), b""


def join_sealed(content: object, _: bytes = b"") -> bytes:
    text = json.dumps(content).encode()
    return b"%08x\n" % zlib.crc32(text) + text


def split_yaml(data: bytes) -> tuple[object, bytes]:
    return yaml.safe_load(data), b""


def join_yaml(content: object, _: bytes = b"") -> bytes:
    return yaml.safe_dump(content).encode()
