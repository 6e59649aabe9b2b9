"""The loss of a learned merge along a line through its λ: how flat it is where learning ended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from samerge_ext.budget.holding import make_model
from samerge_ext.learning.loop import calibration_set
from samerge_ext.learning.losses import number_of_rows
from samerge_ext.learning.nested import to_device
from samerge_ext.learning.passes import losses_and_gradient, mean_loss
from samerge_ext.learning.prefetch import Input
from samerge_ext.learning.teaching import lessons
from samerge_ext.methods.configs import SAMergingConfig
from samerge_ext.methods.samerging import distillation
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import model_and_calibration, packed_weights

REACH, POINTS = 3, 13  # the line goes so many times SAM's radius to both sides, and has so many points


def loss_slice(recipe: Recipe, coefficients: Mapping[str, Mapping[str, float]], beside: Path) -> dict[str, Any]:
    """samerging's loss over its whole calibration set at λ + d · g / ‖g‖, g its gradient at λ.

    coefficients: task -> layer -> λ. beside: a folder for a packed file, where only that fits the recipe's memory budget.
    Gives the "distances" d, from −3ρ to 3ρ, the "losses", the "gradient_norm" ‖g‖ and the number of "batches".
    Raises ValueError for another method, for heads or components that were learned beside λ, and for models that are others now.
    """
    settings = recipe.method_settings() if recipe.merge_method == "samerging" else None
    if not isinstance(settings, SAMergingConfig):
        raise ValueError(f"a slice of the loss is of samerging's; {recipe.merge_method} has no such loss")
    if settings.train_heads or settings.granularity == "rank":
        raise ValueError("a slice of the loss is along λ alone; this merge also learned heads, or λ of singular components")
    settings = replace(settings, checkpoint_dir=None)
    model, calibration = model_and_calibration(recipe)
    with TemporaryDirectory(dir=beside) as state:
        packed = packed_weights(recipe, model, Path(state))
        point = _point(packed, coefficients)
        held = calibration_set(calibration, packed, settings)
        merged, logits = make_model(model.module, packed, settings, held, model.logits, teachers=True)
        held, taught = lessons(merged, held, logits, settings)
        weights, objective, point = settings.weights(packed.tasks), distillation(settings), point.to(merged.device)

        options: dict[str, Any] = {"logits": logits, "objective": objective, "precision": settings.precision}
        gradient_of = partial(losses_and_gradient, merged, point, **options)
        gradient = torch.zeros_like(point)
        for task, of_task in taught.items():
            rows = [number_of_rows(answers) for answers, _ in of_task]
            for batch, lesson, count in zip(held.batches[task], of_task, rows, strict=True):
                inputs = {task: to_device(Input(batch, lesson), merged.device)}
                share = {task: weights[task] * count / sum(rows)}
                gradient += gradient_of(inputs=inputs, task_weights=share)[1]

        if settings.granularity == "task":
            gradient = gradient.sum(1, keepdim=True)
        norm, reach = gradient.norm().item(), REACH * settings.rho

        def loss_at(distance: float) -> float:
            inputs = (
                (task, to_device(Input(*pair), merged.device))
                for task in packed.tasks
                for pair in zip(held.batches[task], taught[task], strict=True)
            )
            there = point + distance / (norm or 1) * gradient
            return mean_loss(merged, there, inputs, task_weights=weights, **options)

        distances = [reach * (2 * i / (POINTS - 1) - 1) for i in range(POINTS)]
        losses = [loss_at(distance) for distance in distances]
    batches = sum(map(len, held.batches.values()))
    return {"distances": distances, "losses": losses, "gradient_norm": norm, "batches": batches}


def _point(packed: PackedWeights, coefficients: Mapping[str, Mapping[str, float]]) -> Tensor:  # [T, L]
    names = list(packed.layout.names)
    if list(coefficients) != list(packed.tasks) or any(list(row) != names for row in coefficients.values()):
        raise ValueError("the report's λ are of other tasks or layers than the recipe's models have now; merge them again")
    return packed.coefficients(torch.tensor([list(row.values()) for row in coefficients.values()], dtype=torch.float64))
