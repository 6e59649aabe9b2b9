"""Model folders as transformers writes them: a tiny BERT classifier, two experts with heads of their own, calibration texts."""

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

WORDS = ["good", "bad", "rain", "sun", "goal", "vote"]
LABELS = {"mood": 2, "topic": 3}


def write(root: Path) -> Path:
    """base, mood and topic; mood.txt and topic.jsonl."""
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS])}
    tokenizer = transformers.BertTokenizerFast(vocab=vocabulary)

    def classifier(seed, labels):
        torch.manual_seed(seed)
        config = transformers.BertConfig(
            vocab_size=11, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, num_labels=labels
        )
        return transformers.BertForSequenceClassification(config)

    base = classifier(0, 2)
    shared = {n: t for n, t in base.state_dict().items() if not n.startswith("classifier")}
    for seed, (name, labels) in enumerate({"base": 2, **LABELS}.items()):
        model = classifier(seed, labels)
        model.load_state_dict(shared, strict=False)
        if name != "base":
            with torch.no_grad():
                for parameter in model.bert.parameters():
                    parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    (root / "mood.txt").write_text("good rain\nbad sun sun\n\nrain rain good\nsun\n")
    (root / "topic.jsonl").write_text("".join(json.dumps({"text": f"{a} {b}"}) + "\n" for a in WORDS for b in WORDS[:2]))
    return root


def weights(folder):
    return transformers.AutoModel.from_pretrained(folder).state_dict()
