"""The StatsMergeLearner: a small network that predicts merging coefficients from statistics of the experts' weights."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn.functional import gelu

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.packing.packed_weights import PackedWeights
from samerge_ext.statistics.features import MOMENTS, Features

LEARNER_FILE = "learner.safetensors"  # in the folder of a merged model


@dataclass(frozen=True, kw_only=True)
class LearnerSettings:
    """What a learner reads and how large it is.

    of: statistics of the "experts"' weights, or of the "task_vectors".
    singular_values: how many of the largest ones are features; 0 for mean, variance and norm alone.
    granularity: one coefficient per task and "layer", or per "task" from the statistics of the whole model.
    whole_model: a layer's coefficient is predicted from its own statistics and, beside them, those of the whole model.
    hidden: units of the hidden layer, an even number.
    layers: names of the layers, each of which has a network of its own; None where all share one.
    """

    of: str = "experts"
    singular_values: int = 3
    granularity: str = "layer"
    whole_model: bool = False
    hidden: int = 64
    layers: tuple[str, ...] | None = None

    @property
    def num_features(self) -> int:
        return (2 if self.whole_model else 1) * (MOMENTS + self.singular_values)


class StatsMergeLearner(nn.Module):
    """λ from statistics S: a two-layer MLP, shared by all layers, or one for each.

        λ_{t,l} = v · gelu(W (S_{t,l} − mean) / deviation + b) + c

    S_{t,l} are the statistics of a layer and, with ``settings.whole_model``, of the whole expert beside them. By the former it
    tells layers apart, but hardly tasks: experts of one base differ far less in the statistics of a layer than layers do. The
    latter, the same for all layers, are standardised over the tasks alone.

    It starts at constant λ₀ = c, up to rounding, whatever the statistics: every hidden unit has a twin that starts with the
    same weights and the opposite v. All parameters have a gradient nevertheless, and twins go apart with the first step
    (a v of zero would keep W and b from learning).

    mean, scale: [F] of the features it was made for, scale = 1 / deviation, and 0 for a feature that is constant there.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, settings: LearnerSettings, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.settings = settings
        networks = 1 if settings.layers is None else len(settings.layers)
        features, hidden = settings.num_features, settings.hidden
        self.weight = nn.Parameter(torch.zeros(networks, features, hidden, dtype=dtype))  # W
        self.bias = nn.Parameter(torch.zeros(networks, 1, hidden, dtype=dtype))  # b
        self.output = nn.Parameter(torch.zeros(networks, hidden, 1, dtype=dtype))  # v
        self.constant = nn.Parameter(torch.zeros(networks, 1, 1, dtype=dtype))  # c
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("scale", torch.zeros(features, dtype=torch.float64))

    @classmethod
    def made_for(
        cls, statistics: Tensor, settings: LearnerSettings, *, start: float, seed: int, dtype: torch.dtype = torch.float32
    ) -> StatsMergeLearner:
        """A new learner that standardises as ``statistics`` [T, L, F] ask for and predicts ``start`` everywhere."""
        learner = cls(settings, dtype)
        values = statistics.detach().double().cpu().flatten(0, 1)  # [T · L, F]
        deviation, mean = torch.std_mean(values, dim=0, correction=0)
        # What differs by rounding alone is constant; noise of its size would be blown up to deviation 1.
        constant = deviation <= 8 * torch.finfo(statistics.dtype).eps * values.abs().amax(0)
        generator = torch.Generator().manual_seed(seed)

        def uniform_pairs(like: Tensor, dim: int, fan_in: int, twin: int) -> Tensor:
            """U(−1/√fan_in, 1/√fan_in), as nn.Linear starts, in the first half of the hidden units; then the twins."""
            half = torch.empty(like.narrow(dim, 0, settings.hidden // 2).shape, dtype=torch.float64)
            half.uniform_(-1 / math.sqrt(fan_in), 1 / math.sqrt(fan_in), generator=generator)
            return torch.cat([half, twin * half], dim)

        with torch.no_grad():
            learner.mean.copy_(mean)
            learner.scale.copy_(torch.where(constant, 0.0, 1 / deviation))
            learner.weight.copy_(uniform_pairs(learner.weight, 2, settings.num_features, 1))
            learner.bias.copy_(uniform_pairs(learner.bias, 2, settings.num_features, 1))
            learner.output.copy_(uniform_pairs(learner.output, 1, settings.hidden, -1))
            learner.constant.fill_(start)
        return learner.to(statistics.device)

    def forward(self, statistics: Tensor) -> Tensor:
        """λ [T, L] from statistics [T, L, F] as they are; they are standardised here."""
        standardised = ((statistics.double() - self.mean) * self.scale).to(self.weight.dtype)
        hidden = gelu(standardised.transpose(0, 1) @ self.weight + self.bias)  # [L, T, hidden]
        return (hidden @ self.output + self.constant).squeeze(-1).T

    def coefficients(self, packed: PackedWeights, *, features: str | Path | None = None) -> Tensor:
        """λ [T, L] for any experts, those it was trained on or others, without learning anything.

        features: a file that keeps the experts' statistics, as in StatsMergingConfig.
        Raises ValueError where a learner with a network per layer meets other layers.
        """
        if self.settings.layers is not None and self.settings.layers != packed.layout.names:
            raise ValueError(
                f"this learner has a network for each of {len(self.settings.layers)} layers, and they are not the "
                f"{packed.layout.num_layers} packed ones; train one with per_layer=False to apply it to other architectures"
            )
        found = Features.of_packed(packed, of=self.settings.of, singular_values=self.settings.singular_values, path=features)
        with torch.no_grad():
            statistics = found.of_granularity(self.settings.granularity, self.settings.whole_model)
            predicted = self(statistics.to(self.weight.device))
        return packed.coefficients(predicted.expand(-1, packed.layout.num_layers))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file, with what the learner reads as JSON in its header."""
        with atomic_write(path) as file:
            file.write(self.to_bytes())

    def to_bytes(self) -> bytes:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        return save(tensors, {"learner": json.dumps(asdict(self.settings))})

    @classmethod
    def load(cls, path: str | Path) -> StatsMergeLearner:
        """Raises ValueError for a file that `save` did not write."""
        try:
            with safe_open(path, "pt") as file:
                settings = json.loads(file.metadata()["learner"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            settings["layers"] = tuple(settings["layers"]) if settings["layers"] is not None else None
            learner = cls(LearnerSettings(**settings), tensors["weight"].dtype)
            learner.load_state_dict(tensors)
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} holds no StatsMergeLearner ({error!r})") from error
        return learner


class PredictedCoefficients(nn.Module):
    """The λ that a learner predicts from given statistics [T, L, F], for `learning.learn`."""

    def __init__(self, learner: StatsMergeLearner, statistics: Tensor):
        super().__init__()
        self.learner, self.statistics = learner, statistics

    def forward(self) -> Tensor:
        return self.learner(self.statistics)
