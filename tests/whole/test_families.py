"""Ten families from folder to folder: bases and experts stored in old and new ways, merged, loaded by plain transformers.

The truth is a literal merge in fp64 of the same models, all of which transformers saved under its own names.
"""

import copy
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from helpers import assert_close
from safetensors.torch import load_file, save_file

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.naming import is_derived_buffer
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import run_recipe

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from families import FAMILIES, load, move, save_pictures, save_texts, save_tokenizer  # noqa: E402

Tensors = dict[str, torch.Tensor]
WEIGHTS = {"a": 0.75, "b": 0.5, "adapter": 0.25}  # exact in bf16 too
DENSITY = 0.4


# Ways of storing: what becomes of the tensors that transformers saves, and the files they are in.


def called(*pairs: tuple[str, str]):
    """Every name with a pattern replaced, one pattern after the other."""
    return lambda tensors: {
        functools.reduce(lambda n, pair: re.sub(*pair, n), pairs, name): tensor for name, tensor in tensors.items()
    }


def beside(buffers: Tensors):
    """Buffers that are no longer stored; those with {} in both layers."""
    every = {name.format(layer): tensor for name, tensor in buffers.items() for layer in range(2)}
    return lambda tensors: {**tensors, **{name: tensor.clone() for name, tensor in every.items()}}


def tied(copies: dict[str, str]):
    """Tied tensors under their other names too: copy -> stored."""
    return lambda tensors: {**tensors, **{name: tensors[stored] for name, stored in copies.items()}}


def as_file(folder: Path, tensors: Tensors) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")  # without metadata


def as_bin(folder: Path, tensors: Tensors) -> None:
    torch.save(tensors, folder / "pytorch_model.bin")  # tied tensors stay tied


