"""TIES on packed weights against its definition."""

import pytest
import torch
from helpers import assert_close, largest_kept
from tiny import make, make_problem

import samerge_ext as sm
from samerge_ext.elementwise import piecewise
from samerge_ext.elementwise.magnitudes import kept_count


def literal_ties(base, experts, density, scale, whole):
    """Named tensors and lists of them, as the paper's algorithm 1 puts it."""
    names = list(base)
    changes = [torch.cat([(e[n] - base[n]).flatten() for n in names]) for e in experts]
    sizes = [base[n].numel() for n in names]
    trimmed = []
    for change in changes:
        parts = [change] if whole else list(change.split(sizes))
        masks = [largest_kept(part, kept_count(density, part.numel())) for part in parts]
        trimmed.append(torch.where(torch.cat(masks), change, 0))
    stacked = torch.stack(trimmed)
    sign = torch.where(stacked.sum(0) >= 0, 1.0, -1.0)
    agree = (stacked * sign) > 0
    mean = (stacked * agree).sum(0) / agree.sum(0).clamp(min=1)
    return {n: base[n] + scale * part.view(base[n].shape) for n, part in zip(names, mean.split(sizes))}


@pytest.mark.parametrize("trim", ["tensor", "vector"])
@pytest.mark.parametrize("density", [0.05, 0.2, 1.0])
def test_ties_is_the_papers(trim, density):
    base, experts, packed, _, _ = make_problem()
    names = packed.layout.names
    of = [{n: e.state_dict()[n] for n in names} for e in (base, *experts.values())]
    expected = literal_ties(of[0], of[1:], density, 0.7, trim == "vector")
    result = sm.ties(packed, density, 0.7, trim=trim)
    assert result.coefficients is None
    for name in names:
        assert_close(result.state_dict()[name], expected[name], name)


def test_densities_and_weights_of_each_task():
    packed = make_problem()[2]
    alone = sm.ties(packed, [1.0, 0.0, 0.0], weights=[2.0, 1.0, 1.0], normalize=False)
    assert_close(alone.merged, packed.base + 2 * packed.task_vectors[0])


def test_pieces_do_not_matter(monkeypatch):
    torch.manual_seed(0)
    base = {"w": torch.randn(300, 700), "b": torch.randn(5)}
    experts = {t: {n: x + 0.1 * torch.randn_like(x) for n, x in base.items()} for t in "ab"}
    packed = sm.PackedWeights.from_state_dicts(base, experts, dtype=torch.bfloat16)
    results = {trim: sm.ties(packed, 0.3, trim=trim).merged for trim in ("tensor", "vector")}
    monkeypatch.setattr(piecewise, "PIECE", 1 << 16)
    for trim, expected in results.items():
        assert torch.equal(sm.ties(packed, 0.3, trim=trim).merged, expected)


@pytest.mark.parametrize("trim", ["tensor", "vector"])
def test_trimmed_task_vectors(trim):
    """What AdaMerging++ runs on: merging them by TIES's last two steps is TIES."""
    packed = make_problem()[2]
    before = packed.task_vectors.clone()
    trimmed = sm.trimmed(packed, 0.3, trim=trim)
    assert torch.equal(packed.task_vectors, before), "the packed weights stay as they are"
    assert torch.equal(sm.ties(trimmed, 1.0).merged, sm.ties(packed, 0.3, trim=trim).merged)


def test_a_module_takes_the_weights_and_a_folder_too(tmp_path):
    packed = make_problem()[2]
    module = make(9)
    result = sm.ties(packed, module=module)
    tensors = result.state_dict()
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, tensors[name].to(parameter)), name
    result.save_pretrained(tmp_path / "merged")
    assert "`ties`" in (tmp_path / "merged/README.md").read_text()


def test_what_makes_no_sense_is_refused():
    packed = make_problem()[2]
    with pytest.raises(ValueError, match="density=1.5"):
        sm.ties(packed, 1.5)
    with pytest.raises(ValueError, match="density has 2 values, there are 3 tasks"):
        sm.ties(packed, [0.1, 0.2])
    with pytest.raises(ValueError, match="trim='row'"):
        sm.ties(packed, trim="row")


def test_aligned_norms_are_the_smallest():
    packed = make_problem()[2]
    aligned = sm.align_norms(packed)
    norms = packed.task_vectors.norm(dim=1)
    torch.testing.assert_close(aligned.task_vectors.norm(dim=1), norms.min().expand(3), rtol=1e-7, atol=0)
    for before, after in zip(packed.task_vectors, aligned.task_vectors):
        torch.testing.assert_close(after / after.norm(), before / before.norm())
    packed.task_vectors[1] = 0
    with pytest.raises(ValueError, match="'green' has the norm 0"):
        sm.align_norms(packed)
