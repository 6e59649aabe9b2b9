"""A tiny CLIP of transformers, fine-tunes of its image tower, and all that tasks of class names need, in folders."""

import torch
import transformers
from families import TEXT, VISION, move, save_pictures, save_tokenizer

CLASSES = {"a": ["good rain", "sun"], "b": ["goal", "vote", "bad goal"]}
TEMPLATES = ["{} bad rain", "good {}"]
KEEP = ["text_model.*", "*_projection.*", "logit_scale"]


def clip(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = transformers.CLIPConfig(vision_config=VISION, text_config=TEXT, projection_dim=8)
    return transformers.CLIPModel(config).to(dtype).eval()


def tower(model):
    """The image tower as a model of its own."""
    made = transformers.CLIPVisionModel(model.config.vision_config).to(model.dtype)
    own = model.state_dict()
    made.load_state_dict({name: own[name if name in own else f"vision_model.{name}"] for name in made.state_dict()})
    return made


def save_clips(root, dtype=torch.float64):
    """base, and by task experts that differ from it in the image tower, whose folders hold that alone."""
    base, experts = clip(dtype=dtype), {}
    base.save_pretrained(root / "base")
    save_tokenizer(root / "base")
    for seed, task in enumerate(CLASSES, 1):
        experts[task] = clip(dtype=dtype)
        move(experts[task].vision_model, seed)
        tower(experts[task]).save_pretrained(root / task)
    return base, experts


def save_tasks(root):
    """Pictures, and files of class names and templates: the calibration of a recipe."""
    save_pictures(root / "pictures").save_pretrained(root / "base")
    for task, names in CLASSES.items():
        (root / f"{task}.txt").write_text("\n".join(names))
    (root / "templates.txt").write_text("\n".join(TEMPLATES))
    return {
        "files": {task: str(root / "pictures" / task) for task in CLASSES},
        "classes": {task: str(root / f"{task}.txt") for task in CLASSES},
        "templates": {"b": str(root / "templates.txt")},
        "batch_size": 2,
    }
