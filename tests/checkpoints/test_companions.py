"""What goes along with merged weights, what its configuration says, and where it may be written."""

import json

import pytest
import torch
from folders import read_all
from safetensors.torch import save_file

import samerge_ext as sm
from samerge_ext.checkpoints.companions import Companions, chat_template, companion_files, with_dtype
from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.checkpoints.saving import require_apart
from samerge_ext.checkpoints.tokenizers import MergedTokenizer
from samerge_ext.elementwise.file_merge import FileMerge, merge_files
from samerge_ext.elementwise.piecewise import Combination


def folder_with(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def models(root, names=("base", "news", "spam"), dtypes=(torch.float32,) * 3):
    for seed, (name, dtype) in enumerate(zip(names, dtypes, strict=True)):
        torch.manual_seed(seed)
        (root / name).mkdir(parents=True)
        save_file({"a.weight": torch.randn(5, 3).to(dtype), "b": torch.randn(4).to(dtype)}, root / name / "model.safetensors")
    return root


def merge_of(root, experts=("news", "spam"), **options):
    weights = [0.5] * len(experts)
    return FileMerge(
        [(task, root / task) for task in experts], lambda *_: Combination(weights), root / "base", base=root / "base", **options
    )


def test_all_goes_along_but_weights_training_state_and_what_is_of_others(tmp_path):
    wanted = [
        "config.json", "modules.json", "1_Pooling/config.json", "2_Dense/config.json",
        "2_Dense/model.safetensors", "modeling_custom.py", "layers/attention.py", "bpe.codes", "dict.txt", "tekken.json",
        "chat_template.jinja", "preprocessor_config.json", "generation_config.json", "LICENSE", "tokenizer.model",
        "additional_chat_templates/tools.jinja",
    ]  # fmt: skip
    unwanted = [
        "model.safetensors", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json", "tf_model.h5",
        "rust_model.ot", "consolidated.00.pth", "model.gguf", "optimizer.pt", "rng_state_0.pth", "trainer_state.json",
        "training_args.bin", "README.md", ".gitattributes", ".cache/huggingface/x", "adapter_config.json",
        "report.json", "report.html", "checkpoint-500/config.json", "runs/a/events", "onnx/config.json",
        "quantised/config.json", "quantised/model.onnx", "events.out.tfevents.1", "global_step5/x",
        "heads/news.safetensors", "mergekit_config.yml",
    ]  # fmt: skip
    modules = [{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]
    folder_with(tmp_path / "base", {**dict.fromkeys([*wanted, *unwanted], "{}"), "modules.json": modules})
    assert companion_files(tmp_path / "base") == sorted(wanted, key=lambda name: (name.split("/"),))
    (tmp_path / "out").mkdir()
    assert set(Companions(tmp_path / "base").copy(tmp_path / "out")) == set(wanted)
    assert {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*") if p.is_file()} == set(wanted)


def test_what_links_lead_to_is_copied(tmp_path):
    folder_with(tmp_path, {"blobs/1": "{}", "base/x": "", "out/x": ""})
    (tmp_path / "base/config.json").symlink_to("../blobs/1")
    (tmp_path / "base/broken.json").symlink_to("../blobs/2")
    (tmp_path / "base/loop").symlink_to(".")
    Companions(tmp_path / "base").copy(tmp_path / "out")
    assert (tmp_path / "out/config.json").read_text() == "{}" and not (tmp_path / "out/config.json").is_symlink()
    assert not (tmp_path / "out/loop/loop").exists()


def test_what_is_large_stays_and_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("samerge_ext.checkpoints.companions.MAX_BYTES", 10)
    folder_with(tmp_path, {"base/big.json": "x" * 11, "base/data/a": "x" * 6, "base/data/b": "x" * 6, "base/config.json": "{}"})
    with pytest.warns(UserWarning) as said:
        assert companion_files(tmp_path / "base") == ["config.json"]
    assert {str(warning.message).split()[0] for warning in said} == {str(tmp_path / "base" / n) for n in ("big.json", "data")}


def test_another_models_tokenizer_is_taken_whole(tmp_path):
    base = folder_with(
        tmp_path / "base", {"config.json": "base", "tokenizer.model": "base", "tokenizer.json": "base", "merges.txt": ""}
    )
    other = folder_with(tmp_path / "other", {"config.json": "other", "tokenizer.json": "other", "chat_template.jinja": "{{ x }}"})
    (tmp_path / "out").mkdir()
    names = Companions(base, tokenizer=MergedTokenizer(other)).copy(tmp_path / "out")
    assert set(names) == {"config.json", "tokenizer.json", "chat_template.jinja"}
    assert (tmp_path / "out/tokenizer.json").read_text() == "other" and (tmp_path / "out/config.json").read_text() == "base"


def test_a_chat_template_is_written_where_old_and_new_versions_look(tmp_path):
    base = folder_with(tmp_path / "base", {"tokenizer_config.json": {"chat_template": "old", "x": 1}, "chat_template.json": {}})
    (tmp_path / "out").mkdir()
    Companions(base, chat_template="{{ new }}").copy(tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text()) == {"chat_template": "{{ new }}", "x": 1}
    assert chat_template(tmp_path / "out") == "{{ new }}" and not (tmp_path / "out/chat_template.json").exists()


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({}, None),
        ({"chat_template.jinja": "a", "tokenizer_config.json": {"chat_template": "b"}}, "a"),
        ({"tokenizer_config.json": {"chat_template": "b"}}, "b"),
        (
            {
                "tokenizer_config.json": {
                    "chat_template": [{"name": "tools", "template": "c"}, {"name": "default", "template": "d"}]
                }
            },
            "d",
        ),
        ({"chat_template.json": {"chat_template": "e"}}, "e"),
        ({"tokenizer_config.json": "no JSON"}, None),
    ],
)
def test_where_a_chat_template_stands(tmp_path, files, found):
    assert chat_template(folder_with(tmp_path, {"x": "", **files})) == found


def test_the_configuration_says_what_is_written_in_nested_ones_too(tmp_path):
    nested = {
        "dtype": "float16",
        "text_config": {"torch_dtype": "float16", "x": 1},
        "vision_config": {"inner_config": {"dtype": "float16"}},
    }
    quantised = {"quantization_config": {"dtype": "float8"}, "rope": {"dtype": "x"}, "audio_config": {"y": 2}}
    found = with_dtype({**nested, **quantised}, torch.bfloat16)
    assert found == {
        "dtype": "bfloat16", "text_config": {"torch_dtype": "bfloat16", "x": 1},
        "vision_config": {"inner_config": {"dtype": "bfloat16"}}, **quantised,
    }  # fmt: skip
    assert with_dtype({"torch_dtype": "float16", "dtype": "float16"}, torch.float32) == {"dtype": "float32"}


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"out_dtype": torch.float16}, {}])
def test_config_json_agrees_with_the_file(tmp_path, options):
    """Also where the models' types promote to another one than the base's."""
    root = models(tmp_path, dtypes=(torch.bfloat16, torch.bfloat16, torch.float32))
    folder_with(root / "base", {"config.json": {"dtype": "bfloat16", "text_config": {"dtype": "bfloat16"}}})
    merge_files(merge_of(root, **options), root / "out")
    (written,) = {tensor.dtype for tensor in read_all(root / "out").values()}
    configuration = json.loads((root / "out/config.json").read_text())
    assert configuration["dtype"] == configuration["text_config"]["dtype"] == str(written).removeprefix("torch.")


