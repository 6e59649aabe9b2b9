"""The documents: their code runs on tiny models, and what cannot run in a test names only what is there.

Every fenced block of README.md and docs/*.md is treated, in the order of its page and in one namespace: Python is run, YAML
becomes a recipe file (its first line names it), and of the rest every line is a command. `samerge` runs in this process; what
takes minutes, a network or a GPU is held against the Makefile, pyproject.toml or the script that it names. A block or command of
another kind fails.
"""

import importlib
import json
import re
import shlex
import socket
import tomllib
import types
import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import fusion_bench_names
import pytest
import torch
import typer
from families import move, save_pictures
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from typer.testing import CliRunner

from samerge_ext.cli.commands import app

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
DOCUMENTS = [*PAGES, "SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/NOTES.md", "benchmarks/results/README.md"]
pytestmark = pytest.mark.skipif(not (ROOT / "docs").exists(), reason="needs the source tree")

# What a page says that the reader has; all else its blocks make themselves.
GIVEN = {
    "README.md": ("module", "news_batches", "spam_batches"),
    "docs/gpu.md": ("module", "calibration", "logits"),
    "docs/integrations.md": ("algorithm", "modelpool", "calibration", "logits"),
    "docs/distributed.md": ("module", "calibration", "logits"),
    "docs/memory.md": ("calibration", "logits"),
}
# A run of a few steps, on the CPU, is enough to show that the code is right.
SHORTER = {r"\b(steps[=:] ?)\d+": r"\g<1>2", r'"cuda"': '"cpu"', "--device cuda": "--device cpu"}
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "kernels", "samerge_ext", "tests")
OPEN_CLIP = find_spec("open_clip") is not None  # of which few environments have one; the others compile its blocks alone
WORDS = ["good", "bad", "rain", "sun", "goal", "vote"]
EXPERTS = {"news": 3, "spam": 2, "mail": 2}  # task -> classes


@dataclass(frozen=True)
class Block:
    page: str
    line: int  # of its first line of text
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    text = text_of(page)
    found = [
        Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])
        for match in re.finditer(r"^```(.*)\n((?:.*\n)*?)```$", text, re.MULTILINE)
    ]
    others = re.search(r"^\s*(?:```|~~~).*|^(?: {4}|\t).*", prose(page), re.MULTILINE)
    assert not others, f"{page}: a block was not read: {others[0]}"
    return found


def prose(page: str) -> str:
    return re.sub(r"^```.*\n(?:.*\n)*?```$", "", text_of(page), flags=re.MULTILINE)


# The reader's folder.


def classifier(labels: int, width: int = 16):
    sizes = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, num_labels=labels, **sizes))


