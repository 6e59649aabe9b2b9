"""What takes time to know of a merge, measured later: by the recipe in its report, from the models that it was made of."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError

from samerge_ext.checkpoints.reading import CheckpointError
from samerge_ext.elementwise.similarity import similarity
from samerge_ext.recipes.data_free import file_merge
from samerge_ext.recipes.loss_slice import loss_slice
from samerge_ext.recipes.parameters import METHODS
from samerge_ext.recipes.recipe import Recipe
from samerge_ext.recipes.run import as_json, file_merge_of
from samerge_ext.reports.inputs import described
from samerge_ext.reports.report import REPORT_FILE, Report, understood


def add_similarity(report: Report, folder: Path) -> None:
    """Of the task vectors. Raises ValueError where a model is not what was merged any more, and as `similarity`."""
    recipe = _recipe(report, folder)
    if recipe.merge_method in METHODS:
        merge = file_merge_of(recipe)
    else:
        experts = [(task, entry.path, entry.parameters) for task, entry in recipe.named_experts]
        merge = file_merge(
            "task_arithmetic",
            experts,
            recipe.base_model,
            {},
            heads=recipe.heads,
            keep=recipe.keep,
            tokenizer=recipe.tokenizer_config,
            identity=as_json(recipe),
        )
    report.similarity = similarity(merge)


def add_loss_slice(report: Report, folder: Path) -> None:
    """Around λ. Raises ValueError where a model is not what was merged any more, and as `loss_slice`."""
    report.loss_slice = loss_slice(_recipe(report, folder), report.coefficients, folder.resolve().parent)


def _recipe(report: Report, folder: Path) -> Recipe:
    """The recipe, of models that are as they were."""
    if not report.recipe:
        raise CheckpointError(f"{folder} was merged in Python: its {REPORT_FILE} has no recipe to take the models from")
    try:
        recipe = Recipe.model_validate(report.recipe)
    except ValidationError as error:
        raise CheckpointError(f"{folder / REPORT_FILE}: its recipe is none that can be merged; merge again") from error
    with understood(folder):
        for model in report.models:
            if described(model["name"], model["role"], model["path"])["files"] != model["files"]:
                raise CheckpointError(
                    f"{model['path']} is not there, or not what was merged; restore it, or go to the folder that the merge ran in"
                )
    return recipe