def test_an_input_is_never_written_over(tmp_path):
    root = models(tmp_path, ("base", "news", "out.state"))
    folder_with(root / "base", {"config.json": {}})
    (root / "link").symlink_to("news")
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    for out, experts in [("base", ["news"]), ("news", ["news"]), ("news", ["link"]), ("link", ["news"]), ("out", ["out.state"])]:
        with pytest.raises(CheckpointError, match="is or holds"):
            merge_files(merge_of(root, experts), root / out, overwrite=True)
    with pytest.raises(CheckpointError, match="is or holds"):
        merge_files(merge_of(root, ["news"]), root, overwrite=True)
    with pytest.raises(CheckpointError, match="lies inside"):
        merge_files(merge_of(root, ["news"]), root / "news/out", overwrite=True)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("given", "out"),
    [
        ("news", "news"),
        ("news", "link"),
        ("link", "news"),
        ("holder/inner", "holder"),
        ("holder/way/in", "holder"),
        ("news", "news/inside"),
        ("out.state", "out"),
        ("out.state/merged", "out"),
        ("elsewhere/snapshot", "blobs"),
        ("news", "news/../news"),
    ],
)
def test_what_is_written_is_apart_from_inputs_also_through_links(tmp_path, given, out):
    """holder/inner leads out of the holder; snapshot is a folder of links to files in blobs."""
    for folder in ("news/in", "holder", "out.state/merged", "blobs", "elsewhere/snapshot"):
        (tmp_path / folder).mkdir(parents=True)
    for link, to in {"link": "news", "holder/inner": "../news", "holder/way": "../news"}.items():
        (tmp_path / link).symlink_to(to)
    (tmp_path / "blobs/1234").write_text("")
    (tmp_path / "elsewhere/snapshot/model.safetensors").symlink_to("../../blobs/1234")
    with pytest.raises(CheckpointError, match="which is merged"):
        require_apart(tmp_path / out, [tmp_path / given])
    require_apart(tmp_path / "beside", [tmp_path / given])


def test_a_result_is_never_written_over_an_expert(tmp_path):
    root = models(tmp_path)
    packed = sm.PackedWeights.from_folders(root / "base", {"news": root / "news"})
    with pytest.raises(CheckpointError, match="news is or holds .*news, which is merged"):
        sm.average(packed).save_pretrained(root / "news", overwrite=True)
    assert read_all(root / "news")


def test_weights_that_links_lead_to_are_inputs_too(tmp_path):
    root = models(tmp_path)
    folder_with(root / "store", {"config.json": {}})
    (root / "news/model.safetensors").rename(root / "store/model.safetensors")
    (root / "news/model.safetensors").symlink_to("../store/model.safetensors")
    with pytest.raises(CheckpointError, match="store is or holds"):
        merge_files(merge_of(root), root / "store", overwrite=True)
    assert (root / "store/model.safetensors").exists()


def test_a_damaged_configuration_is_an_error_before_any_work(tmp_path):
    root = models(tmp_path)
    (root / "base/config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json holds a JSON list"):
        merge_files(merge_of(root), root / "out")
    assert not (root / "out.state").exists()
