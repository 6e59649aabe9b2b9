"""Tiny models of every kind of transformers' models, made, moved, saved and loaded, with what they are calibrated on."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

WORDS = "good bad rain sun goal vote".split()
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TEXTS = {"a": "good rain\nbad sun sun good rain\nrain rain good vote\nsun\n", "b": "goal vote\nvote goal goal bad\ngood vote\n"}
LAYERS = {"num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
ENCODER = {**LAYERS, "vocab_size": 16, "max_position_embeddings": 32}
DECODER = {**ENCODER, "num_key_value_heads": 1, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
GPT2 = {"vocab_size": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 2, "eos_token_id": 3}
PICTURES = {**LAYERS, "image_size": 8, "patch_size": 4, "num_labels": 3}
CONVNEXT = {"num_stages": 2, "hidden_sizes": [8, 16], "depths": [1, 1], "patch_size": 2, "num_labels": 3}
ENCODER_DECODER = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
EXPERTS_OF_QWEN = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
VISION, TEXT = {**LAYERS, "image_size": 8, "patch_size": 4}, {**ENCODER, "bos_token_id": 2, "eos_token_id": 3}
BART_LAYERS = {"layers": 1, "attention_heads": 2, "ffn_dim": 24}
BART = {
    **{f"{part}_{key}": value for part in ("encoder", "decoder") for key, value in BART_LAYERS.items()},
    **{"vocab_size": 16, "d_model": 16, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3},
    **{"decoder_start_token_id": 3, "forced_eos_token_id": 3},
}

FAMILIES = {  # class, its configuration's class and values
    "bert": ("BertForSequenceClassification", "BertConfig", ENCODER),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", ENCODER),
    "deberta": ("DebertaV2ForTokenClassification", "DebertaV2Config", {**ENCODER, "num_labels": 5}),
    "vit": ("ViTForImageClassification", "ViTConfig", PICTURES),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}),
    "convnext": ("ConvNextForImageClassification", "ConvNextConfig", CONVNEXT),
    "clip": ("CLIPForImageClassification", "CLIPConfig", {"vision_config": VISION, "text_config": TEXT, "num_labels": 3}),
    "t5": ("T5ForConditionalGeneration", "T5Config", {**ENCODER_DECODER, "decoder_start_token_id": 0}),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2),
    "gpt2-classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT2, "num_labels": 3}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DECODER, "head_dim": 8}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 3}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **EXPERTS_OF_QWEN}),
}


def make(family, seed=0):
    name, config, values = FAMILIES[family]
    torch.manual_seed(seed)
    return getattr(transformers, name)(getattr(transformers, config)(**values))


def move(model, seed, by=0.05):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += by * torch.randn_like(parameter)
    return model


def save_tokenizer(*folders, **special):
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    special = {"unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", **special}
    for folder in folders:
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, **{key: token for key, token in special.items() if token}
        ).save_pretrained(folder)


def save_pictures(folder, count=4, size=(9, 11), tasks="ab"):
    from PIL import Image

    for task in tasks:
        for i in range(count):
            path = folder / task / f"class{i % 2}" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.manual_seed(100 * i + ord(task[0]))
            Image.fromarray(torch.randint(256, (*size, 3), dtype=torch.uint8).numpy()).save(path)
    processor = getattr(transformers, "ViTImageProcessorPil", None) or transformers.ViTImageProcessor
    return processor(size={"height": 8, "width": 8})


def save_texts(root: Path) -> dict[str, Path]:
    for task, text in TEXTS.items():
        (root / f"{task}.txt").write_text(text)
    return {task: root / f"{task}.txt" for task in TEXTS}


def load(folder, architecture, ignored=(), **options):
    """A folder as plain transformers loads it; no tensor may be missing, none but those ignored too many."""
    model, info = getattr(transformers, architecture).from_pretrained(folder, output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"] - set(ignored) and not info["mismatched_keys"], info
    return model.eval()
