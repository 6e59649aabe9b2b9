"""Recipes with mergekit's `tokenizer` through mergekit 0.1.5 and through samerge: every token has the same row, to rounding.

    python tests/support/mergekit_tokenizers.py --mergekit PYTHON

PYTHON: of an environment that has mergekit (`make mergekit-differential` makes one). Models are tiny Llamas with different tokens
in different rows: more and fewer, moved, in padded rows, one stored in bf16. mergekit numbers a union's tokens in an order of its
own, so that rows are compared by their tokens. Prints how each recipe ended; one that is to end otherwise (`OTHERWISE`) is
listed in docs/files.md.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from mergekit_differential import TOLERANCE, mergekits, ours
from safetensors.torch import load_file
from vocabularies import EMBEDDINGS, HEAD, write_model

BASE = ["?", "a", "b", "c", "d", "e"]
MODELS = {
    "base": (BASE, None, ()),
    "more": ([*BASE, "<m>", "<both>"], None, ("<m>", "<both>")),
    "fewer": (["?", "a", "b", "c"], None, ()),
    "moved": (["?", "c", "a", "b", "e", "d", "<both>"], None, ("<both>",)),
    "padded": (BASE, 16, ()),
    "padded-more": ([*BASE, "<p>"], 8, ("<p>",)),
    "narrow": ([*BASE, "<n>"], None, ("<n>",)),
}


def token(name: str, source: object = None, **keys: object) -> dict:
    """A union in which a token's row is told."""
    return {"tokenizer": {"source": "union", "tokens": {name: {"source": source, **keys}}}}


def of(model: str, **which: object) -> dict:
    return {"kind": "model_token", "model": model, **which}


def source(name: str, **keys: object) -> dict:
    return {"tokenizer": {"source": name, **keys}}


UNION = {"tokenizer_source": "union"}
# name -> models that are merged, and the recipe's other keys; a model in braces is put there as a path.
RECIPES: dict[str, tuple[list[str], dict]] = {
    "base, tokens more": (["more", "base"], source("base")),
    "base, tokens fewer": (["fewer", "more"], source("base")),
    "base, moved": (["moved", "more"], {"tokenizer_source": "base"}),
    "union": (["more", "moved"], source("union")),
    "union, tokenizer_source": (["more", "fewer"], UNION),
    "union of four": (["more", "moved", "fewer", "padded-more"], UNION),
    "union, no base": (["more", "moved", "fewer"], {"merge_method": "linear", **UNION}),
    "union, linear beside the base": (["more", "moved", "base"], {"merge_method": "linear", "base_model": "{base}", **UNION}),
    "union, slerp": (["more"], {"merge_method": "slerp", "parameters": {"t": 0.3}, **UNION}),
    "union, ties": (["more", "moved"], {"merge_method": "ties", "parameters": {"density": 1.0}, **UNION}),
    "union, bf16": (["narrow", "more"], UNION),
    "a model's": (["more", "moved"], source("{moved}")),
    "a model's that is not merged": (["more", "padded"], source("{moved}")),
    "padded rows": (["padded", "padded-more"], source("base")),
    "padded rows, union": (["padded", "padded-more"], source("union")),
    "padded rows, nothing asked": (["padded"], {}),
    "padded base": (["base", "more"], {"tokenizer_source": "base", "base_model": "{padded}"}),
    "padded to 8": (["more", "moved"], source("union", pad_to_multiple_of=8)),
    "padded to 3": (["more", "fewer"], source("base", pad_to_multiple_of=3)),
    "token of a model": (["more", "moved"], token("<both>", "{moved}")),
    "token of a model, forced": (["more", "moved"], token("a", "{more}", force=True)),
    "token of another": (["more", "fewer"], token("<new>", of("{more}", token="<m>"))),
    "token by number, forced": (["more", "fewer"], token("b", of("{fewer}", token_id=1), force=True)),
    "token of zeros": (["more", "moved"], token("<new>", {"kind": "zero"})),
    "token of nobody": (["fewer", "base"], {**source("{more}"), "base_model": "{fewer}"}),
    "token added to the base's": (["more", "moved"], source("base", tokens={"<new>": {"source": {"kind": "zero"}}})),
    "token without a source": (["more", "moved"], token("<both>")),
    "token of a model that lacks it": (["more", "fewer"], token("e", "{fewer}")),
    "token of a model that is not merged": (["more", "fewer"], token("e", "{padded}")),
}
# What is to end otherwise -> how, and the words of docs/files.md that tell it.
OTHERWISE = {
    "padded rows, nothing asked": ("merged here alone", "padded rows without a `tokenizer`"),
    "token without a source": ("merged here alone", "a token without a source"),
    "token added to the base's": ("merged here alone", "one that is added to the base's tokenizer"),
}
REFUSED = ("token of a model that lacks it", "token of a model that is not merged")  # by both


