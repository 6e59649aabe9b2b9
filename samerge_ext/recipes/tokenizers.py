"""What goes along with a merge: whose tokenizer, which chat template, and what the reader is told of them."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from samerge_ext.checkpoints.companions import Companions, chat_template
from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import read_text, shown
from samerge_ext.recipes.entries import parse_model
from samerge_ext.recipes.recipe import Recipe

# Templates that go by a name in mergekit's files; of its other ones, give a file.
NAMED = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
}


def companions_of(recipe: Recipe) -> Companions:
    """The base's files, or the first model's, and the chat template that the recipe asks for. Whose tokenizer goes along is known
    with the models' tensors (`merged_vocabulary`)."""
    models = [entry.model for entry in recipe.models if os.path.exists(entry.model)]
    folder = folder_of(recipe.base_model or recipe.models[0].model)
    folders = list({os.path.realpath(place): place for place in (folder, *map(folder_of, models))}.values())
    with recipe.named():
        tokenizer = _tokenizers_folder(recipe, folder)
        template = _template(recipe.chat_template, folder, folders) if recipe.chat_template else None
    if folder.is_dir():
        _tell_what_is_missing(folder, folders, tokenizer, template)
    return Companions(folder, chat_template=template)


def _tokenizers_folder(recipe: Recipe, base: Path) -> Path:
    """The folder whose tokenizer goes along."""
    if recipe.tokenizer is None or recipe.tokenizer.source in ("base", "union"):
        return base
    folder = folder_of(parse_model(recipe.tokenizer.source)[0])
    if not folder.is_dir():
        raise ValueError(f"tokenizer: {shown(recipe.tokenizer.source)} is neither base nor union nor the folder of a model")
    return folder


def _template(wanted: str, base: Path, folders: Sequence[Path]) -> str | None:
    """The chat template that is asked for; None for the one that goes along anyway."""
    if wanted == "auto":
        counted = Counter(template.strip() for folder in folders if (template := chat_template(folder)))
        if not counted:
            warnings.warn("chat_template: auto: no model has a chat template, so that none goes along", stacklevel=3)
            return None
        return counted.most_common(1)[0][0]
    if wanted in NAMED:
        return NAMED[wanted]
    place = base if wanted == "base" else Path(os.path.expanduser(wanted)) if len(wanted) < 1024 else None
    if place is not None and os.path.isdir(place):
        if (template := chat_template(place)) is None:
            raise ValueError(f"chat_template: {place} has no chat template")
        return template
    if place is not None and os.path.isfile(place):
        return read_text(place)
    if "{" not in wanted:
        known = ", ".join(("auto", "base", *NAMED))
        raise ValueError(f"chat_template: {shown(wanted)} is none of {known}, no model's folder, no file and no template")
    return wanted


def _tell_what_is_missing(folder: Path, folders: Sequence[Path], tokenizer: Path, template: str | None) -> None:
    """Says which file only other models have, and how it goes along."""
    others = [other for other in folders if other != folder]
    if not (folder / "config.json").exists():
        source = next((other for other in others if (other / "config.json").exists()), "the model that the weights belong to")
        warnings.warn(
            f"{folder} has no config.json, so that the merged folder has none and is no model to load; copy that of {source}",
            stacklevel=3,
        )
    if template is None and chat_template(tokenizer) is None:
        templates = [str(other) for other in others if chat_template(other)]
        if templates:
            warnings.warn(
                f"a chat template is in {', '.join(templates)} and none in {tokenizer}: the merged model has none; "
                "it takes most models' with chat_template: auto, or one's with chat_template: FOLDER",
                stacklevel=3,
            )
    generation = [str(other) for other in others if (other / "generation_config.json").exists()]
    if generation and not (folder / "generation_config.json").exists():
        warnings.warn(
            f"a generation_config.json is in {', '.join(generation)} and none in {folder}, so that the merged model has none; "
            "copy the one that fits",
            stacklevel=3,
        )
