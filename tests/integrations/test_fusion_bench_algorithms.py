"""FusionBench's own algorithms, run unmodified on its classes and on ours: the same merged models and weights, in fp64.

Needs fusion-bench (`make test-fusion-bench`). Models, processors and pictures are tiny, random and made here.
"""

import copy
import importlib
import json
import sys
import types

import numpy as np
import pytest
import torch
from helpers import PATH_TOLERANCE

pytest.importorskip("fusion_bench", reason="needs fusion-bench: make test-fusion-bench")
pytestmark = pytest.mark.filterwarnings("ignore")

import lightning  # noqa: E402
import transformers  # noqa: E402
from lightning.fabric.loggers import Logger  # noqa: E402
from omegaconf import DictConfig  # noqa: E402
from PIL import Image  # noqa: E402

from samerge_ext.integrations import fusion_bench  # noqa: E402

TASKS = ("mnist", "svhn")
STEPS = 3
WEIGHTS_TOLERANCE = 1e-5  # absolute, of weights in fp32 that begin at 0.3
WRAPPED = {"init_values": 0.3, "clamp_weights": False, "tie_weights": True, "strict": False}


def changed(model, seed):
    """A copy as if fine-tuned."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        n: x + 0.05 * torch.randn(x.shape, generator=generator, dtype=x.dtype) if x.is_floating_point() else x
        for n, x in model.state_dict().items()
    }
    other = type(model)(model.config).double()
    other.load_state_dict(state)
    return other


def save_all(models, folder):
    for name, model in models.items():
        model.save_pretrained(folder / name)
    return {("_pretrained_" if name == "base" else name): str(folder / name) for name in models}


def family(make, folder):
    torch.manual_seed(0)
    base = make().double()
    return save_all({"base": base, **{task: changed(base, seed) for seed, task in enumerate(TASKS)}}, folder)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folders of a tiny CLIP and two experts, with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "bos_token_id": 298, "eos_token_id": 299, "pad_token_id": 299}
    vision = {**sizes, "image_size": 224, "patch_size": 112}

    def make():
        return transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))

    paths = family(make, folder)
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    vocabulary = {word: place for place, word in enumerate([*letters, *(letter + "</w>" for letter in letters)])}
    vocabulary |= {"<|startoftext|>": 298, "<|endoftext|>": 299}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    processor = transformers.CLIPProcessor(transformers.CLIPImageProcessor(), tokenizer)
    for path in paths.values():
        processor.save_pretrained(path)
    return paths


def pictures(task):
    generator = np.random.default_rng(TASKS.index(task))
    return [{"image": Image.fromarray(generator.integers(0, 255, (32, 32, 3), np.uint8)), "label": n % 10} for n in range(4)]


def clip_pool(paths):
    from fusion_bench.modelpool import CLIPVisionModelPool

    class Pool(CLIPVisionModelPool):
        def load_test_dataset(self, task, *args, **kwargs):
            return pictures(task)

        def get_model_config(self, name):
            return types.SimpleNamespace(path=self._models[name])

    return Pool(dict(paths), processor=paths["_pretrained_"])


def settings(**more):
    return DictConfig(
        {
            "name": "a test", "weights": None, "optimizer": "adam", "lr": 1e-2, **WRAPPED, "batch_size": 2, "num_workers": 0,
            "max_steps": STEPS, "fast_dev_run": False, "save_merging_weights": False, "cache_dir": ".", "devices": 1, **more,
        }
    )  # fmt: skip


def algorithm(path, *arguments, **options):
    """An algorithm of FusionBench, with the fabric that its program would give it."""
    module, _, name = path.rpartition(".")
    made = getattr(importlib.import_module(f"fusion_bench.method.{module}"), name)(*arguments, **options)
    made._fabric = made.fabric = lightning.Fabric(accelerator="cpu", devices=1, loggers=NoLogger())
    return made


class NoLogger(Logger):
    """FusionBench wants one."""

    name, version, log_dir, root_dir = "none", 0, ".", "."

    def log_hyperparams(self, *args, **kwargs):
        pass

    log_metrics = log_hyperparams


@pytest.fixture
def both(monkeypatch, tmp_path):
    """Runs a merge with FusionBench's classes, then with ours in their place; the state dicts of what came out."""
    from fusion_bench.models.wrappers import layer_wise_fusion, task_wise_fusion

    monkeypatch.chdir(tmp_path)
    theirs = (layer_wise_fusion.LayerWiseMergedModel, task_wise_fusion.TaskWiseMergedModel)

    def fails(*args, **kwargs):
        raise AssertionError("FusionBench's own class was used")

    def run(merge):
        found = []
        for ours in (False, True):
            torch.manual_seed(1)
            if not ours:
                found.append(merge())
                continue
            with fusion_bench.accelerate(), monkeypatch.context() as patch:
                for cls in theirs:
                    patch.setattr(cls, "__init__", fails)
                found.append(merge())
        return [{name: tensor.detach() for name, tensor in model.state_dict().items()} for model in found]

    return run


