"""How good a model folder is on files: the perplexity of a causal language model, the accuracy of a classifier of texts or
pictures, and of CLIP."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from samerge_ext.checkpoints.folder import open_checkpoint
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import shown
from samerge_ext.checkpoints.sources import CheckpointSource
from samerge_ext.learning.language_model import LanguageModel
from samerge_ext.learning.passes import Logits, answering
from samerge_ext.models.architecture import ZERO_SHOT
from samerge_ext.models.clip_folders import clip_tokenizer
from samerge_ext.models.folders import FolderModel
from samerge_ext.models.labelled_pictures import accuracy, class_folders, spoken
from samerge_ext.models.logits import causal_lm, image_classification, sequence_classification
from samerge_ext.models.on_meta import fill
from samerge_ext.models.texts import read_labelled, read_texts
from samerge_ext.models.zero_shot import TEMPLATES, zero_shot_classification, zero_shot_head
from samerge_ext.ops.chunked_rows import workspace_for
from samerge_ext.packing.stores import check_device


@dataclass(frozen=True)
class Score:
    """Of one file of texts, or folder of pictures. perplexity: e to the mean loss, in nats, of a token given those before it,
    over all tokens of all texts but the first. accuracy: the share of texts or pictures whose largest logit is their label's.
    tokens: that were predicted."""

    file: str
    texts: int | None = None
    pictures: int | None = None
    perplexity: float | None = None
    accuracy: float | None = None
    tokens: int | None = None

    def known(self) -> dict[str, Any]:
        """What there is of it, as JSON has it."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def evaluate(
    folder: str | Path,
    files: Mapping[str, str | Path],
    *,
    limit: int | None = None,
    batch_size: int = 4,
    max_length: int = 512,
    dtype: torch.dtype | None = None,
    device: str = "cpu",
    classes: Mapping[str, str | Path] | None = None,
    templates: Mapping[str, str | Path] | None = None,
) -> dict[str, Score]:
    """The score of a model folder on the file of each task, as the architecture of its config.json says: a …ForCausalLM's
    perplexity on texts (one a line, or .jsonl), a …ForSequenceClassification's accuracy on .jsonl with "text" and "label", and
    the accuracy of a …ForImageClassification, and of CLIP of transformers and open_clip, on a folder with a subfolder of pictures
    for every class, called by its name, as config.json or ``classes`` has it, or its number (`numbers_of_folders`).

    A task's own head, heads/TASK.safetensors in the folder, is put in where there is one. Nothing is downloaded.
    limit: use the first so many texts, or pictures of all classes in turn. max_length: tokens; longer texts are cut.
    dtype: of the weights, by default as stored.
    Memory is the model's, and that of a batch. A language model's logits, batch_size × max_length × vocabulary, are made some
    rows at a time, where they are its head's product and no more (`LanguageModel`).
    classes, templates: of CLIP, task -> a file of class names in the order of their numbers, and of texts with {} in the name's
    place, one a line; by default the subfolders' names, and `zero_shot.TEMPLATES`.

    Raises ValueError for another architecture, weights or labels that are missing, files without texts, and pictures
    in no subfolder or one that is none of the classes.
    """
    check_device(device)
    folder, paths = Path(folder), {task: Path(path) for task, path in files.items()}
    model = FolderModel.of(folder, {task: folder for task in paths})
    if (classes or templates) and model.kind is not ZERO_SHOT:
        raise ValueError(f"classes and templates are CLIP's; {folder} is for {model.kind.name}")
    if model.kind.reads == "pictures":
        load = lambda task: _loaded(model, task, dtype).to(device).eval()
        return _on_pictures(model, paths, load, classes or {}, templates or {}, batch_size, limit)
    if model.kind.logits not in (causal_lm, sequence_classification):
        raise ValueError(
            f"{folder} is for {model.kind.name}; causal language models and sequence classifiers are evaluated, and on pictures "
            "image classifiers and CLIP"
        )
    classifies = model.kind.logits is sequence_classification
    labels = {task: _numbered(path, limit, model.module.config) for task, path in paths.items()} if classifies else {}
    batches = model.batches(paths, limit=limit, batch_size=batch_size, max_length=max_length)
    scores: dict[str, Score] = {}
    module: Any = None
    for task, path in paths.items():
        if module is None or (folder / "heads").is_dir():
            module = _loaded(model, task, dtype).to(device).eval()
        of_task = [{name: tensor.to(device) for name, tensor in batch.items()} for batch in batches[task]]
        with torch.no_grad():
            if classifies:
                scores[task] = _accuracy(module, of_task, labels[task], path)
            else:
                scores[task] = _perplexity(module, of_task, path)
    return scores


