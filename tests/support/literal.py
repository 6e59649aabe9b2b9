"""The methods as SPEC-like loops in plain autograd: no packing, no operators, no caching. The truth of the tests."""

import torch
from torch.func import functional_call


def merged_parameters(base, experts, coefficients):
    """θ₀ + Σ_t λ_t,l τ_t,l, differentiable in coefficients [T, L], by name; θ₀ where all τ are zero, as those of embeddings."""
    merged = {name: value.detach() for name, value in base.named_parameters()}
    tuned = [dict(expert.named_parameters()) for expert in experts.values()]
    for l, (name, value) in enumerate(merged.items()):
        task_vectors = [expert[name].detach() - value for expert in tuned]
        if any(task_vector.any() for task_vector in task_vectors):
            merged[name] = value + sum(coefficients[t, l] * task_vector for t, task_vector in enumerate(task_vectors))
    return merged


def averaged_buffers(base, experts):
    buffers = {name: value.clone() for name, value in base.named_buffers()}
    for name, value in buffers.items():
        if value.is_floating_point():
            value.copy_(torch.stack([dict(e.named_buffers())[name] for e in experts.values()]).mean(0))
    return buffers


def kl(student, teacher, temperature, weights=1.0, beta=0.0):
    """KL(p ‖ q) of teacher p and student q; by beta β KL(p ‖ m) + (1 − β) KL(q ‖ m), m = β p + (1 − β) q, or for 1 KL(q ‖ p)."""
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    mixed = beta * p + (1 - beta) * q
    if 0 < beta < 1:
        rows = (beta * p * (p / mixed).log() + (1 - beta) * q * (q / mixed).log()).sum(-1)
    else:
        rows = (q * (q / p).log() if beta else p * (p / q).log()).sum(-1)
    return (weights * rows).mean()


def entropy(student):
    q = torch.log_softmax(student, -1)
    return -(q.exp() * q).sum(-1).mean()


def learn(
    base,
    experts,
    heads,
    batches,
    *,
    steps,
    loss="kl",
    temperature=2.0,
    sam="paper",
    rho=0.07,
    adaptive=False,
    optimizer=None,
    task_wise=False,
    start=0.3,
    alpha=None,
    row_weights=None,
    beta=0.0,
    logits=lambda model, batch, head: model(batch) @ head,
):
    """Coefficients [T, L] after each step; logits(model, batch, head) with a model that is called as a module is."""
    tasks, layers = list(experts), len(list(base.parameters()))
    shape = (len(tasks), 1 if task_wise else layers)
    coefficients = torch.full(shape, start, dtype=torch.float64, requires_grad=True)
    optimizer = (optimizer or (lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=5e-4)))([coefficients])
    buffers = averaged_buffers(base, experts)
    alpha = alpha or {task: 1.0 for task in tasks}

    def gradient(at, step):
        at = at.detach().requires_grad_()
        weights = merged_parameters(base, experts, at.expand(len(tasks), layers))

        def merged(*args, **kwargs):
            return functional_call(base, {**weights, **buffers}, args, kwargs)

        total = 0.0
        for task in tasks:
            batch = batches[task][step % len(batches[task])]
            student = logits(merged, batch, heads[task])
            if loss == "kl":
                with torch.no_grad():
                    teacher = logits(experts[task], batch, heads[task])
                of_rows = 1.0 if row_weights is None else row_weights[task][step % len(batches[task])]
                total = total + alpha[task] * kl(student, teacher, temperature, of_rows, beta)
            else:
                total = total + alpha[task] * entropy(student)
        return torch.autograd.grad(total, at)[0]

    trajectory = []
    for step in range(steps):
        g = gradient(coefficients, step)
        if sam == "paper":
            value = coefficients.detach()
            scaled = value.abs() * g if adaptive else g
            ascent = value**2 * g if adaptive else g
            norm = scaled.norm()
            epsilon = rho * ascent / norm if norm > 0 else torch.zeros_like(g)
            g = gradient(value + epsilon, step)
        coefficients.grad = g
        optimizer.step()
        trajectory.append(coefficients.detach().expand(len(tasks), layers).clone())
    return trajectory


def statistics(models, singular_values=3):
    """[T, L, 3 + k] by the definitions; models: T lists of L tensors."""
    rows = []
    for tensors in models:
        rows.append([])
        for weight in tensors:
            sigma = torch.linalg.svdvals(weight.reshape(weight.shape[0], -1))[:singular_values]
            moments = [weight.mean(), (weight - weight.mean()).square().mean(), weight.square().sum().sqrt()]
            rows[-1].append(torch.cat([torch.stack(moments), sigma, sigma.new_zeros(singular_values - len(sigma))]))
    return torch.stack([torch.stack(row) for row in rows])


def weights(experts):
    """T lists of L tensors."""
    return [[parameter.detach() for parameter in expert.parameters()] for expert in experts.values()]
