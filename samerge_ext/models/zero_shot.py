"""Zero-shot classifiers of CLIP models, transformers' and open_clip's: heads that the text tower makes of class names.

With n(x) = x / ‖x‖, the templates k and the model's logit scale s, class c and a picture have

    head_c = eˢ n(mean_k n(text(template_k of c))),    logits = n(image) · headᵀ

as in "Learning Transferable Visual Models From Natural Language Supervision" (arXiv 2103.00020, section 3.1.4). A logit bias
(SigLIP) is one number for all classes, of which a soft-max knows nothing; it is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from samerge_ext.learning.shared_encoder import SharedEncoder

Template = str | Callable[[str], str]

TEMPLATES = ("a photo of a {}.",)
TEXTS = 64  # that run through the text tower at a time


@torch.no_grad()
def zero_shot_head(model: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[Template] = TEMPLATES) -> Tensor:
    """The head [classes, width] of a task, logit scale included; without that it is the transpose of what open_clip's own
    `build_zero_shot_classifier` gives.

    model: of transformers with `get_text_features` (CLIPModel, SiglipModel …), or of open_clip; as it is, on its device and in
        its type. tokenizer: that of the model, as transformers or open_clip loads it.
    classes: names, in the order of the labels; one may come twice, as two of ImageNet's do. templates: texts with {} in the place
        of the name, or functions of it.

    Raises ValueError for no classes, no templates and one without {}, TypeError for a model without a text tower.
    """
    classes, templates = list(classes), list(templates)
    _check_texts(classes, templates)
    if not (hasattr(model, "encode_text") or hasattr(model, "get_text_features")):
        raise TypeError(
            f"{type(model).__name__} has no text tower (encode_text, get_text_features): give the whole CLIP model, of "
            "transformers or of open_clip"
        )
    texts = [each.format(name) if isinstance(each, str) else each(name) for name in classes for each in templates]
    training = model.training
    model.eval()
    try:
        chunks = [texts[start : start + TEXTS] for start in range(0, len(texts), TEXTS)]
        embedded = torch.cat([normalize(_text_features(model, tokenizer, chunk), dim=-1) for chunk in chunks])
    finally:
        model.train(training)
    means = embedded.view(len(classes), len(templates), -1).mean(1)
    return model.logit_scale.exp() * normalize(means, dim=-1)


def zero_shot_classification(heads: Mapping[str, Tensor]) -> SharedEncoder:
    """The logits of tasks that share an image tower and differ in their heads, task -> [classes, width] of `zero_shot_head`: for
    `sm.samerging` and the like, whose module is the CLIP model of transformers or open_clip, or transformers' image tower with
    its projection.

    batch: {pixel_values: [B, channels, H, W]} as `picture_batches` makes them, or that tensor alone.
    """
    heads = dict(heads)

    def head(features: Tensor, task: str) -> Tensor:
        return features @ heads[task].to(features).mT

    return SharedEncoder(image_features, head)


def image_features(module: Any, batch: Tensor | Mapping[str, Tensor]) -> Tensor:
    """Normalised features [B, width] of a batch as of `zero_shot_classification`; TypeError for a module that gives none."""
    pixels = batch if isinstance(batch, Tensor) else batch["pixel_values"]
    if hasattr(module, "encode_image"):  # open_clip
        found = module.encode_image(pixels)
    elif hasattr(module, "get_image_features"):
        found = _pooled(module.get_image_features(pixel_values=pixels))
    else:
        found = getattr(module(pixels), "image_embeds", None)
    if not isinstance(found, Tensor):
        raise TypeError(
            f"{type(module).__name__} gives no image features; CLIP models of transformers and open_clip do, and transformers' "
            "image towers with their projection (CLIPVisionModelWithProjection)"
        )
    return normalize(found, dim=-1)


def _text_features(model: Any, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """[texts, width], as they are before they are normalised."""
    device = model.logit_scale.device
    if hasattr(model, "encode_text"):  # open_clip, whose tokenizers give tokens [texts, context]
        return model.encode_text(tokenizer(texts).to(device))
    # SigLIP was trained on texts that are padded so, and to CLIP padding makes no difference.
    length = model.config.get_text_config().max_position_embeddings
    tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
    known = {name: tensor.to(device) for name, tensor in tokens.items() if name in ("input_ids", "attention_mask")}
    return _pooled(model.get_text_features(**known))


def _pooled(features: Any) -> Tensor:
    """Of transformers 5 the features are one of several outputs, of older ones all of it."""
    return features if isinstance(features, Tensor) else features.pooler_output


def _check_texts(classes: Sequence[str], templates: Sequence[Template]) -> None:
    if not classes or not templates:
        raise ValueError(f"a zero-shot head is made of class names and templates; given are {len(classes)} and {len(templates)}")
    for template in templates:
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"the template {template!r} has no {{}} in the place of the class's name")
