"""`samerge report`, `compare`, `eval`, `stats` and `info`: what there is to know of merges, models and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import samerge_ext as sm
from samerge_ext.cli.common import AsJson, app, float_type, print_json, tasks_and_folders, told


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="merged model", exists=True, file_okay=False)],
    similarity: Annotated[bool, typer.Option("--similarity", help="read the models, and add how alike task vectors are")] = False,
    loss_slice: Annotated[bool, typer.Option("--loss-slice", help="run samerging's loss around λ, and add it")] = False,
) -> None:
    """Write report.html of a merged model again. With options, with what takes time to know."""
    with told():
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
    json: AsJson = False,
) -> None:
    """Two merges side by side. Where their settings, models, coefficients and sizes differ, by their report.json."""
    with told():
        from samerge_ext.reports.comparison import as_page, as_text, as_values, compared

        found = compared(a, b)
        if html is None:
            print_json(as_values(found)) if json else typer.echo(as_text(found))
            return
        from samerge_ext.checkpoints.saving import atomic_write

        page = as_page(found)
        with atomic_write(html, "w") as file:
            file.write(page)
    typer.echo(html)


@app.command("eval")
def evaluate(
    folder: Annotated[Path, typer.Argument(help="folder of a causal language model, a classifier of texts or pictures, or CLIP")],
    files: Annotated[
        list[str],
        typer.Argument(
            help="texts (.txt, one a line, or .jsonl), of a classifier .jsonl with text and label, or a folder of pictures, "
            "CLASS/PICTURE; FILE or TASK=FILE"
        ),
    ],
    json: AsJson = False,
    batch_size: Annotated[int, typer.Option(min=1, help="texts or pictures at a time")] = 4,
    max_length: Annotated[int, typer.Option(min=2, help="tokens; longer texts are cut")] = 512,
    limit: Annotated[int | None, typer.Option(min=1, help="use the first so many texts or pictures of each")] = None,
    classes: Annotated[
        list[str] | None, typer.Option(help="of CLIP, TASK=FILE of class names, one a line; the subfolders' names by default")
    ] = None,
    templates: Annotated[list[str] | None, typer.Option(help="of CLIP, TASK=FILE of texts with {} in the name's place")] = None,
    dtype: Annotated[str | None, typer.Option(help="of the weights, float32 …; as they are stored by default")] = None,
    device: Annotated[str, typer.Option(help="what computes: cpu, cuda, cuda:1")] = "cpu",
    report: Annotated[bool, typer.Option("--report", help="add the scores to the merged model's report, too")] = False,
) -> None:
    """Perplexity or accuracy of a model folder on files or pictures. Of a task's own head, as TASK=FILE."""
    with told():
        if report:
            from samerge_ext.reports.report import read_report
            from samerge_ext.reports.writing import rewrite

            found = read_report(folder)
        named = {task: Path(path) for task, path in tasks_and_folders(files)}
        texts_of_clip = {
            name: {task: Path(path) for task, path in tasks_and_folders(given)}
            for name, given in (("classes", classes), ("templates", templates))
            if given
        }
        for path in (folder, *named.values(), *(path for files in texts_of_clip.values() for path in files.values())):
            path.stat()
        from samerge_ext.models.evaluation import evaluate as evaluate_folder

        options: dict[str, Any] = {
            "limit": limit,
            "batch_size": batch_size,
            "max_length": max_length,
            "device": device,
            **texts_of_clip,
        }
        scores = evaluate_folder(folder, named, dtype=float_type(dtype), **options)
        if report:
            found.scores.update({task: score.known() for task, score in scores.items()})
            rewrite(folder, found)
    if json:
        print_json({task: score.known() for task, score in scores.items()})
        return
    for task, score in scores.items():
        if score.accuracy is None:
            typer.echo(f"{task}: perplexity {score.perplexity:.4f} of {score.tokens} tokens in {score.texts} texts")
        else:
            count = f"{score.texts} texts" if score.pictures is None else f"{score.pictures} pictures"
            typer.echo(f"{task}: accuracy {score.accuracy:.2%} of {count}")


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
    json: AsJson = False,
) -> None:
    """Statistics of every layer of experts. Mean, variance, norm and largest singular values."""
    with told():
        folders = tasks_and_folders(experts)
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
    if json:
        print_json(rows)
        return
    lines = [list(rows[0]), *([text if isinstance(text, str) else f"{text:.6g}" for text in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:  # as wide as it is: a layer's name that is cut would not be found
        typer.echo("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip())


@app.command()
def info(json: AsJson = False) -> None:
    """Versions, backends, threads and devices. Of a backend that is missing, why it is."""
    with told():
        import torch

        from samerge_ext.backend import cpu_level

    found = {
        "samerge_ext": sm.__version__,
        "torch": torch.__version__,
        **{f"backend {name}": reason or "available" for name, reason in sm.available().items()},
        "CPU instructions": cpu_level() or "none of our own",
        "threads": torch.get_num_threads(),
        "CUDA devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    if json:
        print_json(found)
        return
    width = max(map(len, found))
    for name, value in found.items():
        typer.echo(f"{name:{width}}  {(', '.join(value) or 'none') if isinstance(value, list) else value}")
