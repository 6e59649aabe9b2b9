"""Statistics of experts as the features that merging coefficients are predicted from: computed once, kept in a file."""

from __future__ import annotations

import csv
import io
import json
import zlib
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.ops.layer_stats import layer_stats
from samerge_ext.packing.packed_weights import PackedWeights

FEATURES_FILE = "features.safetensors"  # in a run's checkpoint_dir, and in the folder of a merged model
MOMENTS = 3  # mean, variance, norm; the singular values follow
# Relative error of the singular values. Experts of one base differ in them by a few parts in ten thousand, which must not drown.
RTOL = 1e-5


@dataclass(frozen=True)
class Features:
    """What `layer_stats` says of every layer of every expert, and what it was computed from.

    values: [T, L, 3 + k]: mean, population variance, Frobenius norm, the k largest singular values.
    identity: of="experts" or "task_vectors", k, tasks, layers with their shapes, and a digest of all weights.
    """

    values: Tensor
    identity: dict

    @classmethod
    def of_packed(
        cls, packed: PackedWeights, *, of: str = "experts", singular_values: int = 3, path: str | Path | None = None
    ) -> Features:
        """Reads the file at ``path`` if it is there; else computes the features, and writes them there if a path is given.

        Raises ValueError where the file holds features of anything else.
        """
        identity = _identity(packed, of, singular_values)
        path = Path(path) if path is not None else None
        if path is not None and path.exists():
            found = cls.load(path)
            differs = [key for key in identity if found.identity.get(key) != identity[key]]
            if differs:
                what = ", ".join(differs)
                raise ValueError(f"{path} holds features of something else: {what} differ; delete it or choose another path")
            return cls(found.values.to(packed.base.device), identity)
        features = cls(layer_stats(packed, top_k=singular_values, of=of, rtol=RTOL), identity)
        if path is not None:
            with atomic_write(path) as file:
                file.write(features.to_bytes())
        return features

    @classmethod
    def load(cls, path: str | Path) -> Features:
        """Raises ValueError for a file that `to_bytes` did not make."""
        try:
            with safe_open(path, "pt") as file:
                identity = json.loads(file.metadata()["identity"])
                checksum, found = identity.pop("checksum"), cls(file.get_tensor("features"), identity)
                if checksum != found._checksum():
                    raise ValueError("its checksum does not fit")
                return found
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no features ({error!r}); delete it, and they are computed again") from error

    def to_bytes(self) -> bytes:
        """A safetensors file, the identity and a checksum as JSON in its header: of several entries their order would vary."""
        identity = json.dumps({**self.identity, "checksum": self._checksum()})
        return save({"features": self.values.cpu().contiguous()}, {"identity": identity})

    def _checksum(self) -> str:
        """The CRC-32 of identity and values."""
        values = self.values.cpu().contiguous().flatten().view(torch.uint8).numpy().data
        return f"{zlib.crc32(values, zlib.crc32(json.dumps(self.identity).encode())):08x}"

    def of_granularity(self, granularity: str, whole_model: bool = False) -> Tensor:
        """[T, L, 3 + k] as they are, for "task" the statistics [T, 1, 3 + k] of the whole model; [T, L, 2 · (3 + k)] where every
        layer's are followed by those."""
        if granularity == "task":
            return self.of_whole_model()
        if not whole_model:
            return self.values
        return torch.cat([self.values, self.of_whole_model().expand_as(self.values)], dim=-1)

    def of_whole_model(self) -> Tensor:
        """[T, 1, 3 + k], of each expert's model.

        Mean, variance and norm of all numbers together, and the largest singular values of any layer: those of the matrix
        that has the layers as its blocks on the diagonal.
        """
        sizes = [torch.Size(shape).numel() for _, shape in self.identity["layers"]]
        share = torch.tensor(sizes, dtype=torch.float64, device=self.values.device) / sum(sizes)  # [L]
        layer_mean, layer_variance, layer_norm = self.values[..., :MOMENTS].double().unbind(-1)  # [T, L] each
        mean = layer_mean @ share  # [T]
        variance = (layer_variance + (layer_mean - mean[:, None]).square()) @ share
        norm = torch.linalg.vector_norm(layer_norm, dim=1)
        k = self.values.shape[-1] - MOMENTS
        singular_values = self.values[..., MOMENTS:].flatten(1).double().topk(k).values  # [T, k]
        moments = torch.stack([mean, variance, norm], dim=1)
        return torch.cat([moments, singular_values], dim=1)[:, None].to(self.values.dtype)


def statistics_rows(features: Features) -> list[dict]:
    """A row per task and layer: task, layer, mean, variance, norm, sigma_1, …"""
    names = [name for name, _ in features.identity["layers"]]
    columns = ["mean", "variance", "norm", *(f"sigma_{i}" for i in range(1, features.values.shape[-1] - MOMENTS + 1))]
    return [
        {"task": task, "layer": name, **dict(zip(columns, row, strict=True))}
        for task, rows in zip(features.identity["tasks"], features.values.tolist(), strict=True)
        for name, row in zip(names, rows, strict=True)
    ]


def write_statistics(features: Features, path: str | Path) -> None:
    """The rows as .csv, or as .json beside what they were computed from. Raises ValueError for any other suffix."""
    rows, path = statistics_rows(features), Path(path)
    if path.suffix == ".json":
        text = json.dumps({**features.identity, "statistics": rows}, indent=1)
    elif path.suffix == ".csv":
        table = io.StringIO()
        writer = csv.DictWriter(table, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        text = table.getvalue()
    else:
        raise ValueError(f"{path}: statistics are written as .csv or .json")
    with atomic_write(path, "w") as file:
        file.write(text)


def _identity(packed: PackedWeights, of: str, singular_values: int) -> dict:
    layout = packed.layout
    return {
        "of": of,
        "singular_values": singular_values,
        "tasks": list(packed.tasks),
        "layers": [[name, list(shape)] for name, shape in zip(layout.names, layout.shapes, strict=True)],
        "weights": weights_digest(packed),
    }


def weights_digest(packed: PackedWeights) -> str:
    """A digest of every packed number: reads all of them once, block by block."""
    digest = sha256()
    stored = packed.whole_task_vectors()
    rows = stored if isinstance(stored, Tensor) else stored.tensors().values()
    for tensor in (packed.base, *rows, *packed.unchanged.values()):
        digest.update(str(tensor.dtype).encode())
        for block in tensor.detach().flatten().split(1 << 24):
            digest.update(block.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
