"""What a model learns from its teachers: their logits, which examples are worth learning from, and how much each counts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.config import TaughtConfig
from samerge_ext.learning.language_model import OfExpert
from samerge_ext.learning.losses import ExpertAnswers, entropies
from samerge_ext.learning.nested import map_tensors, to_device
from samerge_ext.learning.passes import Logits, answers_to
from samerge_ext.learning.shared_encoder import SharedEncoder, batch_size, concatenate
from samerge_ext.learning.teachers import most_likely_answers, teacher_answers
from samerge_ext.merged.model import MergedModel

# A batch's answers of its teacher, and the weights [B] of its rows where they have some.
Lesson = tuple[ExpertAnswers, Tensor | None]


def lessons(
    model: MergedModel, calibration: Calibration, logits: Logits, config: TaughtConfig, temperature: float = 1.0
) -> tuple[Calibration, dict[str, list[Lesson]]]:
    """The calibration set that is learned from, and task -> what each of its batches is to become.

    temperature: of the teachers' soft-max, where config.teacher_top_k of its classes are kept.
    Raises ValueError where examples cannot be told apart, or cannot be given to another task's expert.
    """
    if config.confidence_weights and len(model.packed.tasks) < 2:
        raise ValueError("confidence_weights compares experts, and there is one; leave it out")
    teachers: dict[str, list[Any]]
    if config.teacher_top_k is None:
        teachers = dict(teacher_answers(model, calibration, logits, config.precision, config.teacher_cache))
    else:
        settings = (config.precision, config.teacher_cache, config.teacher_top_k, temperature)
        teachers = dict(most_likely_answers(model, calibration, logits, *settings))
    if config.samples is not None:
        calibration, teachers = by_difficulty(model.module, calibration, teachers, logits, config)
    if not config.confidence_weights:
        return calibration, {task: [(values, None) for values in of_task] for task, of_task in teachers.items()}
    weights = confidence(model, calibration, teachers, logits, config.precision)
    return calibration, {task: list(zip(of_task, weights[task], strict=True)) for task, of_task in teachers.items()}


def confidence(
    model: MergedModel, calibration: Calibration, teachers: dict[str, list[Any]], logits: Logits, precision: str
) -> dict[str, list[Tensor]]:
    """task t -> the weight of every row of its batches, 1 − H(p_t) / Σ_k H(p_k): large where the task's own expert is certain of
    a row and the others, each with its own head, are not. Where all are certain, 1 − 1/T."""
    own = {
        task: [entropies(one.projected() if isinstance(one, OfExpert) else one) for one in to_device(given, model.device)]
        for task, given in teachers.items()
    }
    total = {task: [rows.clone() for rows in of_task] for task, of_task in own.items()}
    for expert in model.packed.tasks:
        with model.teacher(expert) as module:
            for task, batches in calibration.batches.items():
                for index, batch in enumerate(batches if task != expert else ()):
                    try:
                        found = entropies(answers_to(logits, module, to_device(batch, model.device), expert, precision))
                    except Exception as error:
                        error.add_note(f"confidence_weights gives the batches of task '{task}' to expert '{expert}' too")
                        raise
                    if len(found) != len(total[task][index]):
                        raise ValueError(
                            f"confidence_weights: expert '{expert}' gives {len(found)} rows of logits for batch {index} of task "
                            f"'{task}', whose own expert gives {len(total[task][index])}"
                        )
                    total[task][index] += found
    equal = 1 / len(model.packed.tasks)
    return {
        task: [1 - torch.where(every > 0, one / every, equal) for one, every in zip(own[task], total[task], strict=True)]
        for task in own
    }


def by_difficulty(
    module: nn.Module, calibration: Calibration, teachers: dict[str, list[Tensor]], logits: Logits, config: TaughtConfig
) -> tuple[Calibration, dict[str, list[Tensor]]]:
    """``config.samples`` examples of every task, or all where it has no more, with their teachers' logits: of as many equally
    large strata from the easiest to the hardest the one in the middle. An example's difficulty is 1 − max_c p_t(c | x).

    They stay in the order given, in batches as large as the largest one.
    """
    join = logits.concatenate if isinstance(logits, SharedEncoder) else concatenate
    batches, kept = {}, {}
    for task, given in calibration.batches.items():
        examples = [_example(batch, row, task) for batch in given for row in range(batch_size(batch))]
        rows = torch.cat(teachers[task])
        if len(rows) != len(examples):
            raise ValueError(
                f"samples={config.samples} chooses among the {len(examples)} examples of task '{task}', and its logits have "
                f"{len(rows)} rows, not one for each"
            )
        difficulty = 1 - rows.double().softmax(1).amax(1)
        count = min(len(rows), config.samples or len(rows))
        middles = torch.arange(1, 2 * count, 2) * len(rows) // (2 * count)
        chosen = difficulty.argsort(stable=True).cpu()[middles].sort().values
        size = max(map(batch_size, given))
        batches[task] = [_padded_alike(module, join([examples[i] for i in part.tolist()])) for part in chosen.split(size)]
        kept[task] = [rows[part.to(rows.device)] for part in chosen.split(size)]
    chosen_set = Calibration(batches, tuple(batches), shuffle=config.shuffle, seed=config.seed, held_back=config.share_held_back)
    return chosen_set, kept


def _example(batch: Any, row: int, task: str) -> Any:
    size = batch_size(batch)

    def cut(tensor: Tensor) -> Tensor:
        if not tensor.dim() or tensor.shape[0] != size:
            raise ValueError(
                f"a batch of task '{task}' has {size} examples and a tensor {list(tensor.shape)}; samples= needs tensors with "
                "one row for each"
            )
        return tensor[row : row + 1]

    return map_tensors(cut, batch)


def _padded_alike(module: Any, batch: Any) -> Any:
    """What was padded to join examples of different lengths has the token that transformers' classifiers look for."""
    pad = getattr(getattr(module, "config", None), "pad_token_id", None)
    if pad is None or not isinstance(batch, dict) or not {"input_ids", "attention_mask"} <= batch.keys():
        return batch
    return {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, pad)}
