"""Random recipes through mergekit 0.1.5 and through samerge: the same numbers to rounding, or a refusal that docs/files.md lists.

    python tests/support/mergekit_differential.py --mergekit PYTHON [--each 10] [--seed 0] [--methods slerp …]

PYTHON: of an environment that has mergekit (`make mergekit-differential` makes one). Models are tiny Llamas, one of them stored
in bf16, with one tokenizer. Of each method recipes are drawn until so many were merged by both. Prints a table of the methods,
how many recipes ended how, and each that did not end as it should; then it exits 1.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from samerge_ext.recipes.recipe import load_recipe
from samerge_ext.recipes.run import run_recipe

# What mergekit merges and is refused here: a part of the message -> the words of docs/files.md that list it.
REFUSED = {
    "lies outside of 0 … 1": "a density or gamma outside of 0 … 1",
    "unknown [": "a parameter that no method of mergekit reads",
    "is not a method here": "a method that mergekit does not have",
    "'modules'": "`modules`",
    "sum of the weights, which is 0": "a mean whose weights sum to 0",
    "there is no key": "a key that nobody reads",
}
# What mergekit refuses and is merged here.
WIDER = {
    "Missing required parameter weight": "a weight that is left out",
    "Duplicate merge inputs": "a model that is listed twice",
    "Base input is not present": "slices without the base",
    "requires exactly 1 inputs": "a base beside the one model of passthrough",
}
# Methods that choose numbers, or whose every step mergekit rounds: in a narrow type it is far from the truth, as it is.
CHOOSING = (
    "ties", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "sce", "arcee_fusion", "ram", "ramplus_tl", "karcher",
)  # fmt: skip
WITHOUT_BASE = ("linear", "nuslerp", "multislerp", "karcher", "passthrough")  # or with one
ONE = ("slerp", "nearswap", "arcee_fusion", "passthrough")  # expert, beside the base or alone
EXPERTS = {**dict.fromkeys(ONE, (1, 1)), "nuslerp": (2, 2), "model_stock": (2, 4)}  # fewest and most; of others 1 … 4
NEEDED = ("t",)
# Parameters for all of the methods that do not share those of task_arithmetic: each by a draw and the function `setting`.
SETTINGS: dict = {
    "slerp": {"t": lambda draw, setting: setting(0.0, 1.0)},
    "nuslerp": {
        "nuslerp_flatten": lambda draw, _: draw.choice([True, False, False]),
        "nuslerp_row_wise": lambda draw, _: draw.choice([True, False]),
    },
    "multislerp": {"normalize_weights": lambda draw, _: draw.choice([True, False]), "eps": lambda *_: 1e-8},
    "karcher": {"max_iter": lambda draw, _: draw.choice([1, 3, 10]), "tol": lambda *_: 1e-5},
    "sce": {"select_topk": lambda draw, setting: setting(0.05, 1.0), "int8_mask": lambda *_: True},
    "nearswap": {"t": lambda draw, setting: setting(0.0, 0.2)},
    "arcee_fusion": {},
    "ram": {"epsilon": lambda draw, setting: setting(0.0, 0.1)},
    "ramplus_tl": {key: lambda draw, setting: setting(0.0, 0.1) for key in ("r", "alpha", "epsilon")},
    "model_stock": {"filter_wise": lambda draw, _: draw.choice([True, False])},
}
SETTINGS["passthrough"] = {}
METHODS = [
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della", "della_linear",
    *SETTINGS,
]  # fmt: skip
# Of the largest magnitude of a tensor. fp32: mergekit adds and divides in another order. Others: it rounds after every step.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11, torch.float64: 1e-5}

SAME = "same numbers"  # how a recipe that both merge is to end
ROUNDS = 6  # of recipes drawn
SLACK = {"karcher": 4}  # tolerances: it ends at a step shorter than 1e-5, which rounding may be the cause of

MERGEKIT = """
import json, sys, yaml
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
found = {}
for path in sys.argv[2:]:
    try:
        configuration = MergeConfiguration.model_validate(yaml.safe_load(open(path)))
        run_merge(configuration, path.removesuffix(".yaml") + ".mergekit", MergeOptions(quiet=True))
        found[path] = None
    except Exception as error:
        found[path] = f"{type(error).__name__}: {error}"
