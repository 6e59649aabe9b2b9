"""What the operators share: their library in the dispatcher, and checks of packed arguments."""

from typing import Protocol

import torch

BLOCK = 1024  # numbers per block; a block belongs to one layer

library = torch.library.Library("samerge", "DEF")

_NARROW = (torch.float32, torch.bfloat16, torch.float16)


class Quantised(Protocol):
    """Task vectors of T tasks in few bits a number, as operators read them: `packing.quantised.QuantisedTaskVectors`."""

    @property
    def codes(self) -> torch.Tensor: ...  # [R, N] int8 or [R, N // 2] uint8

    @property
    def scales(self) -> torch.Tensor: ...  # [R, N // 128] bf16

    @property
    def shape(self) -> torch.Size: ...  # [T, N]

    def of_rows(self, coefficients: torch.Tensor) -> torch.Tensor: ...  # [T, L] -> [R, L]

    def of_tasks(self, gradient: torch.Tensor) -> torch.Tensor: ...  # [R, L] -> [T, L]


def define(schema: str) -> None:
    library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))


def accumulator(tensor: torch.Tensor) -> torch.dtype:
    """The dtype that sums over `tensor` are kept and returned in: fp64 for fp64, else fp32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def shape(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)}"


def check_dtypes(**tensors: torch.Tensor) -> None:
    """Each of fp32, bf16, fp16 in any mix, or all fp64, and all on one device."""
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        dtype = tensor.dtype
        if dtype not in _NARROW and dtype != torch.float64:
            raise TypeError(f"{name} is {tensor.dtype}; it must be float32, bfloat16, float16 or float64")
        if dtype != first.dtype and torch.float64 in (dtype, first.dtype):
            raise TypeError(
                f"{name} is {tensor.dtype} but {first_name} is {first.dtype}; float64 does not mix with other dtypes, "
                "convert one of them"
            )
    check_devices(**tensors)


def check_devices(**tensors: torch.Tensor) -> None:
    (first_name, first), *_ = tensors.items()
    for name, tensor in tensors.items():
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device} but {first_name} is on {first.device}; move one of them")


def check_packed(
    name: str,
    vector: torch.Tensor,
    task_vectors: torch.Tensor,
    block_layer: torch.Tensor,
    scales: torch.Tensor | None = None,
) -> None:
    """vector [N], task_vectors [T, N] or, with scales, the codes of QuantisedTaskVectors, block_layer [N // 1024] int32."""
    if vector.dim() != 1 or vector.shape[0] % BLOCK:
        raise ValueError(f"{name} has shape {shape(vector)}; it must be [N] with N a multiple of {BLOCK}, as a Layout packs it")
    numbers = 2 if scales is not None and task_vectors.dtype == torch.uint8 else 1  # per element of task_vectors
    if task_vectors.dim() != 2 or numbers * task_vectors.shape[1] != vector.shape[0]:
        raise ValueError(
            f"task_vectors has shape {shape(task_vectors)}; with {name} of {shape(vector)} it must be "
            f"[T, {vector.shape[0] // numbers}]"
        )
    if block_layer.dtype != torch.int32:
        raise TypeError(f"block_layer is {block_layer.dtype}; it must be int32")
    if block_layer.dim() != 1 or block_layer.shape[0] != vector.shape[0] // BLOCK:
        raise ValueError(
            f"block_layer has shape {shape(block_layer)}; with {name} of {shape(vector)} it must be [{vector.shape[0] // BLOCK}]"
        )
    if scales is None:
        check_dtypes(**{name: vector, "task_vectors": task_vectors})
    else:
        check_dtypes(**{name: vector})
        check_devices(**{name: vector, "task_vectors": task_vectors, "scales": scales})
    check_devices(**{name: vector, "block_layer": block_layer})
    if task_vectors.requires_grad:
        raise ValueError("task_vectors requires grad, but task vectors are constants here; pass task_vectors.detach()")
