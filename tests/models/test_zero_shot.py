"""CLIP of transformers: heads beside their formula, coefficients beside plain autograd; experts may be vision towers alone."""

import pytest
import torch
from helpers import PATH_TOLERANCE, assert_alike, assert_close
from literal import learn

import samerge_ext as sm
from samerge_ext.models import zero_shot_classification, zero_shot_head

transformers = pytest.importorskip("transformers")
from clips import CLASSES, KEEP, TEMPLATES, clip, save_clips  # noqa: E402
from families import FAMILIES, TEXT, VISION  # noqa: E402


@pytest.fixture
def problem(tmp_path):
    """base, experts that differ from it in the vision tower, heads and batches in fp64; as folders the experts are that tower."""
    base, experts = save_clips(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "base")
    heads = {task: zero_shot_head(base, tokenizer, names, TEMPLATES) for task, names in CLASSES.items()}
    batches = {task: [torch.randn(3, 3, 8, 8, dtype=torch.float64) for _ in range(2)] for task in "ab"}
    return base, experts, tokenizer, heads, batches


def test_a_head_is_the_mean_of_a_classs_texts_times_the_logit_scale(problem):
    base, _, tokenizer, heads, _ = problem
    for task, names in CLASSES.items():
        rows = []
        for name in names:
            tokens = [tokenizer(template.replace("{}", name), return_tensors="pt")["input_ids"] for template in TEMPLATES]
            with torch.no_grad():  # text by text, without padding
                pooled = [base.text_projection(base.text_model(input_ids=ids).pooler_output)[0] for ids in tokens]
            mean = sum(text / text.norm() for text in pooled)
            rows.append(base.logit_scale.detach().exp() * mean / mean.norm())
        assert_alike(heads[task], torch.stack(rows), task)


def test_functions_are_templates_too_and_training_goes_on_as_it_was(problem):
    base, _, tokenizer, heads, _ = problem
    base.train()
    found = zero_shot_head(base, tokenizer, CLASSES["a"], [lambda name: f"{name} bad rain", "good {}"])
    assert torch.equal(found, heads["a"]) and base.training and not found.requires_grad


def test_texts_in_chunks_give_the_same_head(problem, monkeypatch):
    base, _, tokenizer, heads, _ = problem
    monkeypatch.setattr("samerge_ext.models.zero_shot.TEXTS", 3)
    assert_close(zero_shot_head(base, tokenizer, CLASSES["b"], TEMPLATES), heads["b"])


