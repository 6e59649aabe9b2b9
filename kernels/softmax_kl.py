"""Losses between the rows of logits and their gradient; see samerge_ext.ops.softmax_kl for the equations.

One program works on one row, a tile at a time. A first pass over student and teachers finds each row's largest logit m and
Z = Σ exp((x − m) / temperature), rescaled when a tile brings a larger m; a second pass computes loss and gradient, mostly
from the caches. The gradient of reverse KL and of the Jensen–Shannon divergence is q · (f − Σ q · f), f the derivative by q:
there the second pass has the loss and that sum, and a third the gradient. Moves one read of every logit, and one write of the
gradient, as long as the rows in flight fit the L2 cache.

With d = log p − log q, KL is summed as p · (exp(−d) − 1 + d), which equals p · d + q − p: every term is ≥ 0 and the
roundings of log Z enter squared. A row whose num_classes lies outside 1 … V gets the loss NaN: to raise would stall the device.
"""

import torch
import triton
import triton.language as tl

from . import launch


def softmax_kl(
    student: torch.Tensor,  # [R, V]
    teacher: torch.Tensor | None,  # [K, R, V]
    teacher_weights: torch.Tensor | None,  # [K, R], None for 1/K
    num_classes: torch.Tensor | None,  # [R]
    row_scale: torch.Tensor | None,  # [R], None for no gradient
    out: torch.Tensor | None,  # [R, V] for the gradient, None for a new tensor
    loss: str,
    student_temperature: float,
    teacher_temperature: float,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:  # [R], [R, V]
    rows, columns = student.shape
    wide = torch.float64 if student.dtype == torch.float64 else torch.float32
    losses = torch.empty(rows, dtype=wide, device=student.device)
    grad = out
    if row_scale is not None and out is None:
        grad = torch.empty(rows, columns, dtype=student.dtype, device=student.device)
    if not rows:
        return losses, grad
    if loss == "kl" and beta > 0:
        loss = "jsd" if beta < 1 else "reverse_kl"
    student = launch.dense_rows(student)
    teacher = None if teacher is None else launch.dense_rows(teacher)
    teachers = 0 if teacher is None else teacher.shape[0]
    with torch.cuda.device_of(student):
        _softmax_kl[(rows,)](
            losses,
            grad,
            student,
            teacher,
            None if teacher_weights is None else teacher_weights.contiguous(),
            None if num_classes is None else num_classes.contiguous(),
            None if row_scale is None else row_scale.contiguous(),
            student.stride(0),
            0 if teacher is None else teacher.stride(0),
            0 if teacher is None else teacher.stride(1),
            columns,
            student_temperature,
            teacher_temperature,
            beta,
            SAME_TEMPERATURE=student_temperature == teacher_temperature,
            LOSS=loss,
            TEACHERS=teachers,
            WIDTH=triton.next_power_of_2(max(teachers, 1)),
            **launch.row_tile(columns),
        )
    return losses, grad


@triton.jit
def _softmax_kl(
    losses,
    grad,
    student,
    teacher,
    teacher_weights,
    num_classes,
    row_scale,
    student_stride,
    teacher_stride,
    teacher_row_stride,
    num_columns,
    student_temperature: tl.float64,
    teacher_temperature: tl.float64,
    beta: tl.float64,
    SAME_TEMPERATURE: tl.constexpr,
    LOSS: tl.constexpr,
    TEACHERS: tl.constexpr,
    WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
):
    wide: tl.constexpr = losses.dtype.element_ty
    small: tl.constexpr = 1 / 64 if wide == tl.float64 else 1 / 4
    centred: tl.constexpr = LOSS == "reverse_kl" or LOSS == "jsd"
    divergence: tl.constexpr = LOSS == "kl" or centred
    rest = (1 - tl.cast(beta, tl.float64)).to(wide)
    beta = tl.cast(beta, tl.float64).to(wide)
    row = tl.program_id(0).to(tl.int64)
    inverse_student = (1 / tl.cast(student_temperature, tl.float64)).to(wide)
    inverse_teacher = (1 / tl.cast(teacher_temperature, tl.float64)).to(wide)
    student += row * student_stride
    n = tl.cast(num_columns, tl.int64)
    valid = n > 0
    if num_classes is not None:
        given = tl.load(num_classes + row)
        valid = (given >= 1) & (given <= num_columns)
        n = tl.where(valid, given, n)

    m, z, weighted = _partition(student, n, inverse_student, LOSS == "entropy", TILE, TILES, wide)
    log_z = tl.log(z)
    loss = tl.zeros([], wide)
    if LOSS == "entropy":
        loss = log_z - weighted / z

    # Of teacher k: its largest logit and Z for divergences, its likeliest class for cross-entropy; a vector holds all of them.
    of = tl.arange(0, WIDTH)
    maxima, sums = tl.zeros([WIDTH], wide), tl.zeros([WIDTH], wide)
    targets = tl.zeros([WIDTH], tl.int64)
    if teacher is not None:
        teacher += row * teacher_row_stride
        weights = tl.full([WIDTH], 1 / TEACHERS, wide)
        if teacher_weights is not None:
            rows = tl.num_programs(0).to(tl.int64)
            weights = tl.load(teacher_weights + of * rows + row, mask=of < TEACHERS, other=0)
        weights = tl.where(of < TEACHERS, weights, 0)
        for k in range(TEACHERS):
            logits = teacher + tl.cast(k, tl.int64) * teacher_stride
            if divergence:
                m_k, z_k, _ = _partition(logits, n, inverse_teacher, False, TILE, TILES, wide)
                maxima, sums = tl.where(of == k, m_k, maxima), tl.where(of == k, z_k, sums)
            else:
                target = _argmax(logits, n, TILE, TILES, wide)
                targets = tl.where(of == k, target, targets)
                logit = tl.load(student + target).to(wide)
                loss += _pick(weights, of, k) * (log_z - (logit - m) * inverse_student)

    mean = tl.zeros([], wide)
    if centred:
        terms, means = tl.zeros([TILE], wide), tl.zeros([TILE], wide)
        for tile in range(TILES):
            places = tile * TILE + tl.arange(0, TILE)
            s = _read(student, places, n, wide)
            y = (s - m) * inverse_student
            q = tl.exp(y) / z
            for k in range(TEACHERS):
                weight, m_k, z_k = _pick(weights, of, k), _pick(maxima, of, k), _pick(sums, of, k)
                t = _read(teacher + tl.cast(k, tl.int64) * teacher_stride, places, n, wide)
                p, d = _compare(t, s, y, m, log_z, m_k, z_k, inverse_teacher, SAME_TEMPERATURE)
                term, by_q = _reverse_kl_term(p, q, d, small) if LOSS == "reverse_kl" else _jsd_term(p, q, d, beta, rest, small)
                terms += weight * term
                means += tl.where(q == 0, 0, weight * q * by_q)
        loss += tl.sum(terms, 0)
        mean += tl.sum(means, 0)

    if grad is not None or LOSS == "kl":
        terms = tl.zeros([TILE], wide)
        scale = inverse_student
        if grad is not None:
            grad += row * num_columns
            scale = tl.where(valid, inverse_student * tl.load(row_scale + row), float("nan"))
        for tile in range(TILES):
            places = tile * TILE + tl.arange(0, TILE)
            s = _read(student, places, n, wide)
            y = (s - m) * inverse_student
            q = tl.exp(y) / z
            if LOSS == "entropy":
                slope = tl.where(q == 0, 0, -q * (y + (loss - log_z)))
            elif divergence:
                slope = tl.zeros([TILE], wide)
                for k in range(TEACHERS):
                    weight, m_k, z_k = _pick(weights, of, k), _pick(maxima, of, k), _pick(sums, of, k)
                    t = _read(teacher + tl.cast(k, tl.int64) * teacher_stride, places, n, wide)
                    p, d = _compare(t, s, y, m, log_z, m_k, z_k, inverse_teacher, SAME_TEMPERATURE)
                    if LOSS == "kl":
                        term, step = _kl_term(p, q, d, small)
                        terms += weight * term
                    elif LOSS == "reverse_kl":
                        _, step = _reverse_kl_term(p, q, d, small)
                    else:
                        _, step = _jsd_term(p, q, d, beta, rest, small)
                    slope += weight * step
                if centred:
                    slope = tl.where(q == 0, 0, q * (slope - mean))
            else:
                slope = q * tl.sum(weights, 0)
                for k in range(TEACHERS):
                    slope -= tl.where(places == _pick(targets, of, k), _pick(weights, of, k), 0)
            if grad is not None:
                inside = tl.where(places < n, slope * scale, 0)
                tl.store(grad + places, inside.to(grad.dtype.element_ty), mask=places < num_columns)
        loss += tl.sum(terms, 0)
    tl.store(losses + row, tl.where(valid, loss, float("nan")))


@triton.jit
def _read(row, places, n, wide: tl.constexpr):
    return tl.load(row + places, mask=places < n, other=float("-inf")).to(wide)


@triton.jit
def _pick(vector, of, k):
    return tl.sum(tl.where(of == k, vector, 0), 0)


@triton.jit
def _partition(row, n, inverse_temperature, WEIGHTED: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr, wide: tl.constexpr):
    """Of the first n numbers x of a row: the largest, m; Σ exp(y) and Σ exp(y) · y with y = (x − m) / temperature."""
    m = tl.full([], float("-inf"), wide)
    z, weighted = tl.zeros([TILE], wide), tl.zeros([TILE], wide)
    for tile in range(TILES):
        x = _read(row, tile * TILE + tl.arange(0, TILE), n, wide)
        larger = tl.maximum(m, tl.max(x, 0))
        finite = tl.where(larger == float("-inf"), 0, larger)  # all masked so far: their exponentials must be 0, not NaN
        shift = (m - finite) * inverse_temperature
        factor = tl.exp(shift)
        y = (x - finite) * inverse_temperature
        e = tl.exp(y)
        if WEIGHTED:
            weighted = tl.where(factor == 0, 0, factor * (weighted + z * shift)) + tl.where(e == 0, 0, e * y)
        z = z * factor + e
        m = larger
    return m, tl.sum(z, 0), tl.sum(weighted, 0)


@triton.jit
def _argmax(row, n, TILE: tl.constexpr, TILES: tl.constexpr, wide: tl.constexpr):
    """The first position of the largest of the first n numbers."""
    best = tl.full([], float("-inf"), wide)
    position = tl.zeros([], tl.int64)
    for tile in range(TILES):
        x = _read(row, tile * TILE + tl.arange(0, TILE), n, wide)
        larger, place = tl.max(x, 0, return_indices=True, return_indices_tie_break_left=True)
        position = tl.where(larger > best, tile * TILE + place, position)
        best = tl.maximum(best, larger)
    return position


@triton.jit
def _compare(t, s, y, m, log_z, m_k, z_k, inverse_teacher, SAME_TEMPERATURE: tl.constexpr):
    """p and log p − log q from logits t of teacher k and s of the student, y = (s − m) / temperature."""
    log_p = (t - m_k) * inverse_teacher
    # t - s is exact where they are close, which (t - max) - (s - max) is not.
    d = ((t - s) - (m_k - m)) * inverse_teacher if SAME_TEMPERATURE else log_p - y
    return tl.exp(log_p) / z_k, d - (tl.log(z_k) - log_z)


@triton.jit
def _exp_remainder(d):
    """exp(−d) − 1 + d where |d| is small."""
    remainder = d * (1 / 40320) - 1 / 5040
    remainder = remainder * d + 1 / 720
    remainder = remainder * d - 1 / 120
    remainder = remainder * d + 1 / 24
    remainder = remainder * d - 1 / 6
    return (remainder * d + 0.5) * d * d


@triton.jit
def _log_near_one(x):
    """log(1 + x) where |x| is small."""
    s = x / (x + 2)
    z = s * s
    return s * (2 + z * (2 / 3 + z * (2 / 5 + z * (2 / 7 + z * (2 / 9)))))


@triton.jit
def _kl_term(p, q, d, SMALL: tl.constexpr):
    """p · (exp(−d) − 1 + d) and q − p, by a series where |d| is small: their plain forms lose all digits there."""
    remainder = _exp_remainder(d)
    close = tl.abs(d) < SMALL
    step = tl.where(close, p * (remainder - d), q - p)
    term = tl.where(close, p * remainder, p * d + step)
    return tl.where(p == 0, q, term), tl.where(p == 0, q, step)


@triton.jit
def _reverse_kl_term(p, q, d, SMALL: tl.constexpr):
    """q · (exp(d) − 1 − d), and the derivative of KL(q ‖ p) by q up to what is the same for the row."""
    term, _ = _kl_term(q, p, -d, SMALL)
    return term, -d


@triton.jit
def _jsd_term(p, q, d, beta, rest, SMALL: tl.constexpr):
    """As _reverse_kl_term, of β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q and rest = 1 − β. How far m is from what
    it has most of has a bounded logarithm, and one that keeps its digits where p and q nearly agree or β is nearly 0."""
    mostly_p = beta * p > rest * q
    most, other, fall = tl.where(mostly_p, p, q), tl.where(mostly_p, q, p), tl.where(mostly_p, d, -d)
    of_most, of_other = tl.where(mostly_p, beta, rest), tl.where(mostly_p, rest, beta)
    ratio = tl.where(most > 0, other / most, 0)
    x = of_other * tl.where(tl.abs(fall) < SMALL, _exp_remainder(fall) - fall, ratio - 1)
    log_m = tl.where(tl.abs(x) < SMALL, _log_near_one(x), tl.log(of_most + of_other * ratio))  # log(m / most)
    by_p, by_q = tl.where(mostly_p, 0, d) - log_m, tl.where(mostly_p, -d, 0) - log_m  # log(p / m), log(q / m)
    m = beta * p + rest * q
    of_p, _ = _kl_term(p, m, by_p, SMALL)
    of_q, _ = _kl_term(q, m, by_q, SMALL)
    return beta * of_p + rest * of_q, rest * by_q
