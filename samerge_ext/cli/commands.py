"""The subcommands of `samerge`. What needs torch is imported once the arguments are checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dumps as as_json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import samerge_ext as sm
from samerge_ext.checkpoints.reading import cut, explained, shown
from samerge_ext.checkpoints.task_names import names_of_folders
from samerge_ext.cli.messages import is_speaker, torchrun_rank, warnings_as_lines

app = typer.Typer(
    help="Merge fine-tuned models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all that a refused recipe needs
)

# Errors that the user can mend: shown as one message, without a traceback.
MISTAKES = (ValueError, FloatingPointError, OSError, ModuleNotFoundError)


@contextmanager
def _told() -> Iterator[None]:
    """Mistakes end the command with a message and exit code 1; the package's warnings are a line each."""
    with warnings_as_lines():
        try:
            yield
        except MISTAKES as error:
            _fail(error)


def _pairs(option: str, values: list[str] | None, parse: Callable[[str], Any] = str) -> dict[str, Any]:
    pairs = {}
    for value in values or ():
        key, equals, text = value.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{shown(value)}; expected NAME=VALUE", param_hint=option)
        try:
            pairs[key] = parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{cut(key)}={shown(text)} {error}", param_hint=option) from error
    return pairs


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="YAML file with mergekit's keys", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    merge_method: Annotated[
        str | None,
        typer.Option(help="one of mergekit's (ties, slerp, della …), wudi (by default), samerging, adamerging or statsmerging"),
    ] = None,
    base_model: Annotated[Path | None, typer.Option(help="folder of the pretrained model")] = None,
    models: Annotated[list[Path] | None, typer.Option("--model", help="folder of an expert; once for each")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="name of a model's task; once for each")] = None,
    heads: Annotated[list[str] | None, typer.Option("--head", help='pattern of task heads, "classifier.*"')] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help='pattern of tensors that not all models have, and that stay as they are, "visual.*"')
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="whose tokens the merged model has: base, union or a folder; the base's by default")
    ] = None,
    parameters: Annotated[list[str] | None, typer.Option("--parameter", help="KEY=VALUE of the method")] = None,
    device: Annotated[str | None, typer.Option(help="what merges: cpu, cuda, cuda:1; the same as --parameter device=…")] = None,
    calibration: Annotated[list[str] | None, typer.Option(help="TASK=FILE of unlabelled texts")] = None,
    calibration_texts: Annotated[int | None, typer.Option(help="texts per task; all by default")] = None,
    batch_size: Annotated[int | None, typer.Option(help="calibration texts per task and step")] = None,
    max_length: Annotated[int | None, typer.Option(help="tokens of a calibration text")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16, of what is written too")] = None,
    task_vector_dtype: Annotated[
        str | None, typer.Option(help="storage of the task vectors: float32 …, int8, int4, int4-residual or lora")
    ] = None,
    out_dtype: Annotated[str | None, typer.Option(help="of what is written, where that differs")] = None,
    overwrite: Annotated[bool, typer.Option(help="replace what OUT holds")] = False,
    report: Annotated[bool, typer.Option(help="write report.html and report.json into OUT, too")] = True,
    shard_size: Annotated[str | None, typer.Option(help="of the files that are written, such as 500MB; 5GB by default")] = None,
    rank: Annotated[
        int | None, typer.Option(help="which this is of several processes that merge into OUT, from 0 on; torchrun's is known")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="how many these processes are")] = None,
) -> None:
    """Merge as CONFIG says; options replace its keys."""
    from samerge_ext.recipes.recipe import load_recipe
    from samerge_ext.recipes.yaml_text import parse_yaml

    calibration_keys = {
        "files": _pairs("--calibration", calibration),
        "texts": calibration_texts,
        "batch_size": batch_size,
        "max_length": max_length,
    }
    given = {
        "merge_method": merge_method,
        "base_model": base_model,
        "models": [{"model": model} for model in models or ()],
        "tasks": tasks,
        "heads": heads,
        "keep": keep,
        "tokenizer": {"source": tokenizer} if tokenizer else None,
        "parameters": _pairs("--parameter", parameters, parse_yaml) | ({"device": device} if device else {}),
        "calibration": {key: value for key, value in calibration_keys.items() if value},
        "dtype": dtype,
        "task_vector_dtype": task_vector_dtype,
        "out_dtype": out_dtype,
    }
    with _told():
        started = time.perf_counter()
        recipe = load_recipe(config, {key: value for key, value in given.items() if value})
        recipe.require_files()
        from samerge_ext.recipes.run import run_recipe
        from samerge_ext.recipes.torchrun import rank_of_torchrun

        of_options = _rank(rank, ranks)
        run_recipe(recipe, out, overwrite=overwrite, report=report, shard_size=shard_size, rank=of_options)
        this = of_options or rank_of_torchrun()
    seconds = time.perf_counter() - started
    if this.count > 1 and recipe.calibration is None:  # from file to file every rank is through by itself
        typer.echo(f"{recipe.merge_method}: {this} is through after {seconds:.1f} s")
    elif is_speaker():
        typer.echo(f"{recipe.merge_method}: {len(recipe.experts)} experts merged in {seconds:.1f} s, written to {out}")


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML file with mergekit's keys", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Argument(help="folder to write; its place and space are checked, too")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="the most that a learned merge is to take, such as 16GB")] = None,
    overwrite: Annotated[bool, typer.Option(help="OUT may exist")] = False,
) -> None:
    """Whether a merge will go, and what it takes. From its folders' headers alone: what is merged and kept, disk and memory, of a
    learned merge by each way to hold the merged model. Where it will not go, ends with the merge's own error.
    """
    from samerge_ext.recipes.recipe import load_recipe

    with _told():
        recipe = load_recipe(config, {"parameters": {"memory_budget": memory_budget}} if memory_budget else {})
        recipe.require_files()
        from samerge_ext.recipes.check import check_recipe

        lines = check_recipe(recipe, out, overwrite=overwrite)
    typer.echo("\n".join(lines))