def as_shards(folder: Path, tensors: Tensors) -> None:
    files = {}
    for i in range(3):
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        shard = {name: tensor.clone() for name, tensor in list(tensors.items())[i::3]}
        save_file(shard, folder / file, {"format": "pt"})
        files |= dict.fromkeys(shard, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


GAMMA_BETA = (r"LayerNorm\.weight$", "LayerNorm.gamma"), (r"LayerNorm\.bias$", "LayerNorm.beta")
POSITIONS = torch.arange(32)[None]
MASKS = {"h.{}.attn.bias": torch.ones(32, 32).tril().bool()[None, None], "h.{}.attn.masked_bias": torch.tensor(-1e4)}
FREQUENCIES = {"model.layers.{}.self_attn.rotary_emb.inv_freq": torch.rand(4)}
T5_BIAS = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
T5_EMBEDDINGS = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
HEAD = tied({"lm_head.weight": "model.embed_tokens.weight"})
WHOLE_CLIP = ("CLIPModel", FAMILIES["clip"][1], {**FAMILIES["clip"][2], "projection_dim": 8})


@dataclass(frozen=True)
class Case:
    """How a family is stored and merged.

    family: class, configuration's class and values. old: changes of an old folder's tensors, and how they are written.
    targets: of the adapter. base: class of a base without the head; expert: part of the model that experts are saved as.
    keys: of the recipe.
    """

    family: tuple[str, str, dict]
    old: tuple[Callable[[Tensors], Tensors], ...]
    write: Callable[[Path, Tensors], None]
    targets: tuple[str, ...]
    base: tuple[str, str] | None = None
    expert: str = ""
    dtype: torch.dtype = torch.float32
    keys: tuple[tuple[str, list[str]], ...] = ()
    learned: str = ""  # why it is not learned


CASES = {
    "bert": Case(
        FAMILIES["bert"],
        (called(*GAMMA_BETA), beside({"bert.embeddings.position_ids": POSITIONS})),
        as_bin,
        ("query", "value"),
    ),
    "bert-backbone": Case(
        FAMILIES["bert"],
        (called(*GAMMA_BETA), beside({"embeddings.position_ids": POSITIONS})),
        as_bin,
        ("query", "value"),
        base=("bert", "BertModel"),
        keys=(("heads", ["classifier.*"]),),
    ),
    "roberta": Case(
        FAMILIES["roberta"],
        (
            beside({"roberta.embeddings.position_ids": POSITIONS}),
            tied({"lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight", "lm_head.decoder.bias": "lm_head.bias"}),
        ),
        as_bin,
        ("query",),
    ),
    "deberta": Case(
        FAMILIES["deberta"],
        (beside({"deberta.embeddings.position_ids": POSITIONS}), called((r"^", "module."))),
        as_shards,
        ("query_proj",),
    ),
    "vit": Case(FAMILIES["vit"], (called((r"^", "_orig_mod.")),), as_shards, ("q_proj",)),
    "vit-backbone": Case(
        FAMILIES["vit"],
        (),
        as_bin,
        ("q_proj",),
        base=("vit", "ViTModel"),
        keys=(("heads", ["classifier.*"]), ("keep", ["pooler.*"])),
    ),
    "clip": Case(FAMILIES["clip"], (beside({"vision_model.embeddings.position_ids": POSITIONS[:, :5]}),), as_file, ("q_proj",)),
    "clip-towers": Case(
        WHOLE_CLIP,
        (beside({f"{tower}_model.embeddings.position_ids": POSITIONS[:, :5] for tower in ("text", "vision")}),),
        as_bin,
        (),
        expert="vision_model",
        keys=(("keep", ["text_model.*", "*_projection.*", "logit_scale"]),),
        learned="a vision tower alone has no logits",
    ),
    "t5": Case(
        FAMILIES["t5"],
        (
            tied(dict.fromkeys(T5_EMBEDDINGS, "shared.weight")),
            beside({T5_BIAS: torch.rand(32, 2)}),
        ),
        as_bin,
        ("q", "v"),
    ),
    "gpt2": Case(FAMILIES["gpt2"], (called((r"^transformer\.", "")), beside(MASKS)), as_bin, ("c_attn", "c_proj")),
    "llama": Case(
        FAMILIES["llama"],
        (beside(FREQUENCIES), called((r"^", "_orig_mod."))),
        as_shards,
        ("q_proj", "down_proj"),
        dtype=torch.bfloat16,
    ),
    "qwen2": Case(FAMILIES["qwen2"], (HEAD, called((r"^", "module."))), as_file, ("q_proj",)),
    "qwen3": Case(FAMILIES["qwen3"], (beside(FREQUENCIES),), as_shards, ("q_proj",), dtype=torch.bfloat16),
    "mixtral": Case(FAMILIES["mixtral"], (beside(FREQUENCIES), called((r"^", "module."))), as_bin, ("q_proj",)),
}


def made(case: Case) -> dict[str, torch.nn.Module]:
    """The base, two fine-tunes and, by PEFT, an adapter."""
    name, config, values = case.family
    torch.manual_seed(0)
    base = getattr(transformers, name)(getattr(transformers, config)(**values)).to(case.dtype)
    models = {"base": base}
    for seed, task in enumerate("ab", 1):
        models[task] = copy.deepcopy(base)
        move(attrgetter(case.expert)(models[task]) if case.expert else models[task], seed)
    if case.targets:
        torch.manual_seed(3)
        settings = peft.LoraConfig(r=2, init_lora_weights=False, target_modules=list(case.targets))
        models["adapter"] = peft.get_peft_model(copy.deepcopy(base), settings)
    return models


def save(case: Case, models, root: Path, old: set[str]) -> None:
    """Every model as it is found on disk, those in ``old`` in the old way."""
    for name, model in models.items():
        if name == "base" and case.base:
            part, architecture = case.base
            backbone = getattr(transformers, architecture)(model.config).to(case.dtype)
            backbone.load_state_dict(getattr(model, part).state_dict(), strict=False)
            model = backbone
        elif case.expert and name != "base":
            model = attrgetter(case.expert)(model)
        model.save_pretrained(root / name)
        if name in old:
            tensors = load_file(root / name / "model.safetensors")
            (root / name / "model.safetensors").unlink()
            for change in case.old:
                tensors = change(tensors)
            case.write(root / name, tensors)


def save_truth(models, root: Path) -> dict[str, Tensors]:
    """The same as transformers saves them in fp64, the adapter merged by PEFT: name -> tensors."""
    truth = {}
    for name, model in models.items():
        model = copy.deepcopy(model).double()
        model = model.merge_and_unload() if name == "adapter" else model
        model.save_pretrained(root / name)
        truth[name] = load_file(root / name / "model.safetensors")
    return truth


def task_arithmetic(base, experts):
    return base + sum(WEIGHTS[task] * (expert - base) for task, expert in experts.items())


def ties(base, experts):
    """Every task vector's largest numbers, of equal ones the first; the mean of those that have the sign of their sum."""
    kept = []
    for task, expert in experts.items():
        row = (expert - base).flatten()
        order = row.abs().argsort(descending=True, stable=True)
        row[order[max(1, int(DENSITY * row.numel())) :]] = 0
        kept.append(WEIGHTS[task] * row)
    kept = torch.stack(kept)
    agrees = kept.sign() == torch.where(kept.sum(0) >= 0, 1, -1)
    weights = torch.tensor([WEIGHTS[task] for task in experts], dtype=torch.float64)[:, None]
    divisor = (agrees * weights).sum(0)
    return base + ((kept * agrees).sum(0) / torch.where(divisor == 0, 1, divisor)).view_as(base)


BUFFERS = {f"h.{layer}.attn.masked_bias" for layer in range(2)}  # what transformers finds unexpected in the base too
METHODS = {"task_arithmetic": (task_arithmetic, {}), "ties": (ties, {"density": DENSITY})}
STORED = {"old-base": {"base"}, "old-experts": {"a", "b"}}


def recipe_of(case: Case, root: Path, method: str, tasks, **keys) -> Recipe:
    models: list[dict] = [{"model": str(root / task)} for task in tasks]
    if method in METHODS:
        models = [{**model, "parameters": {"weight": WEIGHTS[task]}} for model, task in zip(models, tasks, strict=True)]
    return Recipe.model_validate(
        {"merge_method": method, "base_model": str(root / "base"), "models": models, **dict(case.keys), **keys}
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    @functools.cache
    def stored(name: str, old: str) -> tuple[Path, dict[str, Tensors]]:
        case, root = CASES[name], tmp_path_factory.mktemp(name)
        models = made(case)
        save(case, models, root, STORED[old])
        return root, save_truth(models, root / "truth")

    return stored


def assert_equal(case: Case, root: Path, out: str, expected: Tensors) -> None:
    """The merged folder is what transformers loads of the expected tensors, and has the base's type."""
    architecture = case.base[1] if case.base else case.family[0]
    config = json.loads((root / out / "config.json").read_text())
    assert config["architectures"] == [architecture]
    with open_checkpoint(root / out) as written:
        dtypes = {written.dtype(name) for name in written.names if not is_derived_buffer(name, written.shape(name))}
    assert dtypes == {case.dtype} and config["dtype"] == str(case.dtype).removeprefix("torch.")
    (root / "expected").mkdir(exist_ok=True)
    save_file(expected, root / "expected/model.safetensors", {"format": "pt"})
    (root / "expected/config.json").write_text((root / "truth/base/config.json").read_text())
    truth = load(root / "expected", case.family[0], dtype=torch.float64)
    truth = (getattr(truth, case.base[0]) if case.base else truth).state_dict()
    found = load(root / out, architecture, dtype=torch.float64, ignored=BUFFERS).state_dict()
    for name, tensor in truth.items():
        assert_close(found[name].to(case.dtype) if tensor.is_floating_point() else found[name], tensor, name)
    if only := found.keys() - truth.keys():  # of the base, and kept
        base = load(root / "base", architecture, dtype=torch.float64).state_dict()
        assert case.base and all(torch.equal(found[name], base[name]) for name in only)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("old", STORED)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_family_from_file_to_file(folders, method, name, old):
    case, (root, truth) = CASES[name], folders(name, old)
    tasks = [task for task in WEIGHTS if task in truth]
    rule, parameters = METHODS[method]
    run_recipe(recipe_of(case, root, method, tasks, parameters=parameters), root / method)
    expected = {n: rule(base, {task: truth[task][n] for task in tasks}) for n, base in truth["base"].items()}
    assert_equal(case, root, method, expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("old", STORED)
@pytest.mark.parametrize("name", CASES)
def test_a_family_learned(folders, name, old):
    case, (root, truth) = CASES[name], folders(name, old)
    if case.learned:
        pytest.skip(case.learned)
    tasks = [task for task in WEIGHTS if task in truth]
    if "Image" in case.family[0]:
        save_pictures(root / "pictures").save_pretrained(root / "base")
        files = {task: root / "pictures" / task for task in "ab"}
    else:
        save_tokenizer(root / "base")
        files = save_texts(root)
    files = {task: str(files.get(task, files["a"])) for task in tasks}
    parameters = {"steps": 2, "learning_rate": 0.1, "progress": False}
    calibration = {"files": files, "batch_size": 2}
    run_recipe(recipe_of(case, root, "samerging", tasks, calibration=calibration, parameters=parameters), root / "samerging")
    learned = json.loads((root / "samerging/coefficients.json").read_text())["coefficients"]
    assert len({value for of_task in learned.values() for value in of_task.values()}) > 2
    states = {task: load(root / "truth" / task, case.family[0], dtype=torch.float64).state_dict() for task in ("base", *tasks)}
    architecture = case.base[1] if case.base else case.family[0]
    found = load(root / "samerging", architecture, dtype=torch.float64, ignored=BUFFERS).state_dict()
    heads, seen = {name for name in states["base"] if case.base and name.startswith("classifier")}, set()
    for name, base in states["base"].items():
        if name in learned["a"]:
            seen.add(name)
            expected = base + sum(learned[task][name] * (states[task][name] - base) for task in tasks)
            there = name.removeprefix(f"{case.base[0]}.") if case.base else name
            assert_close(found[there].to(case.dtype), expected, name)
    assert seen >= {name for name in truth["base"] if name in states["base"]} - heads
