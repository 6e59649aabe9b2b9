"""Names of tasks: those that folders give, and what may be one."""

import pytest
import torch

from samerge_ext import PackedWeights
from samerge_ext.checkpoints.task_names import check_task_name, names_of_folders


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    monkeypatch.chdir(tmp_path / "home")
    return tmp_path / "home"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["experts/news", "experts/spam/"], ["news", "spam"]),
        (["run1/checkpoint-500", "run2/checkpoint-500"], ["run1-checkpoint-500", "run2-checkpoint-500"]),
        (["a/x/last", "b/x/last", "c"], ["a-x-last", "b-x-last", "c"]),
        (["a/x/last", "b/x/last", "b/y/last"], ["a-x-last", "b-x-last", "y-last"]),
        ([".", "../other"], ["home", "other"]),
        (["a", "./a", "a/"], None),
        ([".hidden", "a\\b"], ["hidden", "a-b"]),
    ],
)
def test_names_of_folders(paths, names):
    found = names_of_folders(paths)
    assert len(set(found)) == len(paths)
    for name in found:
        check_task_name(name)
    if names is not None:
        assert found == names


def test_a_model_listed_twice_gets_a_number():
    first, second = names_of_folders(["a", "./a"])
    assert (first, second) == ("a", "a-2")


def test_equal_weight_files_are_called_by_their_folders(here):
    for name in ("a/model.safetensors", "b/model.safetensors", "c/news.safetensors"):
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).touch()
    assert names_of_folders(["a/model.safetensors", "b/model.safetensors", "c/news.safetensors"]) == ["a", "b", "news"]


def test_a_link_keeps_its_name(here):
    (here / "runs").mkdir()
    (here / "news").symlink_to("runs")
    assert names_of_folders(["news"]) == ["news"] and names_of_folders(["news/."]) == ["news"]
    assert names_of_folders(["news/.."]) == ["home"]


def test_long_names_are_cut_and_stay_apart():
    found = names_of_folders(["x" * 240 + "1", "ü" * 120 + "2", "x" * 240 + "3"])
    assert len(set(found)) == 3
    for name in found:
        check_task_name(name)


@pytest.mark.parametrize("name", ["", None, 3, "org/news", "..\\x", "..", ".hidden", "a\0b", "a\nb", "x" * 300, "ü" * 101])
def test_what_is_no_name_is_refused_before_any_work(name):
    with pytest.raises(ValueError, match="is not a task name"):
        check_task_name(name)
    with pytest.raises(ValueError, match="is not a task name"):
        PackedWeights.from_state_dicts({"a": torch.zeros(3)}, {name: {"a": torch.ones(3)}})


@pytest.mark.parametrize("name", ["news", "lr=1e-4,seed=3", "模型 [v2]", "a.b-c_d", "x" * 200])
def test_what_may_be_a_name(name):
    check_task_name(name)