def save_adapter(folder: Path, width: int = 16) -> None:
    """An adapter of two matrices, as PEFT saves it."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    modules = [f"base_model.model.bert.encoder.layer.0.attention.self.{name}" for name in ("query", "value")]
    shapes = {"lora_A.weight": (2, width), "lora_B.weight": (width, 2)}
    tensors = {f"{module}.{name}": torch.randn(shape) for module in modules for name, shape in shapes.items()}
    save_file(tensors, folder / "adapter_model.safetensors")


def save_vision_models() -> None:
    """Bases and experts of CLIP, with vision towers as experts, and of a ResNet, and pictures for both."""
    layers = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    text, vision = {"vocab_size": 11, "bos_token_id": 2, "eos_token_id": 3}, {"image_size": 8, "patch_size": 4}
    towers = {"text_config": {**text, **layers}, "vision_config": {**vision, **layers}}
    clip = transformers.CLIPModel(transformers.CLIPConfig(**towers, projection_dim=8))
    clip.save_pretrained("clip/base")
    resnet = transformers.ResNetForImageClassification(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=2)
    )
    resnet.save_pretrained("resnet/base")
    for seed, task in enumerate(("cars", "signs"), 1):
        tower = transformers.CLIPVisionModel(clip.config.vision_config)
        tower.load_state_dict(clip.vision_model.state_dict())
        move(tower, seed).save_pretrained(f"clip/{task}")
        move(resnet, seed).save_pretrained(f"resnet/{task}")
        Path(f"{task}.txt").write_text("good rain\nbad sun\n")
    Path("sign-templates.txt").write_text("goal {}\n")
    processor = save_pictures(Path("pictures"), tasks=("cars", "signs"))
    for family in ("clip", "resnet"):
        processor.save_pretrained(f"{family}/base")


def save_open_clip(monkeypatch) -> None:
    """A tiny ViT-B-32 in open_clip's place of it, and fine-tunes of it."""
    import open_clip

    vision = {"image_size": 8, "patch_size": 4, "layers": 1, "width": 16, "head_width": 8}
    text = {"context_length": 8, "width": 16, "heads": 2, "layers": 1}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-B-32", {"embed_dim": 8, "vision_cfg": vision, "text_cfg": text})
    Path("open_clip").mkdir()
    model = open_clip.create_model("ViT-B-32")
    for seed, name in enumerate(("base", "cars", "signs")):
        torch.save((move(model.visual, seed) and model).state_dict(), f"open_clip/{name}.pt")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory: tiny models, adapters and texts under the names that the documents use."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    Path("vocabulary").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    tokenizer = transformers.BertTokenizerFast(vocab_file="vocabulary")
    base = classifier(2)
    models = {"base": base, "experts/news-wide": classifier(EXPERTS["news"], width=24)}
    for task, labels in EXPERTS.items():
        models[f"experts/{task}"] = expert = classifier(labels)
        expert.bert.load_state_dict(base.bert.state_dict())
        with torch.no_grad():
            for parameter in expert.bert.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
    for name, model in models.items():
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    config = transformers.GPT2Config(vocab_size=11, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    for name in ("base", "news", "spam"):
        transformers.GPT2LMHeadModel(config).save_pretrained(f"language/{name}")
        tokenizer.save_pretrained(f"language/{name}")
    for task in ("news", "spam"):
        save_adapter(Path("adapters") / task)
    save_vision_models()
    tokenizer.save_pretrained("clip/base")
    if OPEN_CLIP:
        save_open_clip(monkeypatch)
    Path("news.txt").write_text("".join(f"{word} rain\n" for word in WORDS))
    Path("spam.jsonl").write_text("".join(json.dumps({"text": f"{word} sun goal"}) + "\n" for word in WORDS))
    records = [{"text": f"{word} rain", "label": number % EXPERTS["news"]} for number, word in enumerate(WORDS)]
    Path("news-test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return tmp_path


def reader_has() -> dict:
    batches = {
        task: [{"input_ids": torch.randint(5, 11, (2, 4)), "attention_mask": torch.ones(2, 4, dtype=torch.int64)}]
        for task in ("news", "spam")
    }
    return {
        "module": transformers.AutoModelForSequenceClassification.from_pretrained("base/"),
        "logits": lambda module, batch, task: module(**batch).logits,
        "calibration": batches,
        "algorithm": types.SimpleNamespace(run=lambda modelpool: modelpool),
        "modelpool": {},
        **{f"{task}_batches": held for task, held in batches.items()},
    }


@pytest.fixture
def one_rank(tmp_path, monkeypatch):
    """What torchrun tells a process, of a world of one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


# What the blocks hold.


def shorter(text: str) -> str:
    for pattern, replacement in SHORTER.items():
        text = re.sub(pattern, replacement, text)
    return text


def write_recipe(block: Block) -> None:
    name = re.match(r"# (\w+\.yaml)\n", block.text)
    assert name, f"{block}: the first line of a YAML block names its file, '# NAME.yaml'"
    Path(name[1]).write_text(shorter(block.text))


def run_python(block: Block, namespace: dict) -> None:
    source = "\n" * (block.line - 1) + shorter(block.text)  # an error names the page and its line
    code = compile(source, str(ROOT / block.page), "exec")
    if "import open_clip" in block.text and not OPEN_CLIP:
        warnings.warn(f"{block} is only compiled, as open_clip is not installed: make test-open-clip", stacklevel=2)
    else:
        exec(code, namespace)


@contextmanager
def saying(where: str):
    """Adds to an error where in the documents it comes from."""
    try:
        yield
    except Exception as error:
        error.add_note(where)
        raise


def check_line(block: Block, number: int, line: str, *, run: bool) -> None:
    if words := shlex.split(shorter(line), comments=True):
        with saying(f"{block.page}:{block.line + number}: {line}"):
            check_command(words, run=run)


def check_command(words: list[str], *, run: bool) -> None:
    """Runs a command line, or looks up what it names where it cannot be run here."""
    program, *arguments = words
    if program == "samerge":
        if run and arguments[0] != "demo":  # which takes minutes
            result = CliRunner().invoke(app, arguments, catch_exceptions=False)
            assert result.exit_code == 0, result.output
        else:
            check_samerge(arguments)
    elif program == "torchrun":  # one process does what it would start several for
        started = get_args_parser().parse_args(arguments)
        assert started.module and started.training_script == "samerge_ext", arguments
        check_command(["samerge", *started.training_script_args], run=run)
    elif program == "make":
        missing = set(arguments) - make_targets()
        assert arguments and not missing, f"no targets of the Makefile: {missing}"
    elif program == "pip":
        assert arguments[0] == "install"
        check_installed(arguments[1:])
    elif program in ("python", ".venv/bin/python"):
        script, *rest = arguments
        if script == "-m" and rest[0].startswith("samerge_ext."):
            assert callable(importlib.import_module(rest[0]).main), f"{rest[0]} is no command"
            return
        if script == "-m":
            assert rest[0] == "pytest", f"{rest[0]} is not known here"
            script, rest = "benchmarks/conftest.py", rest[1:]
            known = {"-k", "-m", *script_options(script)}
        else:
            known = script_options(script)
        unknown = {word for word in rest if word.startswith("-")} - known
        assert not unknown, f"{script} has no {unknown}"
    else:
        raise AssertionError(f"no way to check {program!r}; teach tests/test_docs.py one")


def check_samerge(arguments: list[str]) -> None:
    """That a subcommand, its options and a study exist."""
    if arguments == ["--help"]:
        return
    commands = typer.main.get_command(app).commands
    assert arguments[0] in commands, f"samerge has no {arguments[0]}"
    options = {name: option for option in commands[arguments[0]].params for name in (*option.opts, *option.secondary_opts)}
    unknown = {word for word in arguments if word.startswith("--")} - {*options, "--help"}
    assert not unknown, f"samerge {arguments[0]} has no {unknown}"
    if "--study" in arguments:
        study = arguments[arguments.index("--study") + 1]
        assert study == "STUDY" or study in re.findall(r"[\w-]+", options["--study"].help), f"there is no study {study}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):(?!=)", text_of("Makefile"), re.MULTILINE))


def script_options(script: str) -> set[str]:
    return set(re.findall(r'add(?:_argument|option)\(\s*"(--?[\w-]+)"', text_of(script)))


def check_installed(requirements: list[str]) -> None:
    project = tomllib.loads(text_of("pyproject.toml"))["project"]
    dependencies = {re.match(r"[\w-]+", name)[0] for name in project["dependencies"]}
    for requirement in requirements:
        name, *extra = re.fullmatch(r"([\w.-]+)(?:\[(\w+)\])?", requirement).groups()
        assert name in (".", "-e", "samerge_ext", *dependencies), f"{requirement} is no part of the installation"
        assert extra == [None] or extra[0] in project["optional-dependencies"], f"there is no extra {extra}"


@pytest.mark.parametrize("page", PAGES)
def test_the_blocks_of_a_page_run(page, folder, one_rank, monkeypatch):
    if page == "docs/integrations.md":
        fusion_bench_names.put_in_place(monkeypatch)
    namespace = {name: value for name, value in reader_has().items() if name in GIVEN.get(page, ())}
    for block in blocks(page):
        if block.language == "python":
            run_python(block, namespace)
        elif block.language == "yaml":
            write_recipe(block)
        elif block.language == "":
            for number, line in enumerate(block.text.splitlines()):
                check_line(block, number, line, run=True)
        else:
            raise AssertionError(f"{block}: no way to check a block of {block.language!r}; teach tests/test_docs.py one")
    for config in folder.glob("merged*/config.json"):
        assert transformers.AutoModel.from_pretrained(config.parent).num_parameters() > 0


@pytest.mark.parametrize("page", sorted({*DOCUMENTS} - {*PAGES}))
def test_commands_that_are_only_told_exist(page):
    for block in blocks(page):
        assert block.language == "", f"{block}: only commands are known outside of the README and docs/"
        for number, line in enumerate(block.text.splitlines()):
            check_line(block, number, line, run=False)


def spans(page: str) -> list[str]:
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


@pytest.mark.parametrize("page", DOCUMENTS)
def test_what_is_named_in_the_text_exists(page):
    """Commands, files and names of the package that stand between backticks; capitals such as NAME stand for anything."""
    for span in spans(page):
        with saying(f"{page}: `{span}`"):
            if re.match(r"(samerge|make|python|\.venv/bin/python|pip) ", span):
                check_command(shlex.split(span), run=False)
            elif re.match(rf"({'|'.join(FOLDERS)})/[\w./-]*$", span) and not re.search("[A-Z]{3}", span):
                assert (ROOT / span).exists(), f"there is no {span}"
            elif re.fullmatch(r"[a-z_]+\.py", span):
                assert any(next((ROOT / folder).rglob(span), None) for folder in FOLDERS), f"there is no {span}"
            elif match := re.match(r"sm((?:\.\w+)+)", span):
                resolve("samerge_ext" + match[1])


def resolve(path: str):
    """The module or attribute of a dotted path."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for name in parts[length:]:
            assert hasattr(value, name), f"there is no {path}"
            value = getattr(value, name)
        return value
    raise AssertionError(f"there is no {path}")


def test_the_changelog_says_where_modules_are():
    moved = re.findall(r"^\| `(samerge_ext[\w.]*)` \| `(samerge_ext[\w.]*)` \|", text_of("CHANGELOG.md"), re.MULTILINE)
    assert moved
    for _, new in moved:
        resolve(new)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", DOCUMENTS)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (ROOT / page).parent / path if path else ROOT / page
        assert found.exists() and found.resolve().is_relative_to(ROOT), f"{page}: {target}"
        assert not anchor or anchor in anchors(found), f"{page}: {target}"


def test_every_page_is_reached_from_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)", text_of("README.md")))
    assert linked == {page for page in PAGES if page != "README.md"}
