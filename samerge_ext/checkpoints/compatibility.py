"""Whether model folders whose tensors have the same shapes fit together: what their config.json and their tokenizers say."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from samerge_ext.checkpoints.places import WEIGHTS, folder_of, is_adapter
from samerge_ext.checkpoints.reading import CheckpointError, cut, read_json
from samerge_ext.checkpoints.settings import (
    Settings,
    align,
    kind,
    leaf_of,
    model_settings,
    own_labels,
    same,
    tokenizer_settings,
    values_of,
)
from samerge_ext.checkpoints.sources import matches
from samerge_ext.checkpoints.vocabulary import Vocabulary, difference

# A tensor means something else where these differ: the model, which of its rows are one head, how positions come in.
MEANING = re.compile(
    r"model_type|position_embedding_type|alibi|(\w+_)?head_dim|d_kv|\w*attention_heads|(\w+_)?(n|num)_(\w+_)?heads?(_kv)?"
)
# Where these differ, tensors of fine-tunes of one model mean the same, but were trained to be computed with in another way.
COMPUTED = re.compile(
    r"rope_theta|rope_scaling|rope_local_base_freq|partial_rotary_factor|max_position_embeddings|sliding_window|local_attention"
    r"|layer_types|(rms_|layer_?)?norm_(eps|epsilon)|layer_norm_epsilon|hidden_act|dense_act_fn|tie_word_embeddings|is_decoder"
    r"|image_size|patch_size|num_experts_per_tok|norm_topk_prob|routed_scaling_factor|query_pre_attn_scalar|logits?_scal(e|ing)"
    r"|(attn|final)_logit_softcapping|(embedding|residual|attention)_multiplier|scale_\w+|relative_attention_max_distance"
    r"|pos_att_type|use_parallel_residual|(bos|eos|pad)_token(_id)?|do_lower_case"
)
SPEECH = re.compile("wav2vec2|hubert|wavlm|sew|unispeech|data2vec-audio|parakeet")  # know tokens in their output layer alone
# How classifiers and embeddings of tokens are called, to tell whether heads= keeps them per task.
CLASSIFIERS = (
    "classifier.weight", "classifier.dense.weight", "classifier.out_proj.weight", "classification_head.dense.weight",
    "classification_head.out_proj.weight", "score.weight", "head.weight", "head.fc.weight", "fc.weight", "logits_proj.weight",
)  # fmt: skip
EMBEDDINGS = (
    "model.embed_tokens.weight", "model.language_model.embed_tokens.weight", "transformer.wte.weight", "shared.weight",
    "bert.embeddings.word_embeddings.weight", "roberta.embeddings.word_embeddings.weight", "embeddings.word_embeddings.weight",
)  # fmt: skip


class CompatibilityWarning(UserWarning):
    """Merged models differ in what their tensors are computed with, or in what a number that goes in or comes out means."""

    shown_as = "warning"  # by the command line, to which what else the package says is a note


def check_models(
    base: str | Path | None,
    experts: Sequence[tuple[str, str | Path]],
    heads: str | Sequence[str] = (),
    *,
    aligned: bool = False,
) -> None:
    """Compares config.json and tokenizers of model folders; what only some of them have is not compared.

    base: None where experts are combined without one.
    heads: patterns of tensors that are kept per task: labels do not count where these name the classifier, nor vocabularies
        where they name the embeddings. aligned: nor do these where the models' rows are brought under one (`merged_vocabulary`).

    Raises ValueError where the merge of two tensors of one shape would mean nothing: another model type, other attention heads,
    another kind of positions, tokens that have other numbers; it names all of it. Raises CheckpointError for a config.json that
    cannot be read. Warns (`CompatibilityWarning`), once for every other difference, with both models and both values.
    """
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    named = [("base", base)] if base is not None else []
    named += [(f"expert '{task}'", path) for task, path in experts if base is None or Path(path) != Path(base)]
    models = [_read(label, Path(path)) for label, path in named]
    found = [*_settings(models), *_labels(models, heads), *(() if aligned else _vocabularies(models, heads))]
    if base is not None:
        found += _without_config(models)
    if faults := [text for is_fault, text in found if is_fault]:
        raise ValueError("\n".join(faults))
    for _, text in found:
        warnings.warn(text, CompatibilityWarning, stacklevel=3)


Found = Iterator[tuple[bool, str]]  # whether it is an error, and what differs


@dataclass
class _Model:
    label: str
    folder: Path
    settings: Settings = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    unread: str = ""  # why its tokenizer's settings are not known


def _read(label: str, path: Path) -> _Model:
    folder = folder_of(path)
    model = _Model(f"{label} ({path})", folder)
    if not is_adapter(folder) or any((folder / name).is_file() for name in WEIGHTS):  # an adapter's settings are its base's
        if (folder / "config.json").is_file():
            config = read_json(folder / "config.json")
            model.settings, model.labels = model_settings(config), own_labels(config)
    try:
        model.settings.update(tokenizer_settings(folder))
    except CheckpointError as error:
        model.unread = str(error)
    return model


def _without_config(models: list[_Model]) -> Found:
    """A base whose configuration, which the merged model has, is missing, where an expert's is there to be copied."""
    other = next((model.folder for model in models[1:] if "model_type" in model.settings), None)
    if other is not None and models[0].folder.is_dir() and not (models[0].folder / "config.json").is_file():
        yield (
            False,
            (
                f"{models[0].label} has no config.json, so the merged model has none and is not loaded by transformers: copy "
                f"{other / 'config.json'} to it, where it fits"
            ),
        )


