"""Plots of coefficients and statistics, as PNG files. They need matplotlib: pip install "samerge_ext[plots]"."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from samerge_ext.checkpoints.saving import atomic_write
from samerge_ext.reports.heat_map import layer_groups
from samerge_ext.statistics.features import MOMENTS

if TYPE_CHECKING:  # an optional dependency
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure


def plot_coefficients(coefficients: Tensor, tasks: Sequence[str], layer_names: Sequence[str], path: str | Path) -> None:
    """λ [T, L] as a heat map: tasks down, layers across, grouped by the block they belong to.

    The colours are centred on 0, so that a task that a layer leaves out is white and one it subtracts is blue.
    """
    if tuple(coefficients.shape) != (len(tasks), len(layer_names)):
        raise ValueError(f"coefficients are {list(coefficients.shape)}, not [{len(tasks)} tasks, {len(layer_names)} layers]")
    values = coefficients.detach().float().cpu().numpy()
    figure, axes = plot_figure(width=max(8, 0.13 * len(layer_names) + 2), height=1.8 + 0.35 * len(tasks))
    limit = max(float(abs(values).max()), 1e-6)
    image = axes.imshow(values, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
    axes.set_yticks(range(len(tasks)), tasks)
    _mark_layers(axes, layer_names)
    figure.colorbar(image, ax=axes, label="λ", pad=0.01)
    save_figure(figure, path)


def plot_singular_values(statistics: Tensor, tasks: Sequence[str], layer_names: Sequence[str], path: str | Path) -> None:
    """The k largest singular values of every layer, from statistics [T, L, 3 + k], on a log scale, a colour per task.

    The largest are drawn in full colour and the others fainter; a value of 0, as a vector's second, is left out.
    """
    expected = (len(tasks), len(layer_names))
    if tuple(statistics.shape[:2]) != expected or statistics.dim() != 3 or statistics.shape[2] <= MOMENTS:
        raise ValueError(
            f"statistics are {list(statistics.shape)}, not [{len(tasks)} tasks, {len(layer_names)} layers, 3 + k] with k ≥ 1"
        )
    values = statistics[..., MOMENTS:].detach().double().cpu()
    drawn = values.where(values > 0, float("nan")).numpy()
    figure, axes = plot_figure(width=max(8, 0.13 * len(layer_names) + 2), height=4)
    colours, count = colour_map("tab10"), drawn.shape[2]
    for t, task in enumerate(tasks):
        for i in range(count):
            places = [layer + 0.8 * ((t + 0.5) / len(tasks) - 0.5) for layer in range(len(layer_names))]
            style = {"color": colours(t % 10), "alpha": 1 - 0.8 * i / count, "linestyle": "", "marker": ".", "markersize": 4}
            axes.plot(places, drawn[t, :, i], label=task if i == 0 else None, **style)
    axes.set_yscale("log")
    axes.set_ylabel(f"σ₁ … σ{''.join('₀₁₂₃₄₅₆₇₈₉'[int(digit)] for digit in str(count))}" if count > 1 else "σ₁")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    _mark_layers(axes, layer_names)
    save_figure(figure, path)


def _mark_layers(axes: Axes, layer_names: Sequence[str]) -> None:
    """Labels the horizontal axis with the layers' groups and draws lines between them."""
    starts, groups = layer_groups(layer_names)
    for start in starts[1:]:
        axes.axvline(start - 0.5, color="black", linewidth=0.6)
    axes.set_xlim(-0.5, len(layer_names) - 0.5)
    ends = [*starts[1:], len(layer_names)]
    centres = [(start + end - 1) / 2 for start, end in zip(starts, ends, strict=True)]
    axes.set_xticks(centres, groups, rotation=30, ha="right")
    axes.set_xlabel("layers (parameter tensors in the model's order)")


def plot_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure that needs no display and leaves the caller's matplotlib backend alone."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()


def colour_map(name: str) -> Colormap:
    from matplotlib import colormaps

    return colormaps[name]


def save_figure(figure: Figure, path: str | Path) -> None:
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=150)
