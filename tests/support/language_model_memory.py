"""A learned merge of a wide vocabulary in a process of its own: prints [how far memory rose, how far the dry run says that it
rises, bytes of one task's logits]. Argument: 1 for streamed, 0 for resident."""

import json
import sys

import language_models as models
import torch

import samerge_ext as sm
from samerge_ext.budget.dry_run import dry_run
from samerge_ext.memory import PeakMemory, large_tensors_mapped

TEXTS, TOKENS, CLASSES = 24, 128, 40_000


def main():
    streamed = sys.argv[1] == "1"
    base = models.make("qwen2, tied", torch.float32, max_position_embeddings=TOKENS, vocab_size=CLASSES)
    packed = models.make_packed(base)
    batch = models.padded(torch.randint(4, CLASSES, (TEXTS, TOKENS)).tolist())
    few = {task: [models.padded()] for task in models.TASKS}
    config = sm.SAMergingConfig(steps=1, progress=False, streamed=streamed)
    sm.samerging(base, packed, few, sm.models.causal_lm, config=config)  # what is loaded once
    base = models.make("qwen2, tied", torch.float32, max_position_embeddings=TOKENS, vocab_size=CLASSES)
    batches = dict.fromkeys(models.TASKS, batch)
    planned = dry_run(base, packed, batches, sm.models.causal_lm, device=torch.device("cpu"), streamed=streamed).peak
    with large_tensors_mapped(), PeakMemory() as peak:
        sm.samerging(base, packed, {task: [batch] for task in batches}, sm.models.causal_lm, config=config)
    print(json.dumps([peak.rise, planned, 4 * TEXTS * TOKENS * CLASSES]))


if __name__ == "__main__":
    main()
