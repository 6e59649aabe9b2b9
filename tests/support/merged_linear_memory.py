"""merged_linear_softmax_kl in a process of its own: prints [how far memory rose, bytes of the results, bytes of the head]."""

import json

import torch

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

ROWS, WIDTH, CLASSES, TASKS = 64, 960, 50_000, 2


def main():
    hidden, teacher = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    base, task_vectors = torch.randn(CLASSES, WIDTH), torch.randn(TASKS, CLASSES, WIDTH)
    hidden.requires_grad_()
    coefficients = torch.full((TASKS,), 0.3, requires_grad=True)
    few = (hidden[:9], base[:500], task_vectors[:, :500], coefficients, teacher[:9], base[:500])
    sm.merged_linear_softmax_kl(*few).backward()  # what is loaded once
    hidden.grad = coefficients.grad = None
    with PeakMemory() as peak:
        sm.merged_linear_softmax_kl(hidden, base, task_vectors, coefficients, teacher, base).backward()
    print(json.dumps([peak.rise, 4 * hidden.nbytes, base.nbytes]))


if __name__ == "__main__":
    main()
