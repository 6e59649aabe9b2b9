"""Mean, population variance, Frobenius norm and largest magnitude of W = base + matrix, in fp64."""

import torch


def moments(
    matrices: list[torch.Tensor],  # B of [m, n]
    bases: list[torch.Tensor],  # none, or B of [m, n]
) -> torch.Tensor:  # [B, 4]
    out = torch.zeros(len(matrices), 4, dtype=torch.float64, device=matrices[0].device)
    for i, matrix in enumerate(matrices):
        if not matrix.numel():
            continue
        weight = matrix.double()
        if bases:
            weight = weight + bases[i].double()
        mean = weight.mean()
        out[i] = torch.stack([mean, (weight - mean).square().mean(), weight.norm(), weight.abs().max()])
    return out
