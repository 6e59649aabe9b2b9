"""Tiny language models with more tokens than hidden states, packed in fp64, and texts for them in every form of batch."""

import copy

import families
import torch
import transformers

import samerge_ext as sm

TASKS = ("a", "b")
VOCABULARY = 23
DECODER = {**families.DECODER, "vocab_size": VOCABULARY}
DEEPSEEK = {
    **DECODER, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12,
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 4, "qk_rope_head_dim": 4, "v_head_dim": 8,
    "first_k_dense_replace": 1, "num_key_value_heads": 2,
}  # fmt: skip
MODELS = {  # the adapter, class, its configuration's class and values
    "gpt2": ("causal_lm", "GPT2LMHeadModel", "GPT2Config", {**families.GPT2, "vocab_size": VOCABULARY}),
    "llama": ("causal_lm", "LlamaForCausalLM", "LlamaConfig", DECODER),
    "qwen2, tied": ("causal_lm", "Qwen2ForCausalLM", "Qwen2Config", {**DECODER, "tie_word_embeddings": True}),
    "bert": ("masked_lm", "BertForMaskedLM", "BertConfig", {**families.ENCODER, "vocab_size": VOCABULARY}),
    "roberta": ("masked_lm", "RobertaForMaskedLM", "RobertaConfig", {**families.ENCODER, "vocab_size": VOCABULARY}),
    "t5": (
        "seq2seq_lm", "T5ForConditionalGeneration", "T5Config",
        {**families.ENCODER_DECODER, "vocab_size": VOCABULARY, "decoder_start_token_id": 0},
    ),
    "mixtral": ("causal_lm", "MixtralForCausalLM", "MixtralConfig", {**DECODER, "num_local_experts": 3}),
    "qwen3, experts": ("causal_lm", "Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**DECODER, **families.EXPERTS_OF_QWEN}),
    "deepseek": ("causal_lm", "DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "granite, scaled": ("causal_lm", "GraniteForCausalLM", "GraniteConfig", {**DECODER, "logits_scaling": 3.0}),
    "cohere, scaled": ("causal_lm", "CohereForCausalLM", "CohereConfig", {**DECODER, "logit_scale": 0.25}),
    # Their logits are more than a product.
    "gemma2, capped": ("causal_lm", "Gemma2ForCausalLM", "Gemma2Config", {**DECODER, "head_dim": 8}),
    "bart, biased": ("seq2seq_lm", "BartForConditionalGeneration", "BartConfig", {**families.BART, "vocab_size": VOCABULARY}),
}  # fmt: skip
EXACT = tuple(MODELS)[:-2]
TEXTS = ([2, 5, 6, 7, 20, 3], [2, 8, 9, 3])


def adapter(name):
    return getattr(sm.models, MODELS[name][0])


def make(name, dtype=torch.float64, **values):
    _, model, config, settings = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**{**settings, **values}))
    if "experts" in str(model.config):
        model.set_experts_implementation("eager")  # grouped matrix products are not for fp64
    return model.to(dtype).eval()


def make_packed(base, scale=0.2, **settings):
    experts = {task: families.move(copy.deepcopy(base), seed, scale) for seed, task in enumerate(TASKS, 1)}
    return sm.PackedWeights.from_modules(base, experts, dtype=base.dtype, **settings)


def padded(texts=TEXTS, left=False):
    """{input_ids, attention_mask: [B, S]}"""
    rows = {"input_ids": texts, "attention_mask": [[1] * len(text) for text in texts]}
    longest = max(map(len, texts))

    def pad(row):
        padding = [0] * (longest - len(row))
        return padding + row if left else row + padding

    return {name: torch.tensor([pad(row) for row in values]) for name, values in rows.items()}


def in_a_row(texts=TEXTS):
    """{input_ids, position_ids: [1, S]}"""
    return {
        "input_ids": torch.tensor([[token for text in texts for token in text]]),
        "position_ids": torch.tensor([[place for text in texts for place in range(len(text))]]),
    }


def make_batches(count=2):
    torch.manual_seed(3)
    texts = lambda: [torch.randint(4, VOCABULARY, (length,)).tolist() for length in (5, 3)]
    return {task: [padded(texts()) for _ in range(count)] for task in TASKS}
