"""The code that loads a merged model, for its report and its card."""

from __future__ import annotations

import keyword
from collections.abc import Mapping, Sequence
from typing import Any

MODEL = """\
from transformers import {architecture}

folder = {folder!r}  # where it lies
model = {architecture}.from_pretrained(folder)
"""
HEAD = """
from safetensors.torch import load_file
from torch import nn

for name, tensor in load_file(f"{{folder}}/heads/" + {file!r}).items():  # the head of one task
    module, _, parameter = name.rpartition(".")
    setattr(model.get_submodule(module), parameter, nn.Parameter(tensor))
"""
TENSORS = """\
from pathlib import Path

from safetensors.torch import load_file

folder = {folder!r}  # where it lies
weights = {{}}  # for load_state_dict of your module
for file in Path(folder).glob("*.safetensors"):
    weights |= load_file(file)
"""


def loading_code(folder: str, configuration: Mapping[str, Any] | None, heads: Sequence[str] = ()) -> str:
    """Python that runs beside the folder. configuration: its config.json, which others may have written: of it nothing but the
    name of a class gets into the code. heads: tasks, of which the first one's is put into the model."""
    if configuration is None or "model_type" not in configuration:
        return TENSORS.format(folder=folder)
    match configuration.get("architectures"):
        case [architecture, *_]:
            pass
        case _:
            architecture = None
    named = isinstance(architecture, str) and architecture.isidentifier() and not keyword.iskeyword(architecture)
    architecture = architecture if named and "auto_map" not in configuration else "AutoModel"
    code = MODEL.format(architecture=architecture, folder=folder)
    return code + (HEAD.format(file=f"{heads[0]}.safetensors") if heads else "")
