"""Learned merges of a wide vocabulary in a process of its own: prints, resident and streamed, [how far memory rose, how far the
dry run says that it rises, bytes of one task's logits]."""

import json

import tiny_language_models as models
import torch

import samerge_ext as sm
from samerge_ext.budget.dry_run import dry_run
from samerge_ext.memory import PeakMemory, large_tensors_mapped

TEXTS, TOKENS, CLASSES = 24, 128, 40_000


def make():
    return models.make("qwen2, tied", torch.float32, max_position_embeddings=TOKENS, vocab_size=CLASSES)


def main():
    packed = models.make_packed(make())
    batch = models.padded(torch.randint(4, CLASSES, (TEXTS, TOKENS)).tolist())
    found = []
    for streamed in (False, True):
        config = sm.SAMergingConfig(steps=1, sam="off", progress=False, streamed=streamed)
        few = {task: [models.padded()] for task in models.TASKS}
        sm.samerging(make(), packed, few, sm.models.causal_lm, config=config)  # what is loaded once
        given = dict.fromkeys(models.TASKS, batch)
        module = make()
        planned = dry_run(module, packed, given, sm.models.causal_lm, device=torch.device("cpu"), streamed=streamed).peak
        with large_tensors_mapped(), PeakMemory() as peak:
            sm.samerging(module, packed, {task: [batch] for task in given}, sm.models.causal_lm, config=config)
        found.append([peak.rise, planned, 4 * TEXTS * TOKENS * CLASSES])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
