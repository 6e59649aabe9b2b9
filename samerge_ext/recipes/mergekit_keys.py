"""mergekit's ways to say a merge, as the keys of a recipe."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from samerge_ext.checkpoints.reading import shown
from samerge_ext.recipes.entries import check_keys, mapping_of, parse_model, without_nulls

# Options of mergekit's command line that people keep in their files: how mergekit works, not what it merges.
OPTIONS = (
    "allow_crimes", "transformers_cache", "lora_merge_cache", "lora_merge_dtype", "cuda", "device", "low_cpu_memory",
    "out_shard_size", "copy_tokenizer", "clone_tensors", "trust_remote_code", "lazy_unpickle", "write_model_card",
    "safe_serialization", "verbosity", "quiet", "read_to_gpu", "multi_gpu", "num_threads", "gpu_rich", "async_write",
    "write_threads",
)  # fmt: skip
REFUSED = {
    "modules": "parts of a model are not merged by rules of their own; give 'models', and values by a part of the tensors' names",
    "unsafe_truncate_embeddings": "rows are not cut in any order; 'tokenizer: base' merges those of the base's tokens",
}


def as_recipe(content: Mapping[str, Any]) -> dict[str, Any]:
    """A file's content with slices as models, options left out, and types under torch's names.

    Raises ValueError for what mergekit does and is not done here, naming the key and what is.
    """
    recipe = without_nulls(dict(content))
    for key, reason in REFUSED.items():
        if recipe.get(key):
            raise ValueError(f"'{key}': {reason}")
    left_out = [key for key in (*OPTIONS, *REFUSED) if key in recipe]
    if left_out:
        warnings.warn(f"{', '.join(left_out)}: mergekit's options; they change nothing here", stacklevel=2)
    recipe = {key: value for key, value in recipe.items() if key not in left_out and key != "name"}
    for key in ("dtype", "out_dtype"):
        if isinstance(recipe.get(key), str):
            recipe[key] = recipe[key].removeprefix("torch.")
    if "slices" in recipe:
        recipe = _of_slices(recipe)
    if "random_seed" in recipe:
        seed = recipe.pop("random_seed")
        if str(recipe.get("merge_method", "")).startswith(("dare", "della")):
            recipe["parameters"] = {"seed": seed, **without_nulls(mapping_of(recipe, "parameters"))}
    if "tokenizer_source" in recipe:
        if "tokenizer" in recipe:
            raise ValueError("'tokenizer_source' and 'tokenizer' say the same; give one of them")
        recipe["tokenizer"] = {"source": recipe.pop("tokenizer_source")}
    return recipe


def _of_slices(recipe: dict[str, Any]) -> dict[str, Any]:
    """`models`, `base_model` and `parameters` of one slice; of several the models that are in them, and the slices."""
    slices = recipe.pop("slices")
    if "models" in recipe:
        raise ValueError("'models' and 'slices' both say what is merged; give one of them")
    if not (isinstance(slices, list) and slices and all(isinstance(entry, dict) for entry in slices)):
        raise ValueError(f"'slices': {shown(slices)}; a list of slices is expected, each with its sources")
    slices = [without_nulls(entry) for entry in slices]
    for entry in slices:
        check_keys(entry, ("sources", "base_model", "parameters", "residual_weight"))
        sources = entry.get("sources")
        if not isinstance(sources, list) or not all(isinstance(source, dict) and source.get("layer_range") for source in sources):
            raise ValueError("'slices': every source needs a model and its layer_range, [first layer, layer after the last]")
        if "base_model" in entry:
            if "base_model" in recipe and parse_model(recipe["base_model"]) != parse_model(entry["base_model"]):
                raise ValueError("'base_model' of the slice is another one than the file's; give one base")
            recipe["base_model"] = entry["base_model"]
    if len(slices) > 1:
        models = {str(parse_model(source.get("model", ""))): source for entry in slices for source in entry["sources"]}
        entries = [{key: source[key] for key in ("model", "adapter") if key in source} for source in models.values()]
        slices = [{key: entry[key] for key in ("sources", "parameters") if key in entry} for entry in slices]
        return {**recipe, "models": entries, "slices": slices}
    (whole,) = slices
    first, then = mapping_of(whole, "parameters"), mapping_of(recipe, "parameters")
    both = {key: [*_by_name(first[key]), *_by_name(then[key])] for key in first if key in then}
    return {**recipe, "models": whole["sources"], "parameters": {**then, **first, **both}}


def _by_name(setting: Any) -> list[Any]:
    """A setting as a list of settings by name, the next of which counts where none fits."""
    if isinstance(setting, dict):
        return [setting]
    if isinstance(setting, list) and any(isinstance(entry, dict) for entry in setting):
        return setting
    return [{"value": setting}]