def _settings(models: list[_Model]) -> Found:
    """Settings in which a model differs from the first one that says something of them: from the base, mostly."""
    settings = align([model.settings for model in models])
    keys = list(dict.fromkeys(key for one in settings for key in one))
    told: set[tuple[int, str]] = set()
    faults: dict[int, list[str]] = {}
    for key in keys:
        leaf = leaf_of(key)
        if not (MEANING.fullmatch(leaf) or COMPUTED.fullmatch(leaf)):
            continue
        (first, expected), *others = values_of(key, settings)
        for place, value in others:
            name = leaf.removesuffix("_id")  # of a special token, told by its number or else by its text
            if same(value, expected) or (place, name) in told or (name == "pad_token" and first != 0):
                continue
            told.add((place, name))
            text = f"{key} is {_shown(value)}, in {models[first].label} it is {_shown(expected)}"
            if MEANING.fullmatch(leaf) and not (leaf == "model_type" and kind(value) == kind(expected)):
                faults.setdefault(place, []).append(text)
            else:
                yield False, f"{models[place].label}: {text}{_kept(models[first])}"
    for place, texts in faults.items():
        yield (
            True,
            (
                f"{models[place].label}: {'; '.join(texts)}. Tensors of one shape mean different things there, and their merge "
                "nothing: merge fine-tunes of one model; where only config.json is wrong, put it right"
            ),
        )


def _labels(models: list[_Model], heads: tuple[str, ...]) -> Found:
    """Classes with other names, or in another order. Where their number differs, so do shapes, unless there is no classifier."""
    if any(matches(name, heads) for name in CLASSIFIERS):
        return
    first: dict[int, _Model] = {}
    for model in models:
        other = first.setdefault(len(model.labels), model)
        mine, others = ([label.casefold() for label in one.labels] for one in (model, other))
        if mine != others:
            what = "has the classes in another order" if sorted(mine) == sorted(others) else "has other classes"
            yield (
                False,
                (
                    f"{model.label}: id2label {what}: {_shown(model.labels)}, in {other.label} {_shown(other.labels)}; a merged "
                    "classifier mixes them: keep it per task with heads=, as in heads=['classifier.*']"
                ),
            )


def _vocabularies(models: list[_Model], heads: tuple[str, ...]) -> Found:
    for model in models:
        if model.unread:
            yield False, f"{model.label}: its tokenizer is not compared: {model.unread}"
    speech = any(SPEECH.match(str(model.settings.get("model_type"))) for model in models)
    if any(matches(name, heads) for name in (("lm_head.weight",) if speech else EMBEDDINGS)):
        return
    known = [model for model in models if Vocabulary(model.folder).files()]
    if not known:
        return
    base, *others = known
    vocabulary = Vocabulary(base.folder)  # keeps what it read; an expert's is let go
    for model in others:
        try:
            differs = difference(vocabulary, Vocabulary(model.folder))
        except CheckpointError as error:
            yield False, f"{model.label}: its tokenizer is not compared with that of {base.label}: {error}"
            continue
        if differs and differs.total:
            yield (
                True,
                (
                    f"{model.label}: its tokenizer is not that of {base.label}: {differs.text}. Rows of the embeddings stand for "
                    "other tokens there, and their merge for none: merge them token by token with tokenizer: base or union (in "
                    "Python tokenizer='base'); where only the expert's tokenizer files are wrong, put the base's in their place"
                ),
            )
        elif differs:
            kept = f"{_kept(base)}, and all models' with tokenizer: union" if _kept(base) else ""
            yield False, f"{model.label}: its tokenizer is not quite that of {base.label}: {differs.text}{kept}"


def _kept(first: _Model) -> str:
    return "; the merged model has the base's" if first.label.startswith("base (") else ""


def _shown(value: Any) -> str:
    """A value as it stands in JSON, more or less, cut where it is long."""
    text = "none" if value is None else ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return cut(text)
