"""Coefficients and singular values, drawn."""

import pytest
import torch

from samerge_ext.reports import plots


def test_plots_are_png_files_and_nothing_else_is_left(tmp_path):
    plots.plot_coefficients(torch.rand(2, 3), ["r8", "icd"], ["a.0.w", "a.1.w", "b.w"], tmp_path / "coefficients.png")
    statistics = torch.rand(2, 3, 3 + 2)
    statistics[:, 1, 4] = 0.0
    plots.plot_singular_values(statistics, ["r8", "icd"], ["a.0.w", "a.1.w", "b.w"], tmp_path / "singular_values.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coefficients.png", "singular_values.png"]
    for path in tmp_path.iterdir():
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_coefficients_of_another_shape_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\[3, 2\], not \[2 tasks, 3 layers\]"):
        plots.plot_coefficients(torch.rand(3, 2), ["r8", "icd"], ["a", "b", "c"], tmp_path / "x.png")


@pytest.mark.parametrize("shape", [(2, 3, 3), (3, 3, 6), (2, 6)])
def test_statistics_without_singular_values_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match=r"not \[2 tasks, 3 layers, 3 \+ k\] with k ≥ 1"):
        plots.plot_singular_values(torch.rand(shape), ["r8", "icd"], ["a", "b", "c"], tmp_path / "x.png")