app.command("plan", hidden=True)(check)  # what it was called when it planned memory alone


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="merged model", exists=True, file_okay=False)],
    similarity: Annotated[bool, typer.Option("--similarity", help="read the models, and add how alike task vectors are")] = False,
    loss_slice: Annotated[bool, typer.Option("--loss-slice", help="run samerging's loss around λ, and add it")] = False,
) -> None:
    """Write report.html of a merged model again. With options, with what takes time to know."""
    with _told():
        from samerge_ext.reports.report import read_report
        from samerge_ext.reports.writing import rewrite

        found = read_report(folder)
        if similarity or loss_slice:
            from samerge_ext.recipes.from_report import add_loss_slice, add_similarity

            for add in [add_similarity] * similarity + [add_loss_slice] * loss_slice:
                add(found, folder)
        typer.echo(rewrite(folder, found))


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="a merged model", exists=True, file_okay=False)],
    b: Annotated[Path, typer.Argument(help="another one", exists=True, file_okay=False)],
    html: Annotated[Path | None, typer.Option(help="write a page in place of printing")] = None,
) -> None:
    """Two merges side by side. Where their settings, models, coefficients and sizes differ, by their report.json."""
    with _told():
        from samerge_ext.reports.comparison import as_page, as_text, compared

        found = compared(a, b)
        if html is None:
            typer.echo(as_text(found))
            return
        from samerge_ext.checkpoints.saving import atomic_write

        page = as_page(found)
        with atomic_write(html, "w") as file:
            file.write(page)
    typer.echo(html)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a causal language model or a sequence classifier")],
    files: Annotated[
        list[str],
        typer.Argument(help="texts (.txt, one a line, or .jsonl), of a classifier .jsonl with text and label; FILE or TASK=FILE"),
    ],
    json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    batch_size: Annotated[int, typer.Option(min=1, help="texts at a time")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="tokens; longer texts are cut")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first so many texts of each file")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights, float32 …; as they are stored by default")] = None,
    device: Annotated[str, typer.Option(help="what computes: cpu, cuda, cuda:1")] = "cpu",
    report: Annotated[bool, typer.Option("--report", help="add the scores to the merged model's report, too")] = False,
) -> None:
    """Perplexity or accuracy of a model folder on files. Of a task's own head, as TASK=FILE."""
    with _told():
        if report:
            from samerge_ext.reports.report import read_report
            from samerge_ext.reports.writing import rewrite

            found = read_report(folder)
        named = {task: Path(path) for task, path in _tasks_and_folders(files)}
        for path in (folder, *named.values()):
            path.stat()
        from samerge_ext.models.evaluation import evaluate as evaluate_folder

        options: dict[str, Any] = {"limit": limit, "batch_size": batch_size, "max_length": max_length, "device": device}
        scores = evaluate_folder(folder, named, dtype=_float_type(dtype), **options)
        if report:
            found.scores.update({task: score.known() for task, score in scores.items()})
            rewrite(folder, found)
    if json:
        typer.echo(as_json({task: score.known() for task, score in scores.items()}))
        return
    for task, score in scores.items():
        if score.accuracy is None:
            typer.echo(f"{task}: perplexity {score.perplexity:.4f} of {score.tokens} tokens in {score.texts} texts")
        else:
            typer.echo(f"{task}: accuracy {score.accuracy:.2%} of {score.texts} texts")


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="all eight tasks and six layers")] = False,
    study: Annotated[
        str,
        typer.Option(
            help="main, methods, many (tasks), guest, claims, tuning, ablation, features, learner, quantised, unseen, "
            "robustness, heterogeneous or language"
        ),
    ] = "main",
    seeds: Annotated[int | None, typer.Option(help="how many; 1, or 3 with --full")] = None,
    out: Annotated[Path, typer.Option(help="folder for the table, the plots and the merged model")] = Path("samerge-demo"),
    cache: Annotated[Path, typer.Option(help="folder for experts and finished cells")] = Path(".cache-demo"),
    progress: Annotated[bool, typer.Option(help="show progress bars")] = True,
) -> None:
    """Fine-tune experts, merge them and show what came out. With every method."""
    with _told():
        from rich.console import Console

        from samerge_ext.demo.studies import run_study

        console = Console()
        run_study(study, full=full, seeds=seeds or (3 if full else 1), out=out, cache=cache, progress=progress, console=console)