def assert_same(found, dtype=torch.float64):
    """Within rounding of numbers that went through dtype."""
    theirs, ours = found
    assert list(theirs) == list(ours)
    for name, truth in theirs.items():
        error, size = (ours[name].double() - truth.double()).norm(), truth.double().norm()
        assert error <= PATH_TOLERANCE[dtype] * size, f"{name}: {error:.1e} of {size:.1e}"


def test_clip_layer_wise_adamerging(both, clip):
    learned = []

    def merge():
        file = f"./weights{len(learned)}.pt"
        config = settings(save_merging_weights=file, max_steps=20)
        path = "adamerging.clip_layer_wise_adamerging.CLIPLayerWiseAdaMergingAlgorithm"
        model = algorithm(path, config).run(clip_pool(clip))
        learned.append(torch.load(file, weights_only=True))
        return model

    assert_same(both(merge))
    theirs, ours = learned
    assert (ours - theirs).abs().max() <= WEIGHTS_TOLERANCE
    assert (ours - WRAPPED["init_values"]).abs().max() > 0.1  # of 20 steps at 1e-2


def test_clip_task_wise_adamerging(both, clip):
    path = "adamerging.clip_task_wise_adamerging.CLIPTaskWiseAdaMergingAlgorithm"
    assert_same(both(lambda: algorithm(path, settings()).run(clip_pool(clip))))


@pytest.mark.parametrize(
    "name",
    [
        "clip_concrete_adamerging.ConcreteTaskWiseAdaMergingForCLIP",
        "clip_concrete_adamerging.ConcreteLayerWiseAdaMergingForCLIP",
        "clip_concrete_task_arithmetic.ConcreteTaskArithmeticAlgorithmForCLIP",
        "clip_safe_concrete_adamerging.ConcreteSafeTaskWiseAdaMergingForCLIP",
    ],
)
def test_concrete_masks_are_learned_too(both, clip, name):
    """Masks, and task-wise weights, are fp32 there."""
    more = {
        "merge_dtype": None, "base_lr": 1.0, "adamerging_lr": 1e-2, "scaling_factor": 0.3, "max_adamerging_steps": STEPS,
        "save_interval": 100, "initial_logits": 0.0, "temperature": 0.5, "eval_mask_type": "continuous", "mask_checkpoint": None,
        "adv_lr": 1e-2, "adv_weight": 0.1, "skip_training": False,
    }  # fmt: skip
    assert_same(both(lambda: algorithm(f"concrete_subspace.{name}", settings(**more)).run(clip_pool(clip))), torch.float32)


@pytest.mark.parametrize("skip", [False, True], ids=["learned", "merged alone"])
def test_gossip_stores_merged_weights_in_models(both, clip, skip):
    config = settings(
        gossip_max_steps=2, gossip_skip_adamerging=skip, accuracy_test_interval=0, improve_dataset=True, topo="ring"
    )
    path = "gossip.clip_layer_wise_gossip.CLIPLayerWiseGossipAlgorithm"
    assert_same(both(lambda: algorithm(path, config).run(clip_pool(clip))[-1]["model"]))


def test_task_wise_gossip(both, clip):
    config = settings(gossip_max_steps=2, gossip_skip_adamerging=False, accuracy_test_interval=0)
    path = "gossip.clip_task_wise_gossip.CLIPTaskWiseGossipAlgorithm"
    assert_same(both(lambda: algorithm(path, config).run(clip_pool(clip))[-1]["model"]))


