"""`samerge merge` and `check`: what a recipe says, done or looked at beforehand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from samerge_ext.cli.common import AsJson, app, pairs, print_json, told
from samerge_ext.cli.messages import is_speaker


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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="show neither how far it is nor that it is done")] = False,
    json: AsJson = False,
    shard_size: Annotated[str | None, typer.Option(help="of the files that are written, such as 500MB; 5GB by default")] = None,
    rank: Annotated[
        int | None, typer.Option(help="which this is of several processes that merge into OUT, from 0 on; torchrun's is known")
    ] = None,
    ranks: Annotated[int | None, typer.Option(help="how many these processes are")] = None,
    timeout: Annotated[
        float | None, typer.Option(help="seconds that processes of torchrun wait for one that does not answer; 7200 by default")
    ] = None,
) -> None:
    """Merge as CONFIG says; options replace its keys."""
    from samerge_ext.recipes.recipe import load_recipe
    from samerge_ext.recipes.yaml_text import parse_yaml

    calibration_keys = {
        "files": pairs("--calibration", calibration),
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
        "parameters": pairs("--parameter", parameters, parse_yaml) | ({"device": device} if device else {}),
        "calibration": {key: value for key, value in calibration_keys.items() if value},
        "dtype": dtype,
        "task_vector_dtype": task_vector_dtype,
        "out_dtype": out_dtype,
    }
    with told():
        started = time.perf_counter()
        recipe = load_recipe(config, {key: value for key, value in given.items() if value})
        recipe.require_files()
        from samerge_ext.recipes.run import run_recipe
        from samerge_ext.recipes.torchrun import rank_of_torchrun

        of_options = _rank(rank, ranks)
        run_recipe(
            recipe,
            out,
            overwrite=overwrite,
            report=report,
            shard_size=shard_size,
            rank=of_options,
            timeout=timeout,
            progress=not quiet,
        )
        this = of_options or rank_of_torchrun()
    seconds = time.perf_counter() - started
    if json and is_speaker():
        experts = [task for task, _ in recipe.named_experts]
        print_json({"out": str(out), "merge_method": recipe.merge_method, "experts": experts, "seconds": round(seconds, 3)})
    elif quiet:
        pass
    elif this.count > 1 and recipe.calibration is None:  # from file to file every rank is through by itself
        typer.echo(f"{recipe.merge_method}: {this} is through after {seconds:.1f} s")
    elif is_speaker():
        typer.echo(f"{recipe.merge_method}: {len(recipe.experts)} experts merged in {seconds:.1f} s, written to {out}")


@app.command()
def check(
    config: Annotated[Path, typer.Argument(help="YAML file with mergekit's keys", exists=True, dir_okay=False)],
    out: Annotated[Path | None, typer.Argument(help="folder to write; its place and space are checked, too")] = None,
    memory_budget: Annotated[str | None, typer.Option(help="the most that a learned merge is to take, such as 16GB")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="by how many processes it will be merged")] = 1,
    nodes: Annotated[int, typer.Option(min=1, help="on how many machines these are")] = 1,
    overwrite: Annotated[bool, typer.Option(help="OUT may exist")] = False,
    json: AsJson = False,
) -> None:
    """Whether a merge will go, and what it takes. From its folders' headers alone: what is merged and kept, disk and memory, of a
    learned merge by each way to hold the merged model; by several processes, what each of them takes and sends. Where it will not
    go, ends with the merge's own error.
    """
    from samerge_ext.recipes.recipe import load_recipe

    with told():
        recipe = load_recipe(config, {"parameters": {"memory_budget": memory_budget}} if memory_budget else {})
        recipe.require_files()
        from samerge_ext.recipes.check import check_recipe

        found = check_recipe(recipe, out, overwrite=overwrite, ranks=ranks, nodes=nodes)
    print_json(found.known()) if json else typer.echo("\n".join(found.lines()))


app.command("plan", hidden=True)(check)  # what it was called when it planned memory alone


def _rank(rank: int | None, ranks: int | None) -> Any:
    """The `Rank` that options say; None where they say none. Raises ValueError for one without the other."""
    if rank is None and ranks is None:
        return None
    if rank is None or ranks is None:
        raise ValueError("--rank and --ranks go together: which of the processes this is, and how many there are")
    from samerge_ext.elementwise.ranks import Rank

    return Rank(rank, ranks)
