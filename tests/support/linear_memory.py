"""linear_softmax_kl in a process of its own: prints, by dtype, [how far memory rose, bytes of results, bytes of logits]."""

import json

import torch

import samerge_ext as sm
from samerge_ext.memory import PeakMemory

ROWS, WIDTH, CLASSES = 2048, 32, 30_000


def main():
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, teacher = (torch.randn(ROWS, WIDTH).to(dtype) for _ in range(2))
        head, teacher_head = (torch.randn(CLASSES, WIDTH).to(dtype) for _ in range(2))
        hidden.requires_grad_()
        sm.linear_softmax_kl(hidden[:9], head, teacher[:9], teacher_head).backward()  # what is loaded once
        hidden.grad = None
        with PeakMemory() as peak:
            sm.linear_softmax_kl(hidden, head, teacher, teacher_head).backward()
        found[str(dtype)] = [peak.rise, 2 * hidden.nbytes, 2 * 4 * ROWS * CLASSES]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