class TextPool:
    """What the algorithms for language models ask a pool for; models are made anew at every call."""

    def __init__(self, make, vocabulary, labels=False):
        torch.manual_seed(0)
        self.models = {"_pretrained_": make()}
        self.models |= {task: changed(self.models["_pretrained_"], seed) for seed, task in enumerate(TASKS)}
        self.model_names = self.train_dataset_names = list(TASKS)
        self.vocabulary, self.labels, self.has_pretrained = vocabulary, labels, True

    def __len__(self):
        return len(self.model_names)

    def load_model(self, name):
        return copy.deepcopy(self.models[name])

    def load_test_dataset(self, task):
        generator = torch.Generator().manual_seed(TASKS.index(task))
        texts = torch.randint(self.vocabulary, (4, 6), generator=generator)
        mask = torch.ones(6, dtype=torch.long)
        return [{"input_ids": ids, "attention_mask": mask, **({"labels": ids} if self.labels else {})} for ids in texts]

    load_train_dataset = load_test_dataset

    def load_classifier(self, task):
        torch.manual_seed(TASKS.index(task))
        head = types.SimpleNamespace(score=torch.nn.Linear(16, 3, bias=False, dtype=torch.float64))
        return head


LEARNING = {
    "optimizer": DictConfig({"_target_": "torch.optim.Adam", "lr": 1e-2}),
    "dataloader_kwargs": DictConfig({"batch_size": 2, "num_workers": 0}),
    "max_steps": STEPS,
}


def t5():
    config = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "vocab_size": 50, "dropout_rate": 0.0}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**config, decoder_start_token_id=0)).double()


@pytest.mark.parametrize("variant", [None, "mgda"])
def test_flan_t5_layer_wise_adamerging(both, variant):
    """With tied embeddings, and by autograd.grad where ``variant`` is mgda."""
    path = "adamerging.flan_t5_layer_wise_adamerging.FlanT5LayerWiseAdaMergingAlgorithm"
    options = {**LEARNING, **WRAPPED, "tie_weights": False, "variant": variant}
    assert_same(both(lambda: algorithm(path, **options).run(TextPool(t5, 50))))


def test_gpt2_layer_wise_adamerging(both):
    def gpt2():
        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 50, "n_positions": 8}
        return transformers.GPT2Model(transformers.GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).double()

    path = "adamerging.gpt2_layer_wise_adamerging.GPT2LayerWiseAdaMergingAlgorithm"
    assert_same(both(lambda: algorithm(path, **LEARNING, **WRAPPED).run(TextPool(gpt2, 50))))


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_llama_layers_are_wrapped_one_by_one(both, sparsity):
    def llama():
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "vocab_size": 50}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_key_value_heads=2)).double()

    options = {**LEARNING, **WRAPPED, "optimizer": "adam", "lr": 1e-2, "sparsity_ratio": sparsity, "start_layer_idx": 0.3}
    options |= {"seed": 0, "output_dir": "out", "average_attntion": True, "init_weights_path": None, "save_merged_model": False}
    path = "adamerging.llama_adamerging.LayerWiseAdaMergingForLlamaSFT"
    pool = lambda: TextPool(llama, 50, labels=True)
    assert_same(both(lambda: algorithm(path, **options, normalized_merging_weights=True).run(pool())))


def test_the_command_line_merges_the_same(clip, monkeypatch, tmp_path):
    """From given weights, since data sets would be downloaded."""
    from fusion_bench.models.wrappers.layer_wise_fusion import LayerWiseMergedModel
    from fusion_bench.scripts.cli import _hydra_main

    monkeypatch.chdir(tmp_path)
    layers = len(list(transformers.CLIPVisionModel.from_pretrained(clip["_pretrained_"]).parameters()))
    torch.save(torch.rand(len(TASKS), layers), "weights.pt")
    models = ",".join(f"{name}:{path}" for name, path in clip.items())
    pool = ["modelpool=CLIPVisionModelPool/clip-vit-base-patch32_TA8", "~modelpool.models", f"+modelpool.models={{{models}}}"]
    method = ["method=adamerging/clip", f"method.weights={tmp_path}/weights.pt", "taskpool=dummy"]
    arguments = [*pool, *method, "hydra.run.dir=.", "fabric.accelerator=cpu"]
    found = []
    for main in (_hydra_main, fusion_bench.main):
        folder = tmp_path / main.__name__
        monkeypatch.setattr(sys, "argv", ["fusion_bench", *arguments, f"merged_model_save_path={folder}"])
        try:
            main()
        finally:
            fusion_bench.restore()
        found.append(transformers.CLIPVisionModel.from_pretrained(folder).state_dict())
        monkeypatch.setattr(LayerWiseMergedModel, "merge_weights", None)  # the second time, FusionBench's own cannot merge
    assert_same(found)