@app.command()
def stats(
    base: Annotated[Path, typer.Argument(help="folder of the pretrained model")],
    experts: Annotated[list[str], typer.Argument(help="folders of experts, each as FOLDER or as TASK=FOLDER")],
    of: Annotated[str, typer.Option(help="experts or task_vectors")] = "experts",
    singular_values: Annotated[int, typer.Option(help="how many of the largest ones")] = 3,
    heads: Annotated[list[str] | None, typer.Option("--head", help='pattern of task heads, "classifier.*"')] = None,
    keep: Annotated[
        list[str] | None, typer.Option(help='pattern of tensors that not all models have, and that stay as they are, "visual.*"')
    ] = None,
    out: Annotated[Path | None, typer.Option(help="write .csv or .json in place of printing")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a PNG of the singular values of every layer")] = None,
) -> None:
    """Statistics of every layer of experts. Mean, variance, norm and largest singular values."""
    with _told():
        folders = _tasks_and_folders(experts)
        if out is not None and out.suffix not in (".csv", ".json"):
            raise ValueError(f"{out}: statistics are written as .csv or .json")
        from samerge_ext.reports.plots import plot_singular_values
        from samerge_ext.statistics.features import Features, statistics_rows, write_statistics

        packed = sm.PackedWeights.from_folders(base, folders, heads=heads or (), keep=keep or ())
        features = Features.of_packed(packed, of=of, singular_values=singular_values)
        if plot is not None:
            plot_singular_values(features.values, packed.tasks, packed.layout.names, plot)
        if out is not None:
            write_statistics(features, out)
    if out is not None:
        typer.echo(f"{packed.num_tasks} experts, {packed.layout.num_layers} layers: statistics written to {out}")
        return
    rows = statistics_rows(features)
    lines = [list(rows[0]), *([text if isinstance(text, str) else f"{text:.6g}" for text in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # as wide as it is: a layer's name that is cut would not be found
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@app.command("from-gguf")
def from_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file of a decoder", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="model folder to write")],
    like: Annotated[Path | None, typer.Option(help="folder of the original model's config.json and tokenizer")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="replace what OUT holds")] = False,
) -> None:
    """Make a model folder of a GGUF file. Its codes are dequantised."""
    with _told():
        from samerge_ext.models.gguf import folder_of_gguf

        folder_of_gguf(file, out, like=like, dtype=_float_type(dtype), overwrite=overwrite)
    typer.echo(f"written to {out}")


@app.command("to-dcp")
def to_dcp(
    folder: Annotated[Path, typer.Argument(help="model folder or weight file", exists=True)],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    key: Annotated[str, typer.Option(help="that the state dict is under; empty for a state dict by itself")] = "model",
    overwrite: Annotated[bool, typer.Option(help="replace what OUT holds")] = False,
) -> None:
    """Write a model folder as torch.distributed.checkpoint does. For training with FSDP; such a folder is read as any other."""
    with _told():
        from samerge_ext.checkpoints.dcp_writing import save_dcp

        save_dcp(folder, out, key=key or None, overwrite=overwrite)
    typer.echo(f"written to {out}")


@app.command()
def info() -> None:
    """Versions, backends, threads and devices. Of a backend that is missing, why it is."""
    with _told():
        import torch
        from rich.console import Console
        from rich.table import Table

        from samerge_ext.backend import cpu_level

    table = Table("", "", box=None, show_header=False)
    table.add_row("samerge_ext", sm.__version__)
    table.add_row("torch", torch.__version__)
    for name, reason in sm.available().items():
        table.add_row(f"backend {name}", reason or "available")
    table.add_row("CPU instructions", cpu_level() or "none of our own")
    table.add_row("threads", str(torch.get_num_threads()))
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    table.add_row("CUDA devices", ", ".join(devices) or "none")
    Console().print(table)


def _rank(rank: int | None, ranks: int | None) -> Any:
    """The `Rank` that options say; None where they say none. Raises ValueError for one without the other."""
    if rank is None and ranks is None:
        return None
    if rank is None or ranks is None:
        raise ValueError("--rank and --ranks go together: which of the processes this is, and how many there are")
    from samerge_ext.elementwise.ranks import Rank

    return Rank(rank, ranks)


def _float_type(name: str | None) -> Any:
    """torch's, of the types that recipes know; None for None."""
    from samerge_ext.recipes.run import DTYPES

    if name not in DTYPES:
        raise ValueError(f"dtype {shown(name)}; choose one of {', '.join(filter(None, DTYPES))}")
    return DTYPES[name]


def _tasks_and_folders(experts: list[str]) -> list[tuple[str, Path]]:
    """Of TASK=FOLDER or FOLDER each. What exists is a folder, and so is what has a slash before its "="."""
    found: list[tuple[str, Path]] = []
    for text in experts:
        task, equals, folder = text.partition("=")
        named = bool(task and equals and folder) and "/" not in task and not Path(text).exists()
        found.append((task, Path(folder)) if named else ("", Path(text)))
    names = iter(names_of_folders(path for task, path in found if not task))
    return [(task or next(names), path) for task, path in found]


def _fail(error: BaseException) -> NoReturn:
    message = explained(error) if isinstance(error, OSError) else str(error)
    lines = "\n".join([message, *getattr(error, "__notes__", ())])
    who = "" if torchrun_rank() is None else f"rank {torchrun_rank()}: "
    typer.echo(f"{typer.style('error:', fg='red', bold=True)} {who}{lines}", err=True)
    raise typer.Exit(1)