def write_recipe(root: Path, name: str) -> Path:
    models, keys = RECIPES[name]

    def placed(value):
        if isinstance(value, dict):
            return {key: placed(each) for key, each in value.items()}
        return str(root / value[1:-1]) if isinstance(value, str) and value.startswith("{") else value

    content = {"merge_method": "task_arithmetic", **placed(keys)}
    if content["merge_method"] != "linear":
        content.setdefault("base_model", str(root / "base"))
    weights = [0.7, 0.4, 0.3, 0.2]
    content["models"] = [
        {"model": str(root / model), "parameters": {"weight": weight}} for model, weight in zip(models, weights, strict=False)
    ]
    path = root / f"{name.replace(' ', '-').replace(',', '')}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def fault(path: Path) -> str:
    """Where the two merged models differ; empty where every token has the same row, and every other tensor is the same."""
    import transformers

    found, expected = (load_file(path.with_suffix(suffix) / "model.safetensors") for suffix in (".samerge", ".mergekit"))
    read = transformers.AutoTokenizer.from_pretrained
    tokens, numbers = (read(path.with_suffix(suffix)).get_vocab() for suffix in (".samerge", ".mergekit"))
    if found.keys() != expected.keys() or tokens.keys() != numbers.keys():
        return f"other tensors {found.keys() ^ expected.keys()} or tokens {tokens.keys() ^ numbers.keys()}"
    configured = yaml.safe_load((path.with_suffix(".samerge") / "config.json").read_text())["vocab_size"]
    for name, tensor in expected.items():
        ours_, scale = found[name], tensor.double().abs().max().clamp_min(1e-30)
        pairs = [(ours_, tensor)]
        if name in (EMBEDDINGS, HEAD):
            if configured != len(ours_):
                return f"{configured} tokens in config.json, {len(ours_)} rows"
            pairs = [(ours_[number], tensor[numbers[token]]) for token, number in tokens.items()]
            if "pad_to_multiple_of" in path.read_text():
                if ours_.shape != tensor.shape:
                    return f"{len(ours_)} rows, {len(tensor)} there"
                pairs.append((ours_[len(tokens) :], tensor[len(tokens) :]))
        for one, other in pairs:
            difference = ((one.double() - other.double()).abs().max() / scale).item() if one.numel() else 0.0
            if one.dtype != other.dtype or difference > TOLERANCE[one.dtype]:
                return f"'{name}' ({one.dtype}, {other.dtype}) differs by {difference:.3g}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", required=True, help="python that has mergekit")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    documented = " ".join((Path(__file__).parents[2] / "docs/files.md").read_text().split())
    wrong = equal = 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for seed, (name, (words, rows, added)) in enumerate(MODELS.items()):
            dtype = torch.bfloat16 if name == "narrow" else torch.float32
            write_model(root / name, words, rows, seed=seed, added=added, dtype=dtype)
        paths = {name: write_recipe(root, name) for name in RECIPES}
        theirs = mergekits(arguments.mergekit, list(paths.values()), root / "found.json")
        for name, path in paths.items():
            here, there = ours(path), theirs[str(path)]
            if here is None and there is None:
                ended = fault(path) or "equal"
            elif here is None or there is None:
                ended = "merged here alone" if here is None else "merged by mergekit alone"
            else:
                ended = "refused by both"
            expected, words = OTHERWISE.get(name, ("refused by both" if name in REFUSED else "equal", ""))
            equal += ended == "equal"
            fits = ended == expected and words in documented
            wrong += not fits
            print(f"{name}: {ended}{'' if fits else f' (expected: {expected}; here: {here}; mergekit: {there})'}")
    print(f"{equal} of {len(RECIPES)} recipes with a tokenizer are equal, {len(RECIPES) - wrong} end as they should")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
