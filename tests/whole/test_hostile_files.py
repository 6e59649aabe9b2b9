"""Whatever a file holds, its reader reads it or raises a documented error that names it: no traceback, no hang, no flood."""

import copy
import warnings

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from readers import READERS

HOSTILE = (
    None, True, False, -1, 0, 1, 2, 3, 255, 2**31, 2**63, 2**64, -(2**63), 10**30, 0.5, 1e308, float("inf"), float("nan"), "",
    "x", "0", "1e400", "\0", "a\nb", "x" * 3000, "../../x", "/", "~nobody", "\u2028", "(a+)+b", "[", "base", "union", [], {}, [0],
    [[]], [None], ["*"], {"": 1}, {"value": 1}, {"filter": 5, "value": 1}, {"(a|a)*b": 1}, {"x": {"x": {"x": []}}},
    list(range(200)),
)  # fmt: skip
EXAMPLES = settings(
    max_examples=30,
    derandomize=True,
    deadline=60_000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(scope="module", params=READERS.values(), ids=READERS)
def place(request, tmp_path_factory):
    """A reader, a folder of its own, and sound files for it."""
    folder = tmp_path_factory.mktemp("hostile")
    return request.param, folder, request.param.sound(folder)


def check(place, data: bytes) -> bool:
    reader, folder, _ = place
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reader.check(folder, data)


def test_sound_files_are_read(place):
    assert all(check(place, data) for data in place[2])


@EXAMPLES
@given(data=st.data())
def test_damaged_bytes(place, data):
    """Some bytes are replaced, cut out, doubled or put in."""
    found = bytearray(data.draw(st.sampled_from(place[2])))
    for _ in range(data.draw(st.integers(1, 4))):
        begin = data.draw(st.integers(0, len(found)))
        end = min(len(found), begin + data.draw(st.sampled_from((0, 1, 1, 2, 8, 100, 10**6))))
        others = (b"", bytes(found[begin:end]) * 2, b"\xff" * (end - begin))
        found[begin:end] = data.draw(st.sampled_from(others) | st.binary(max_size=9))
    check(place, bytes(found))


@EXAMPLES
@given(data=st.data())
def test_other_values(place, data):
    """Values of JSON or YAML are replaced by those of other types and sizes, left out, or named otherwise."""
    reader, _, sound = place
    if reader.split is None:
        pytest.skip("is made of bytes alone")
    content, rest = reader.split(data.draw(st.sampled_from(sound)))
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        holder, key = [content], 0
        while isinstance(inner := holder[key], dict | list) and inner and data.draw(st.integers(0, 4)):
            holder, key = inner, data.draw(st.sampled_from(list(inner) if isinstance(inner, dict) else range(len(inner))))
        value = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
        if isinstance(holder, dict) and data.draw(st.booleans()):
            kept = holder.pop(key)
            if isinstance(value, str):
                holder[value] = kept
        elif holder == [content] and key == 0:
            content = value
        else:
            holder[key] = value
    check(place, reader.join(content, rest))


@EXAMPLES
@given(data=st.binary(max_size=300))
def test_any_bytes(place, data):
    check(place, data)


DEEP = 100_000
FLOODS = ("[" * DEEP, '{"a":' * DEEP, "[" * DEEP + "]" * DEEP, "x" * DEEP, "- " * DEEP, "? " * DEEP, "9" * DEEP)


@pytest.mark.parametrize("text", FLOODS, ids=lambda text: text[:2])
def test_deep_and_long_ones(place, text):
    reader, *_ = place
    data = text.encode()
    assert not check(place, data) or reader.name == "pieces"
    if reader.name == "safetensors":
        assert not check(place, len(data).to_bytes(8, "little") + data)
