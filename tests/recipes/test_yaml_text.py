"""YAML within bounds."""

import time

import pytest

from samerge_ext.recipes.yaml_text import parse_yaml


def bomb(levels: int) -> str:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join([f'*{chr(97 + i)}'] * 9)}]" for i in range(levels)]
    return "\n".join(lines)


def test_what_a_recipe_is_made_of():
    text = "a: &x {b: [1, 2.5, true, null, text, '5']}\nc: *x\nd: {<<: *x, e: 2024-01-01}\nf: 1e-3\n"
    inner = {"b": [1, 2.5, True, None, "text", "5"]}
    assert parse_yaml(text) == {"a": inner, "c": inner, "d": {**inner, "e": "2024-01-01"}, "f": "1e-3"}
    assert parse_yaml(b"\xef\xbb\xbfa: 1") == {"a": 1}
    assert parse_yaml(bomb(3))["d"][0][0][0][0] == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(7), "aliases stand for more"),
        ("a: &a {<<: [*a, *a]}", "an alias stands for what it is in"),
        ("&a [*a]", "an alias stands for what it is in"),
        ("\n".join(["a0: &a0 {k: v}", *(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}" for i in range(1, 40))]), "stand for more"),
        ("[" * 50_000, "nested more than 32 deep"),
        ("- " * 50_000, "nested more than 32 deep"),
        ("x" * 300_000, "more than 262144 bytes"),
        ("a: 1" + ":59" * 50_000, "is a number of 150001 digits"),
        ("a: " + "9" * 5000, "is a number of 5000 digits"),
        ("a: 1\na: 2", "'a' is there twice, in line 1 and in line 2"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor"),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!int x", "not of its type"),
        ("a: !!bool x", "not of its type"),
        ('a: "\\ud800"', "not of its type"),
        ("a: *b", "undefined alias"),
        (b"a: \xff", "not UTF-8"),
        ("a: [" + "x" * 10_000, "not valid YAML"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once_and_in_few_words(text, message):
    started = time.perf_counter()
    with pytest.raises(ValueError, match=message) as error:
        parse_yaml(text)
    assert time.perf_counter() - started < 20 and len(str(error.value)) < 1000