def test_logits_are_those_of_transformers(problem):
    """Of one template: whose head is the text's own features."""
    base, _, tokenizer, _, batches = problem
    texts = ["good rain", "sun", "goal vote"]
    head = zero_shot_head(base, tokenizer, texts, ["{}"])
    tokens = tokenizer(texts, padding=True, return_tensors="pt")
    pictures = batches["a"][0]
    with torch.no_grad():
        truth = base(pixel_values=pictures, input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        for batch in (pictures, {"pixel_values": pictures}):
            assert_alike(zero_shot_classification({"a": head})(base, batch, "a"), truth.logits_per_image)


def test_towers_alone_are_learned_as_plain_autograd_does(problem, tmp_path):
    base, experts, _, heads, batches = problem
    word = torch.tensor([[2, 5, 3]])

    def logits(model, batch, head):
        return model(input_ids=word, pixel_values=batch).image_embeds @ head.T

    options = {"lr": 0.5, "momentum": 0.9, "weight_decay": 5e-4}
    expected = learn(base, experts, heads, batches, steps=3, optimizer=lambda p: torch.optim.SGD(p, **options), logits=logits)[-1]
    folders = {task: tmp_path / task for task in "ab"}
    packed = sm.PackedWeights.from_folders(tmp_path / "base", folders, dtype=torch.float64, keep=KEEP)
    config = sm.SAMergingConfig(steps=3, optimizer="sgd", learning_rate=0.5, momentum=0.9, progress=False)
    result = sm.samerging(clip(1), packed, batches, zero_shot_classification(heads), config=config)
    places = [[name for name, _ in base.named_parameters()].index(name) for name in packed.layout.names]
    error = (result.coefficients - expected[:, places]).norm() / expected.norm()
    assert error < PATH_TOLERANCE[torch.float64]
    assert (expected - expected[0, 0]).norm() > 1e-3, "nothing was learned"

    result.save_pretrained(tmp_path / "out")
    merged = transformers.CLIPModel.from_pretrained(tmp_path / "out", dtype=torch.float64)
    for name, tensor in base.state_dict().items():  # the text tower goes along
        assert not name.startswith("text_model") or torch.equal(merged.state_dict()[name], tensor)
    logits_of, batch = zero_shot_classification(heads), batches["a"][0]
    assert_alike(logits_of(merged, batch, "a"), logits_of(result.module, batch, "a"))


@pytest.mark.parametrize("streamed", [False, True])
def test_whole_models_and_towers_with_projection_give_what_the_whole_model_gives(problem, tmp_path, streamed):
    base, experts, _, heads, batches = problem
    config = sm.SAMergingConfig(steps=2, optimizer="sgd", learning_rate=0.5, progress=False, streamed=streamed)
    whole = sm.PackedWeights.from_modules(base, experts, dtype=torch.float64)
    assert not [name for name in whole.layout.names if name.startswith("vision_model") == (name in whole.unchanged)]
    found = sm.samerging(clip(1), whole, batches, zero_shot_classification(heads), config=config)

    def tower(model):
        made = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(**VISION, projection_dim=8)).double()
        made.load_state_dict({name: model.state_dict()[name] for name in made.state_dict()})
        return made.eval()

    towers = sm.PackedWeights.from_modules(tower(base), {t: tower(e) for t, e in experts.items()}, dtype=torch.float64)
    alone = sm.samerging(tower(clip(1)), towers, batches, zero_shot_classification(heads), config=config)
    places = [whole.layout.names.index(name) for name in towers.layout.names]
    error = (alone.coefficients - found.coefficients[:, places]).norm() / alone.coefficients.norm()
    assert error < PATH_TOLERANCE[torch.float64]


def test_texts_of_siglip_are_padded_as_in_its_training():
    torch.manual_seed(0)
    config = transformers.SiglipConfig(text_config={**TEXT, "projection_size": 16}, vision_config=VISION)
    model = transformers.SiglipModel(config).double().eval()
    model.logit_scale.data.fill_(1.5)

    def tokenizer(texts, **options):
        assert options["padding"] == "max_length" and options["max_length"] == 32
        return {"input_ids": torch.tensor([[5 + len(text)] + [1] * 31 for text in texts])}

    found = zero_shot_head(model, tokenizer, ["x", "yy"], ["{}"])
    with torch.no_grad():
        ids = tokenizer(["x", "yy"], padding="max_length", max_length=32)["input_ids"]
        pictures = torch.randn(2, 3, 8, 8, dtype=torch.float64)
        out = model(input_ids=ids, pixel_values=pictures)
        logits = zero_shot_classification({"a": found})(model, pictures, "a")
    assert_alike(logits + model.logit_bias.detach(), out.logits_per_image)


@pytest.mark.parametrize(
    ("classes", "templates", "message"),
    [
        ([], ["{}"], "given are 0 and 1"),
        (["a"], [], "given are 1 and 0"),
        (["a"], ["a photo"], "template 'a photo' has no {}"),
    ],
)
def test_texts_that_make_no_head_are_refused(problem, classes, templates, message):
    base, _, tokenizer, _, _ = problem
    with pytest.raises(ValueError, match=message):
        zero_shot_head(base, tokenizer, classes, templates)


def test_a_model_without_the_tower_is_refused(problem):
    _, _, tokenizer, heads, batches = problem
    name, config, values = FAMILIES["vit"]
    vit = getattr(transformers, name)(getattr(transformers, config)(**values)).double()
    with pytest.raises(TypeError, match="ViTForImageClassification gives no image features"):
        zero_shot_classification(heads)(vit, batches["a"][0], "a")
    with pytest.raises(TypeError, match="ViTForImageClassification has no text tower"):
        zero_shot_head(vit, tokenizer, ["x"])
