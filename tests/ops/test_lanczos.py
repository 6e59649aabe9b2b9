"""Steps of block Lanczos: what svd_topk's values and bounds are computed from."""

import pytest
import torch
from helpers import TOLERANCE, random_normal

from samerge_ext import backend, reference
from samerge_ext.ops import krylov

WIDTH, STEPS = 8, 4


def run(matrices, bases=(), dtype=torch.float32, capacity=STEPS, splits=(0, STEPS), stride=0):
    """basis [B, (STEPS + 1) · WIDTH, side], projected and the last step's leaving, all of `splits` in turn."""
    batch, side = len(matrices), min(matrices[0].shape)
    (start,) = random_normal((side, WIDTH), seed=3, dtype=torch.float64)
    padded = -(-max(side, stride) // krylov._LANES) * krylov._LANES
    basis = torch.zeros(batch, (capacity + 1) * WIDTH, padded, dtype=dtype, device=start.device)
    basis[:, :WIDTH, :side] = torch.linalg.qr(start)[0].mT
    projected = torch.zeros(batch, capacity * WIDTH, capacity * WIDTH, dtype=torch.float64, device=start.device)
    scale = torch.full((batch,), 0.5, dtype=torch.float64, device=start.device)
    for first, last in zip(splits, splits[1:]):
        leaving = krylov._lanczos(matrices, list(bases), scale, basis, projected, WIDTH, first, last)
    assert not basis[..., side:].any()
    return basis[:, : (STEPS + 1) * WIDTH, :side], projected[:, : STEPS * WIDTH, : STEPS * WIDTH].tril(), leaving


def check(matrices, bases=(), dtype=torch.float32, stride=0):
    """The vectors are orthonormal, and A times those of every step is what the results say."""
    basis, projected, leaving = (t.double() for t in run(matrices, bases, dtype, stride=stride))
    room = 20 * TOLERANCE[dtype]
    assert (basis @ basis.mT - torch.eye(basis.shape[1], dtype=torch.float64, device=basis.device)).abs().max() < room
    some = [w.double() for w in matrices], [w.double() for w in bases]
    known = basis[:, :-WIDTH]
    z = reference.gram_product(*some, known, torch.full((len(matrices),), 0.5, dtype=torch.float64, device=basis.device))
    largest = z.norm(dim=2).amax(1)[:, None, None]
    inside = projected + projected.tril(-1).mT
    assert ((z @ known.mT - inside).abs() / largest).max() < room
    outside = z[:, -WIDTH:] - inside[:, -WIDTH:] @ known
    assert ((leaving @ basis[:, -WIDTH:] - outside).abs() / largest).max() < room


@pytest.mark.parametrize("shape", [(64, 50), (50, 64), (200, 96), (900, 48), (48, 20000)], ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_the_vectors_are_orthonormal_and_the_projection_is_of_a(each_level, shape, dtype):
    numbers = random_normal(*[shape] * 6, seed=sum(shape))
    check(numbers[:3], dtype=dtype)
    check([w.bfloat16() for w in numbers[:3]], numbers[3:], dtype=dtype)


@pytest.mark.parametrize("rank", (1, 3, 8, 11))
def test_vectors_stay_orthonormal_where_nothing_leaves(each_level, rank):
    left, right = random_normal((60, rank), (rank, 70), seed=rank)
    check([left @ right, torch.diag(torch.ones(70))[:60]])


def test_steps_taken_one_by_one_are_the_same(each_level):
    matrices = random_normal((90, 70), (90, 70), seed=1)
    whole = run(matrices)
    for splits in ((0, 1, 2, 3, 4), (0, 3, 4)):
        assert all(torch.equal(a, b) for a, b in zip(whole, run(matrices, capacity=7, splits=splits)))


@pytest.mark.parametrize("stride", (2064, 4112, 16400))
def test_vectors_may_lie_far_apart(each_level, stride):
    """A GPU's block takes as much of a vector as its length in memory says: 256 places here, 512 and 1,024."""
    check(random_normal((200, 180), seed=5), stride=stride)


@pytest.fixture
def each_fused_level(each_level):
    if not backend.fused("lanczos", torch.empty(0)):
        pytest.skip("composed of torch's operators, the steps leave the order of sums to torch")


def test_threads_do_not_matter(each_fused_level, threads):
    """With more threads than matrices every product is shared among them, else each takes matrices of its own."""
    matrices = random_normal((5000, 100), (5000, 100), (5000, 100), (5000, 100), seed=2)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        results.append(run(matrices))
    for some in zip(*results):
        assert all(torch.equal(some[0], other) for other in some)


def test_the_other_matrices_do_not_matter(each_fused_level):
    """More of them than a launch on a GPU takes the addresses of."""
    matrices = random_normal(*[(48, 43)] * 66, seed=2)
    whole = run(matrices)
    for i in (0, 40, 65):
        assert all(torch.equal(a[i], b[0]) for a, b in zip(whole, run(matrices[i : i + 1])))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_block_that_hardly_leaves(each_level, dtype):
    """What is left of a block may be far from its vectors' size and nearly dependent, down to what rounding leaves."""
    left, right = random_normal((90, 12), (80, 12), seed=6, dtype=torch.float64)
    left, right = torch.linalg.qr(left)[0], torch.linalg.qr(right)[0]
    for ratio in (0.3, 1e-2, 1e-3, 1e-5):
        spectrum = ratio ** torch.arange(12, dtype=torch.float64, device=left.device)
        check([((left * spectrum) @ right.mT).to(dtype)], dtype=dtype)