json.dump(found, open(sys.argv[1], "w"))
"""


def write_models(root: Path) -> None:
    """base and the experts a … d, of three layers and 40 tokens."""
    import transformers
    from tokenizers import Tokenizer, models

    size = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**size, num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=False)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(40)}, unk_token="w0"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    # Norms of ones would differ from bf16 by equal numbers, of which mergekit keeps now these and now those.
    start = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b", "c", "d")):
        torch.manual_seed(seed)
        by = 0.05 if seed else 0.0
        model.load_state_dict({n: t + by * torch.randn_like(t) for n, t in start.items()})
        (model.to(torch.bfloat16) if name == "d" else model).save_pretrained(root / name)
        model.to(torch.float32)
        tokenizer.save_pretrained(root / name)


def recipe(draw: random.Random, root: Path, method: str) -> dict:
    """A recipe: mostly what people write, now and then what one side or both refuse."""
    if draw.random() < 0.03:
        method = draw.choice(["dare-ties", "slurp"])
    elects, drops = method in CHOOSING, method.startswith(("dare", "della"))
    fewest, most = EXPERTS.get(method, (1, 4))
    experts = draw.sample(["a", "b", "c", "d"], draw.randint(fewest, most))
    if draw.random() < 0.04:
        experts.append(experts[0])
    shared_weight = draw.random() < 0.15

    def scalar(low: float, high: float):
        value = round(draw.uniform(low, high), 3)
        return draw.choice([value, value, value, str(value), f"{value:.2e}"])

    def setting(low: float, high: float):
        kind = draw.random()
        if kind < 0.6:
            return scalar(low, high)
        if kind < 0.8:
            return [scalar(low, high) for _ in range(draw.randint(2, 4))]
        by_name = {"filter": draw.choice(["mlp", "self_attn", "lm_head", "embed", "layers.1."]), "value": scalar(low, high)}
        return [by_name, {"value": draw.choice([scalar(low, high), [scalar(low, high), scalar(low, high)]])}]

    def density():
        if drops:  # what is drawn differs; all or nothing does not
            return draw.choice([1, 1.0, 0.0])
        return draw.choice([setting(0.05, 1.0), setting(0.05, 1.0), 1, 0.0, 1.0 if draw.random() < 0.9 else 1.3])

    entries = []
    for name in experts:
        own = {}
        if not shared_weight or draw.random() < 0.3:
            below_0 = draw.random() < 0.2 and method != "nuslerp"  # which goes ever further beyond the two as weights cancel
            own["weight"] = setting(-0.3 if below_0 else 0.1, 1.2)
        if draw.random() < (0.8 if method != "linear" else 0.1):
            own["density"] = density()
        if method.startswith("breadcrumbs") and draw.random() < 0.5:
            own["gamma"] = setting(0.0, 0.3)
        if method == "passthrough":
            own = {"scale": setting(0.0, 1.0)}
        if draw.random() < 0.04:
            own.pop("weight", None)
        entries.append({"model": str(root / name), "parameters": own or None})
    parameters = {}
    if shared_weight:
        parameters["weight"] = setting(0.1, 1.0)
    if draw.random() < 0.4:
        parameters["normalize"] = draw.choice([True, False, 1, 0, 1.0, "yes"])
    if draw.random() < 0.3:
        parameters["lambda"] = scalar(0.3, 1.5)
    if draw.random() < 0.3:
        parameters["int8_mask"] = True
    if draw.random() < 0.15:
        parameters["rescale"] = draw.choice([False, False, True]) if not drops else True
    if draw.random() < 0.15:
        parameters["density"] = density()
    if draw.random() < 0.1:
        parameters["gamma"] = 0.01
    if method in SETTINGS:
        given = [key for key in SETTINGS[method] if key in NEEDED or draw.random() < 0.7]
        parameters = {key: SETTINGS[method][key](draw, setting) for key in given}
    content: dict = {"merge_method": method, "parameters": parameters or None}
    base = str(root / "base")
    spelled = draw.choice([base, base, base, f"{base}/", str(root / "a/../base")])
    if method not in WITHOUT_BASE or draw.random() < 0.3:
        content["base_model"] = base
        if draw.random() < 0.4:
            listed = {"model": base, "parameters": draw.choice([None, {"weight": 0.7}])}
            if method in WITHOUT_BASE:
                listed["parameters"] = {"weight": 0.7}
            entries.insert(draw.randint(0, len(entries)), listed)
        else:
            content["base_model"] = spelled
    if draw.random() < (0.7 if method == "passthrough" else 0.15):
        content["slices"] = [sliced(draw, entries, content, base) for _ in range(draw.choice([1, 2, 3]))]
        if draw.random() < 0.3:
            content["slices"][0]["parameters"] = {"lambda": 0.8}
    elif draw.random() < 0.12:
        layers = draw.choice([[0, 3], [0, 3], [0, 3], [0, 2]])
        if "base_model" in content and all(entry["model"] != base for entry in entries) and draw.random() < 0.8:
            entries.append({"model": content["base_model"], "parameters": {"weight": 0.5}})
        content["slices"] = [{"sources": [{**entry, "layer_range": layers} for entry in entries]}]
        if draw.random() < 0.3:
            content["slices"][0]["parameters"] = {"lambda": 0.8}
    else:
        content["models"] = entries
    low = not elects and all(entry["model"] != str(root / "d") for entry in entries)
    dtypes = ["float32", "float32", *(["bfloat16", "float16"] if low else [])]
    if draw.random() < 0.5:
        content["dtype"] = draw.choice(dtypes)
    if draw.random() < 0.2:
        content["out_dtype"] = draw.choice(["bfloat16", "float16", "float32"])
    if draw.random() < 0.2:
        source = draw.choice(["base", "union", str(root / "a")])
        content |= draw.choice([{"tokenizer_source": source}, {"tokenizer": {"source": source}}])
    if draw.random() < 0.1:
        content["chat_template"] = draw.choice(["auto", "chatml", "{% for m in messages %}{{ m['content'] }}{% endfor %}"])
    if draw.random() < 0.1:
        content["name"] = "a name"
    if draw.random() < 0.1:
        content["random_seed"] = 3
    return content


def sliced(draw: random.Random, entries: list, content: dict, base: str) -> dict:
    """A slice of some layers of the models of a recipe, which need not be the same ones."""
    count = draw.randint(1, 3)
    named = {entry["model"] for entry in entries}
    if "base_model" in content and not named & {base, content["base_model"]} and content["merge_method"] not in WITHOUT_BASE:
        entries = [*entries, {"model": content["base_model"], "parameters": {"weight": 0.5}}]
    sources = []
    for entry in entries:
        first = draw.randint(0, 3 - count)
        sources.append({**entry, "layer_range": [first, first + count]})
    return {"sources": sources}


def ours(path: Path) -> str | None:
    """Merges beside the recipe; the message of a refusal."""
    try:
        with warnings.catch_warnings(action="ignore"):
            run_recipe(load_recipe(path, {}), path.with_suffix(".samerge"))
    except ValueError as error:
        return str(error)
    return None


def largest_difference(path: Path) -> tuple[float, str]:
    """In tolerances, and the tensor's name."""
    found, expected = (load_file(path.with_suffix(suffix) / "model.safetensors") for suffix in (".samerge", ".mergekit"))
    if set(found) != set(expected):
        return float("inf"), f"names {set(found) ^ set(expected)}"
    worst = (0.0, "")
    content = yaml.safe_load(path.read_text())
    for name, tensor in expected.items():
        if found[name].dtype != tensor.dtype or found[name].shape != tensor.shape:
            return float("inf"), f"{name}: {found[name].dtype} {tuple(found[name].shape)}, {tensor.dtype} {tuple(tensor.shape)}"
        coarsest = max(tensor.dtype, getattr(torch, content.get("dtype", "float32")), key=TOLERANCE.get)
        scale = tensor.double().abs().max().clamp_min(1e-30)
        difference = ((found[name].double() - tensor.double()).abs().max() / scale / TOLERANCE[coarsest]).item()
        difference /= SLACK.get(content["merge_method"], 1)
        worst = max(worst, (difference, name))
    return worst


