"""What config.json and tokenizer_config.json say of a model, in one spelling, whichever version of transformers wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.reading import read_json

Settings = dict[str, Any]

# Other names of one key and of one value.
KEYS = {
    "activation": "hidden_act",
    "activation_function": "hidden_act",
    "global_rope_theta": "rope_theta",
    "hidden_activation": "hidden_act",
    "local_rope_theta": "rope_local_base_freq",
    "rotary_emb_base": "rope_theta",
    "rotary_pct": "partial_rotary_factor",
}
VALUES = {"gelu_fast": "gelu_pytorch_tanh", "gelu_new": "gelu_pytorch_tanh", "swish": "silu"}
SCALINGS = {"mrope": "default", "su": "longrope"}
# What older configurations leave out, where another one of the same model has it.
LEFT_OUT = {"position_embedding_type": "absolute", "rope_scaling": None, "rope_theta": 10000.0}
# Types that compute the same with tensors of the same names, with one of them.
ALIKE = {
    "RefinedWeb": "falcon",
    "RefinedWebModel": "falcon",
    "camembert": "roberta",
    "mistral": "llama",
    "mt5": "t5",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
    "stablelm_epoch": "stablelm",
    "xlm-roberta": "roberta",
}
OF_TOKENIZER = ("bos_token", "eos_token", "do_lower_case")


def model_settings(config: Mapping[str, Any], prefix: str = "") -> Settings:
    """The keys of a config.json; those of a configuration in it with a dot: "text_config.rope_theta". Absent where null, unless
    null says something."""
    settings: Settings = {}
    nested: Settings = {}
    for key, value in {**config, **_rope(config), **_activation(config)}.items():
        key = KEYS.get(key, key)
        if isinstance(value, dict) and ("model_type" in value or key.endswith("_config")):
            nested.update(model_settings(value, f"{prefix}{key}."))
        elif key == "model_type" and not isinstance(value, str):
            continue
        elif value is not None or key in ("rope_scaling", "sliding_window"):
            settings[prefix + key] = value
    if config.get("use_sliding_window") is False:
        settings[f"{prefix}sliding_window"] = None
    for name in ("bos", "eos", "pad"):
        if isinstance(tokens := settings.get(f"{prefix}{name}_token_id"), list):
            settings[f"{prefix}{name}_token_id"] = tokens[0] if len(tokens) == 1 else sorted(tokens, key=str)
    return {**settings, **nested}


def own_labels(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The labels by their numbers; none where they are LABEL_0, LABEL_1 …, which say nothing."""
    try:
        labels = {int(number): str(label) for number, label in (config.get("id2label") or {}).items()}
    except (AttributeError, ValueError):
        return ()
    if all(label == f"LABEL_{number}" for number, label in labels.items()):
        return ()
    return tuple(labels[number] for number in sorted(labels))


def tokenizer_settings(folder: Path) -> Settings:
    """Special tokens as texts and casing, as "tokenizer.eos_token". Raises CheckpointError where the file cannot be read."""
    if not (folder / "tokenizer_config.json").is_file():
        return {}
    content = read_json(folder / "tokenizer_config.json")
    found = {key: content[key] for key in OF_TOKENIZER if content.get(key) is not None}
    return {f"tokenizer.{key}": value.get("content") if isinstance(value, dict) else value for key, value in found.items()}


def align(models: list[Settings]) -> list[Settings]:
    """The same, with the settings of a model that is a part of another one (the vision tower of CLIP, the text model of a
    multimodal one) put where the other has that part."""
    part_of = {
        kind(value): key.removesuffix("model_type") for one in models for key, value in one.items() if key.endswith(".model_type")
    }
    return [_aligned(one, part_of) for one in models]


def _aligned(settings: Settings, part_of: Mapping[str, str]) -> Settings:
    own = {key: value for key, value in settings.items() if "." not in key}
    others = {key: value for key, value in settings.items() if "." in key}
    part = part_of.get(kind(own.get("model_type", "")))
    if part and all(key.startswith("tokenizer.") for key in others):
        return {**{part + key: value for key, value in own.items()}, **others}
    if "text_config." in part_of.values() and not any(key.startswith("text_config.") for key in others):
        # Older configurations of multimodal models have the text model's keys beside their own.
        others.update({f"text_config.{key}": value for key, value in own.items() if key != "model_type"})
    return {**own, **others}


def kind(model_type: str) -> str:
    """The type that stands for all that compute the same."""
    return ALIKE.get(model_type, model_type)


def values_of(key: str, models: list[Settings]) -> Iterator[tuple[int, Any]]:
    """The models that say something of a key, by their place, and what."""
    section, leaf = key[: key.rfind(".") + 1], leaf_of(key)
    for place, settings in enumerate(models):
        if key in settings:
            yield place, settings[key]
        elif leaf in LEFT_OUT and f"{section}model_type" in settings and f"{section}text_config.model_type" not in settings:
            yield place, LEFT_OUT[leaf]


def leaf_of(key: str) -> str:
    return key.rpartition(".")[2]


def same(a: Any, b: Any) -> bool:
    """Equality; of objects, in the keys that both have."""
    if isinstance(a, dict) and isinstance(b, dict):
        return all(same(a[key], b[key]) for key in a.keys() & b.keys())
    if isinstance(a, str) and isinstance(b, str):
        return VALUES.get(a, a) == VALUES.get(b, b)
    return a == b


def _activation(config: Mapping[str, Any]) -> Settings:
    """Gemma's first configurations name another activation than the one that is computed."""
    if config.get("hidden_activation") is not None:
        return {"hidden_act": config["hidden_activation"]}
    return {"hidden_act": "gelu_pytorch_tanh"} if config.get("model_type") == "gemma" else {}


def _rope(config: Mapping[str, Any]) -> Settings:
    """rope_theta and rope_scaling, from those keys or from the newer rope_parameters, which may be of each kind of layer."""
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return {"rope_scaling": _scaling(config["rope_scaling"])} if "rope_scaling" in config else {}
    local, full = parameters.get("sliding_attention"), parameters.get("full_attention")
    parameters = full if isinstance(full, dict) else parameters
    found = {key: parameters[key] for key in ("rope_theta", "partial_rotary_factor") if key in parameters}
    if isinstance(local, dict) and "rope_theta" in local:
        found["rope_local_base_freq"] = local["rope_theta"]
    return {**found, "rope_scaling": _scaling(parameters)}


def _scaling(scaling: Any) -> Settings | None:
    """None where positions are not scaled."""
    if not isinstance(scaling, dict):
        return None
    kind = str(scaling.get("rope_type") or scaling.get("type") or "default")
    others = {key: value for key, value in scaling.items() if key not in ("type", "rope_type", "rope_theta")}
    return None if SCALINGS.get(kind, kind) == "default" else {"rope_type": SCALINGS.get(kind, kind), **others}
