"""Block products with WᵀW and moments of W for many matrices where they lie: what svd_topk and layer_stats run on."""

import torch

from .. import backend
from ._common import check_dtypes, define, library

define("gram_product(Tensor[] matrices, Tensor[] bases, Tensor q, Tensor scale) -> Tensor")
define("moments(Tensor[] matrices, Tensor[] bases) -> Tensor")

WIDTH = 4  # the number of vectors is a multiple of it


def gram_product(matrices: list[torch.Tensor], bases: list[torch.Tensor], q: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """z[i] = q[i] WᵀW with W = scale[i] · (bases[i] + matrices[i]), or q[i] WWᵀ where W has more columns than rows.

    Nothing of a matrix's size is allocated, and W is read once for both products. A fixed split of each matrix makes the
    result the same to the bit at any number of threads.

    Args:
        matrices: B of [m, n], of one shape, dtype and stride, with dense rows; fp32, bf16, fp16 or fp64.
        bases: none, or B of [m, n], likewise.
        q: [B, width, min(m, n)], width a multiple of 4; its dtype, fp32 or fp64, is that of the arithmetic.
        scale: [B] fp64.

    Returns:
        As `q`.

    Raises:
        ValueError, TypeError: a shape, stride, dtype or device does not fit.
    """
    _check(matrices, bases)
    m, n = matrices[0].shape
    if q.dim() != 3 or q.shape[0] != len(matrices) or q.shape[1] % WIDTH or q.shape[2] != min(m, n):
        raise ValueError(
            f"q has shape {list(q.shape)}; with {len(matrices)} matrices of {[m, n]} it must be "
            f"[{len(matrices)}, a multiple of {WIDTH}, {min(m, n)}]"
        )
    wide = any(t.dtype == torch.float64 for t in (matrices[0], *bases[:1]))
    if q.dtype != torch.float64 and (wide or q.dtype != torch.float32):
        raise TypeError(f"q is {q.dtype}; it must be float64, or float32 where no matrix is float64")
    return torch.ops.samerge.gram_product(matrices, bases, q, scale)


def moments(matrices: list[torch.Tensor], bases: list[torch.Tensor]) -> torch.Tensor:
    """Mean, population variance, Frobenius norm and largest magnitude of every W = bases[i] + matrices[i], in one pass.

    Sums are kept in fp64 and shifted piece by piece, so that a mean far from zero costs the variance no digits. A NaN or an
    infinity makes the largest magnitude NaN or infinite.

    Args:
        matrices, bases: as in `gram_product`.

    Returns:
        [B, 4] fp64; zeros for matrices without numbers.
    """
    _check(matrices, bases)
    return torch.ops.samerge.moments(matrices, bases)


def _check(matrices: list[torch.Tensor], bases: list[torch.Tensor]) -> None:
    for name, tensors in (("matrices", matrices), ("bases", bases)):
        for i, tensor in enumerate(tensors):
            first = tensors[0]
            if tensor.dim() != 2 or tensor.shape != first.shape or tensor.stride() != first.stride() or tensor.stride(1) != 1:
                raise ValueError(
                    f"{name}[{i}] has shape {list(tensor.shape)} and stride {tensor.stride()}, {name}[0] "
                    f"{list(first.shape)} and {first.stride()}; all must be equal, in two dimensions with dense rows"
                )
            if tensor.dtype != first.dtype:
                raise TypeError(f"{name}[{i}] is {tensor.dtype} but {name}[0] is {first.dtype}; convert one of them")
    if not matrices or (bases and (len(bases) != len(matrices) or bases[0].shape != matrices[0].shape)):
        raise ValueError("there must be matrices, and no bases or one for every matrix and of its shape")
    check_dtypes(**{"matrices[0]": matrices[0], **({"bases[0]": bases[0]} if bases else {})})


library.impl(
    "gram_product",
    lambda matrices, bases, q, scale: backend.kernel("gram_product", q)(matrices, bases, q, scale),
    "CompositeExplicitAutograd",
)
library.impl(
    "moments",
    lambda matrices, bases: backend.kernel("moments", matrices[0])(matrices, bases),
    "CompositeExplicitAutograd",
)
torch.library.register_fake("samerge::gram_product", lambda matrices, bases, q, scale: q.new_empty(q.shape), lib=library)
torch.library.register_fake(
    "samerge::moments", lambda matrices, bases: matrices[0].new_empty(len(matrices), 4, dtype=torch.float64), lib=library
)
