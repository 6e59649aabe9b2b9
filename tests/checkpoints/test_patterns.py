"""Regular expressions of adapters: what PEFT means by them, and none that never ends."""

import time

import pytest

from samerge_ext.checkpoints.patterns import Patterns

MODULE = "model.layers.10.self_attn.q_proj"


@pytest.mark.parametrize(
    "text",
    [
        "q_proj", MODULE, r".*\.(q|k|v)_proj", r"layers\.[0-9]+\.self_attn\..*", r"^model\.layers\.(?:[0-9]|1[0-9])\..*proj",
        r"model\.layers\.\d{1,2}\.self_attn\.(q_proj|v_proj)", r".*layers\.[0-9]+\.self_attn\..*",
    ],
)  # fmt: skip
def test_expressions_that_people_write(text):
    patterns = Patterns({"k_proj": 1.0, "_proj": 2.0, text: 3.0})
    assert patterns.find(MODULE) == 3.0
    assert patterns.find("lm_head") is None


ENDLESS = ("(a+)+$", "(a|a)*b", "(_|[a-z]|.)*x", "(.*)*", "a?" * 40 + "a" * 40, "(a|.)" * 40, ".*" * 6 + "x", r"(.+)+\1")
NONE = ("[", "(", "*", "(?P<x>a)(?P<x>b)", "a{99999999999999999999}", "(" * 500 + ")" * 500, "x" * 2_000_000)


@pytest.mark.parametrize("text", ENDLESS)
def test_expressions_that_never_end(text):
    started = time.perf_counter()
    with pytest.raises(ValueError, match="too many ways"):
        Patterns({text: 1.0})
    assert time.perf_counter() - started < 5


@pytest.mark.parametrize("text", NONE, ids=lambda text: text[:20])
def test_what_is_no_expression(text):
    with pytest.raises(ValueError, match="no regular expression|more than 1000000 characters"):
        Patterns({text: 1.0})


def test_long_names_are_counted_too():
    patterns = Patterns({".*.*.*x": 1.0})
    with pytest.raises(ValueError, match="too many ways"):
        patterns.find("a" * 1000)