def surprise(logits: Logits, module: Any, batch: Mapping[str, Tensor]) -> Tensor:
    """−log p of every token but the first of each text, text after text, [tokens] in fp32 at least.

    logits: `causal_lm`, of which no more logits exist than fit into a workspace, where `answering` finds them to be a product; or
        `causal_lm.logits`, whose gradient can be taken.
    """
    kept = batch["attention_mask"].bool()
    lengths = kept.sum(1)
    ends = lengths[lengths > 0].cumsum(0)
    predicts = torch.ones(int(lengths.sum()), dtype=torch.bool, device=kept.device).index_fill(0, ends - 1, False)
    targets = batch["input_ids"][kept][1:][predicts[:-1]]
    if not isinstance(logits, LanguageModel):
        return _surprise(logits(module, batch, "")[predicts], targets)
    hidden, head, bias = logits.projected(module, batch)
    assert isinstance(head, Tensor)
    of_row = 3 * head.shape[0] * torch.float32.itemsize  # logits, in fp32 too, and their log soft-max
    rows = max(1, workspace_for(None, head.device) // of_row)
    parts = zip(hidden[predicts].split(rows), targets.split(rows), strict=True)
    return torch.cat([_surprise(F.linear(states, head, bias), wanted) for states, wanted in parts])


def _surprise(logits: Tensor, targets: Tensor) -> Tensor:  # [tokens, V], [tokens] -> [tokens]
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def _perplexity(module: Any, batches: Sequence[dict[str, Tensor]], path: Path) -> Score:
    total, tokens, texts = 0.0, 0, 0
    logits = answering(causal_lm, module, batches[0])
    for batch in batches:
        of_tokens = surprise(logits, module, batch)
        total, tokens = total + of_tokens.double().sum().item(), tokens + len(of_tokens)
        texts += len(batch["input_ids"])
    if not tokens:
        raise ValueError(f"{path}: no text has a token after its first, so that there is nothing to predict; give longer texts")
    mean = total / tokens
    return Score(str(path), texts, perplexity=math.exp(mean) if mean < 700 else math.inf, tokens=tokens)


def _accuracy(module: Any, batches: Sequence[dict[str, Tensor]], labels: Sequence[int], path: Path) -> Score:
    found = torch.cat([module(**batch).logits.argmax(1).cpu() for batch in batches])
    classes = module(**{name: tensor[:1] for name, tensor in batches[0].items()}).logits.shape[1]
    if max(labels) >= classes:
        raise ValueError(
            f"{path}: the label {max(labels)} is none of the model's {classes} classes; is it the file of another task?"
        )
    return Score(str(path), len(labels), accuracy=(found == torch.tensor(labels)).double().mean().item())


def _on_pictures(
    model: FolderModel,
    folders: Mapping[str, Path],
    load: Callable[[str], Any],
    classes: Mapping[str, str | Path],
    templates: Mapping[str, str | Path],
    batch_size: int,
    limit: int | None,
) -> dict[str, Score]:
    """load: the module with a task's own head."""
    if unknown := sorted({*classes, *templates} - set(folders)):
        raise ValueError(f"classes and templates are given of {unknown}, pictures of {sorted(folders)}; name a task alike")
    called = {task: class_folders(folder) for task, folder in folders.items()}
    named = {task: read_texts(Path(classes[task])) if task in classes else list(map(spoken, called[task])) for task in folders}
    texts = {task: read_texts(Path(path)) for task, path in templates.items()}
    scores, module = {}, None
    for task, folder in folders.items():
        own = (model.base / f"heads/{task}.safetensors").is_file()
        if module is None or (folder_of(model.base) / "heads").is_dir():
            module = load(task)
        if model.kind is ZERO_SHOT:
            names = named[task]
            head = zero_shot_head(module, clip_tokenizer(model.base, module), names, texts.get(task, TEMPLATES))
            logits: Logits = zero_shot_classification({task: head})
        else:
            labels = getattr(module.config, "id2label", None) or {}
            names = [] if own else [str(labels[number]) for number in sorted(labels)]  # of the classes of another head
            logits = image_classification
        share, count = accuracy(logits, module, folder, task, names, model.reader(task), batch_size, limit)
        scores[task] = Score(str(folder), pictures=count, accuracy=share)
    return scores


def _numbered(path: Path, limit: int | None, config: Any) -> list[int]:
    """The labels of a file by their numbers. Raises ValueError for the name of a label that config.json does not have."""
    numbers = {str(label): int(number) for number, label in (getattr(config, "id2label", None) or {}).items()}
    found = []
    for _, label in read_labelled(path, limit):
        if isinstance(label, str) and label not in numbers:
            raise ValueError(
                f"{path}: {shown(label)} is none of the labels in config.json, {', '.join(list(numbers)[:8])}; give their numbers"
            )
        found.append(numbers[label] if isinstance(label, str) else label)
    return found


def _loaded(model: FolderModel, task: str, dtype: torch.dtype | None) -> Any:
    """The model's module with the folder's weights, and the task's own head. Raises ValueError for tensors that neither has."""
    module: Any = model.module
    head = model.base / f"heads/{task}.safetensors"
    with open_checkpoint(model.base) as checkpoint:
        source = model.conversion.base(CheckpointSource(checkpoint, "model"))
        tensors = {name: source.read(name) for name in source.names}
    tensors.update(load_file(head) if head.is_file() else {})
    lacking = fill(module, tensors.items(), dtype)
    if lacking:
        raise ValueError(
            f"{model.base} lacks {', '.join(map(repr, lacking[:4]))}, and there is no heads/{task}.safetensors in it; give the "
            "file of a task with a head of its own as TASK=FILE"
        )
    return module