def verdict(path: Path, our_message: str | None, their_message: str | None, documented: str) -> tuple[str, str]:
    """How a recipe ended, and what is wrong with that, if anything."""
    if our_message is None and their_message is None:
        difference, name = largest_difference(path)
        return SAME, "" if difference <= 1 else f"'{name}' differs by {difference:.3g} tolerances"
    if our_message is None:
        reason = next((words for part, words in WIDER.items() if part in str(their_message)), None)
        return f"merged here, not by mergekit: {reason}", "" if reason and reason in documented else f"mergekit: {their_message}"
    if their_message is not None:
        return "refused by both", ""
    reason = next((words for part, words in REFUSED.items() if part in our_message), None)
    return f"refused here: {reason}", "" if reason and reason in documented else our_message


def mergekits(python: str, paths: list[Path], found: Path) -> dict[str, str | None]:
    """Merges beside the recipes: each one's error, or None. Raises RuntimeError where mergekit does not run."""
    command = [python, "-c", MERGEKIT, str(found), *map(str, paths)]
    run = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    if not found.exists():
        raise RuntimeError(run.stderr[-3000:])
    return json.loads(found.read_text())


def table(endings: dict[str, Counter[str]]) -> str:
    """Of each method the recipes that were drawn, those that both merged to the same numbers or to others, and the rest."""
    columns = ("recipes", "equal", "different", "not merged by both")
    rows = [[method, *(str(counts[column]) for column in columns)] for method, counts in endings.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in [["method", *columns], ["---"] + ["---:"] * len(columns), *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", required=True, help="python that has mergekit")
    parser.add_argument("--each", type=int, default=10, help="recipes of each method that both are to have merged, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", default=METHODS, help="of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    documented = (Path(__file__).parents[2] / "docs/files.md").read_text()
    draw = random.Random(arguments.seed)
    counts: Counter[str] = Counter()
    endings: dict[str, Counter[str]] = {method: Counter() for method in arguments.methods}
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_models(root)
        for round_ in range(ROUNDS):
            drawn: dict[Path, str] = {}
            for method, ended in endings.items():
                missing = arguments.each - ended["equal"] - ended["different"]
                for _ in range(missing + missing // 2 if missing > 0 else 0):  # some are to be refused
                    path = root / f"{round_}-{len(drawn):03d}.yaml"
                    path.write_text(yaml.safe_dump(recipe(draw, root, method), sort_keys=False))
                    drawn[path] = method
            if not drawn:
                break
            theirs = mergekits(arguments.mergekit, list(drawn), root / f"{round_}.json")
            for path, method in drawn.items():
                how, fault = verdict(path, ours(path), theirs[str(path)], documented)
                counts[how] += 1
                endings[method]["recipes"] += 1
                endings[method]["not merged by both" if how != SAME else "different" if fault else "equal"] += 1
                if fault:
                    wrong += 1
                    print(f"{path.name}: {how}: {fault}\n{path.read_text()}")
    few = [method for method, ended in endings.items() if ended["equal"] + ended["different"] < arguments.each]
    print(table(endings), "", sep="\n")
    for how, count in counts.most_common():
        print(f"{count:4d} {how}")
    print(f"{counts.total() - wrong} of {counts.total()} recipes end as they should")
    if few:
        print(f"fewer than {arguments.each} recipes of {', '.join(few)} were merged by both")
    return int(wrong > 0 or bool(few))


if __name__ == "__main__":
    sys.exit(main())
