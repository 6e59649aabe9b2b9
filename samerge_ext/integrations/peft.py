"""PEFT's LoRA adapters merged with learned weights, of a PeftModel in memory or of folders: into one adapter where that is exact.

    from samerge_ext.integrations.peft import merge_adapters, save_merged

    result = merge_adapters(peft_model, calibration, logits)   # its adapters, with any learned method
    save_merged(result, "merged/")                             # PeftModel.from_pretrained(base, "merged/")

Σ_t λ_t s_t B_t A_t is one product, of the factors λ_t s_t B_t side by side and the A_t one upon the other: an adapter whose rank
is the sum of the ranks, and that differs from the merged weights by rounding alone.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from samerge_ext.checkpoints.adapter_config import CONFIG, WEIGHTS
from samerge_ext.checkpoints.adapter_tensors import PREFIX
from samerge_ext.checkpoints.locks import partial_of
from samerge_ext.checkpoints.lora import AdapterSource
from samerge_ext.checkpoints.saving import replace_folder, require_target
from samerge_ext.checkpoints.sources import ModuleSource
from samerge_ext.learning.calibration import Calibration
from samerge_ext.learning.passes import Logits
from samerge_ext.merged.result import Result
from samerge_ext.methods.samerging import samerging
from samerge_ext.packing.factors import LORA, FactoredTaskVectors
from samerge_ext.packing.into_memory import pack_into_memory
from samerge_ext.packing.packed_weights import PackedWeights


def merge_adapters(
    model: Any,
    calibration: Mapping[str, Iterable[Any]],
    logits: Logits,
    *,
    adapters: Mapping[str, str | Path] | None = None,
    method: Callable[..., Result] = samerging,
    config: Any = None,
    heads: str | Iterable[str] = (),
    dtype: torch.dtype = torch.float32,
) -> Result:
    """Adapters merged with weights that ``method`` learns for every task and layer. No expert's weights are made; while it learns
    task vectors are, all of them, or with ``streamed`` of ``config`` none but pieces.

    model: a PeftModel, whose adapters are the tasks by their names. It is taken over: its adapters are taken off, and its base is
        ``module`` of the result, the whole merged model. Or with ``adapters``, task -> a folder that PEFT saved, the base itself.
    calibration, logits, config: as of ``method``: `samerging`, `adamerging` or `statsmerging`.
    heads: patterns of what belongs to a task and is not merged, "classifier.*" of classifiers. dtype: of the packed weights.

    Raises ValueError for a model without LoRA adapters, and a calibration set of other tasks, before the model is changed;
    CheckpointError for adapters that are no change of the base's weights.
    """
    if adapters is None and not hasattr(model, "peft_config"):
        raise ValueError(f"{type(model).__name__} has no adapters; give a PeftModel, or adapters={{task: folder}} of this base")
    held = Calibration(calibration, tuple(model.peft_config if adapters is None else adapters))
    with ExitStack() as stack:
        if adapters is None:
            adapters = _saved(model, Path(stack.enter_context(TemporaryDirectory())))
            model = model.unload()
        base = ModuleSource(model, "base")
        experts = [(t, stack.enter_context(AdapterSource(Path(at), base, f"adapter '{t}'"))) for t, at in adapters.items()]
        patterns = [heads] if isinstance(heads, str) else list(heads)
        device = next(model.parameters()).device
        packed = PackedWeights(**pack_into_memory(base, experts, dtype, LORA, device, patterns))
    result = method(model, packed, held.batches, logits, config=config)
    return replace(result, packed=packed)  # with the factors, which a merged model that is held whole has multiplied out


def save_merged(result: Result, path: str | Path, *, task_type: str | None = None) -> bool:
    """Writes what `merge_adapters` gave as one adapter that PEFT loads, where that is exact, and as a whole model otherwise, with
    a warning that says why. Returns whether it is an adapter.

    The adapter's rank is the largest sum of the ranks that a layer's adapters have; heads of tasks are heads/TASK.safetensors
    beside it, with coefficients.json. It is exact where adapters change layers by products alone: LoRA and rsLoRA of linear
    layers, Conv1D, convolutions and embeddings; not DoRA, trained biases and modules_to_save that are no heads.
    task_type: of PEFT, "CAUSAL_LM" …, for the adapter's configuration.

    Raises CheckpointError where ``path`` is taken.
    """
    path = Path(os.path.realpath(path))
    try:
        factors, embeddings = _factors(result)
    except _NoAdapter as reason:
        warnings.warn(f"{reason}: no adapter is what was merged, and the whole model is written to {path}", stacklevel=2)
        result.save_pretrained(path)
        return False
    from peft import LoraConfig

    require_target(path)
    rank = max(a.shape[0] for a, _ in factors.values())
    tensors = {}
    for module, (a, b) in factors.items():
        first, second = ("lora_embedding_A", "lora_embedding_B") if module in embeddings else ("lora_A.weight", "lora_B.weight")
        missing = rank - a.shape[0]  # one rank for all layers, which an adapter's configuration then says by itself
        tensors[f"{PREFIX}{module}.{first}"] = torch.cat([a, a.new_zeros(missing, *a.shape[1:])])
        tensors[f"{PREFIX}{module}.{second}"] = torch.cat([b, b.new_zeros(b.shape[0], missing, *b.shape[2:])], dim=1)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,  # the factors hold λ and the scaling
        target_modules=sorted(factors),
        fan_in_fan_out=any(_kind(result, module) == "Conv1D" for module in factors),
        task_type=task_type,
        inference_mode=True,
        base_model_name_or_path=getattr(result.module, "name_or_path", None) or None,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with partial_of(path, folder=True) as temporary:
        for name, content in result.files_beside_weights().items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_bytes(content.encode() if isinstance(content, str) else content)
        save_file(tensors, temporary / WEIGHTS, {"format": "pt"})
        config.save_pretrained(str(temporary))
        replace_folder(temporary, path)
    return True


class _NoAdapter(Exception):
    """Why what was merged is no adapter."""


def _saved(model: Any, root: Path) -> dict[str, Path]:
    """The adapters of a PeftModel in folders, as PEFT saves them."""
    found = {}
    for number, task in enumerate(model.peft_config):
        folder = root / str(number)
        model.save_pretrained(folder, selected_adapters=[task], save_embedding_layers=False)  # the base's are at hand
        found[task] = folder if (folder / CONFIG).is_file() else folder / task
    return found


def _factors(result: Result) -> tuple[dict[str, tuple[Tensor, Tensor]], set[str]]:
    """Module -> A [r, …] and B [m, r, …] of what all adapters together add to its weight; the modules that are embeddings."""
    packed, vectors = result.packed, result.packed.task_vectors
    if not isinstance(vectors, FactoredTaskVectors):
        raise _NoAdapter("the task vectors are no factors")
    if result.coefficients is None or result.component_coefficients or result.module is None:
        raise _NoAdapter(f"{result.method} merges by more than a weight for every task and layer")
    found, embeddings = {}, set()
    for layer, changes in vectors.changes.items():
        name, shape = packed.layout.names[layer], packed.layout.shapes[layer]
        weights = result.coefficients[:, layer].double().tolist()
        changed = [(weight, change) for weight, change in zip(weights, changes, strict=True) if change is not None]
        if not changed:
            continue
        module, _, leaf = name.rpartition(".")
        if any(isinstance(change, Tensor) for _, change in changed) or leaf != "weight":
            raise _NoAdapter(f"adapters change '{name}' by something else than two factors")
        left = torch.cat([weight * change[0].double().cpu() for weight, change in changed], dim=1)  # [m, r]
        right = torch.cat([change[1].double().cpu() for _, change in changed])  # [r, n]
        kind = _kind(result, module)
        if kind == "Embedding" and name in packed.aliases.values():
            raise _NoAdapter(f"'{name}' is tied to another layer")
        if kind in ("Embedding", "Conv1D"):  # which PEFT calls A Bᵀ what is stored as [n, m]
            left, right = right.T, left.T
        a, b = right.reshape(-1, *shape[1:]) if len(shape) > 2 else right, left[(..., *[None] * (len(shape) - 2))]
        found[module] = (a.float().contiguous(), b.float().contiguous())
        embeddings |= {module} if kind == "Embedding" else set()
    if not found:
        raise _NoAdapter("the adapters change nothing")
    return found, embeddings


def _kind(result: Result, module: str) -> str:
    part = result.module.get_submodule(module) if result.module is not None else None
    return "Embedding" if isinstance(part, nn.Embedding) else type(part).__name__
