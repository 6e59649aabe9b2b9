import ast
import importlib
import pickle
from pathlib import Path

import samerge_ext as sm

# Of the package's __init__: what type checkers and editors are told of the lazy names.
TREE = ast.parse(Path(sm.__file__).read_text())
(FOR_TYPE_CHECKERS,) = (node for node in TREE.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")


def imported(statements):
    """name -> module that it is imported from, relative to the package."""
    found = [node for node in statements if isinstance(node, ast.ImportFrom) and node.level == 1]
    return {name.name: node.module for node in found for name in node.names}


def test_every_public_name_is_listed_and_there():
    assert not imported(TREE.body)
    assert sorted([*sm.__all__, "backend"]) == sorted([*sm._LAZY, *sm._LAZY_MODULES])
    for name in sm.__all__:
        assert getattr(sm, name) is not None
        assert name in dir(sm)


def test_type_checkers_are_told_what_is_found():
    assert imported(FOR_TYPE_CHECKERS.body) == {**sm._LAZY, **dict.fromkeys(sm._LAZY_MODULES)}
    assert sm.ops.softmax_kl is sm.softmax_kl and pickle.loads(pickle.dumps(sm.softmax_kl)) is sm.softmax_kl
    for name, module in sm._LAZY.items():
        assert getattr(sm, name) is getattr(importlib.import_module(f"samerge_ext.{module}"), name)


def test_the_package_says_that_it_is_typed():
    assert (Path(sm.__file__).parent / "py.typed").exists()
