"""`samerge demo`, `from-gguf` and `to-dcp`: what makes models or writes them in another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from samerge_ext.cli.common import app, float_type, told


@app.command()
def demo(
    full: Annotated[bool, typer.Option("--full", help="all eight tasks and six layers")] = False,
    study: Annotated[
        str,
        typer.Option(
            help="main, methods, many (tasks), guest, claims, tuning, ablation, features, learner, quantised, unseen, "
            "robustness, heterogeneous, language, vision, vision-tuning or vision-statistics"
        ),
    ] = "main",
    seeds: Annotated[int | None, typer.Option(help="how many; 1, or 3 with --full")] = None,
    out: Annotated[Path, typer.Option(help="folder for the table, the plots and the merged model")] = Path("samerge-demo"),
    cache: Annotated[Path, typer.Option(help="folder for experts and finished cells")] = Path(".cache-demo"),
    progress: Annotated[bool, typer.Option(help="show progress bars")] = True,
) -> None:
    """Fine-tune experts, merge them and show what came out. With every method."""
    with told():
        from rich.console import Console

        from samerge_ext.demo.studies import run_study

        console = Console()
        run_study(study, full=full, seeds=seeds or (3 if full else 1), out=out, cache=cache, progress=progress, console=console)


@app.command("from-gguf")
def from_gguf(
    file: Annotated[Path, typer.Argument(help="GGUF file of a decoder", exists=True, dir_okay=False)],
    out: Annotated[Path, typer.Argument(help="model folder to write")],
    like: Annotated[Path | None, typer.Option(help="folder of the original model's config.json and tokenizer")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64")] = "float32",
    overwrite: Annotated[bool, typer.Option(help="replace what OUT holds")] = False,
) -> None:
    """Make a model folder of a GGUF file. Its codes are dequantised."""
    with told():
        from samerge_ext.models.gguf import folder_of_gguf

        folder_of_gguf(file, out, like=like, dtype=float_type(dtype), overwrite=overwrite)
    typer.echo(f"written to {out}")


@app.command("to-dcp")
def to_dcp(
    folder: Annotated[Path, typer.Argument(help="model folder or weight file", exists=True)],
    out: Annotated[Path, typer.Argument(help="folder to write")],
    key: Annotated[str, typer.Option(help="that the state dict is under; empty for a state dict by itself")] = "model",
    overwrite: Annotated[bool, typer.Option(help="replace what OUT holds")] = False,
) -> None:
    """Write a model folder as torch.distributed.checkpoint does. For training with FSDP; such a folder is read as any other."""
    with told():
        from samerge_ext.checkpoints.dcp_writing import save_dcp

        save_dcp(folder, out, key=key or None, overwrite=overwrite)
    typer.echo(f"written to {out}")
