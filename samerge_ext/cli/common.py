"""What the subcommands share: the app, how mistakes end a command, and what options mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from samerge_ext.checkpoints.reading import cut, explained, shown
from samerge_ext.checkpoints.task_names import names_of_folders
from samerge_ext.cli.messages import torchrun_rank, warnings_as_lines

app = typer.Typer(
    help="Merge fine-tuned models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich takes longer to import than all that a refused recipe needs
)

# Errors that the user can mend: shown as one message, without a traceback.
MISTAKES = (ValueError, FloatingPointError, OSError, ModuleNotFoundError)

AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def told() -> Iterator[None]:
    """Mistakes end the command with a message and exit code 1; the package's warnings are a line each."""
    with warnings_as_lines():
        try:
            yield
        except MISTAKES as error:
            _fail(error)


def print_json(content: Any) -> None:
    typer.echo(dumps(content, ensure_ascii=False))


def pairs(option: str, values: list[str] | None, parse: Callable[[str], Any] = str) -> dict[str, Any]:
    """Of NAME=VALUE each."""
    found = {}
    for value in values or ():
        key, equals, text = value.partition("=")
        if not (key and equals):
            raise typer.BadParameter(f"{shown(value)}; expected NAME=VALUE", param_hint=option)
        try:
            found[key] = parse(text)
        except ValueError as error:
            raise typer.BadParameter(f"{cut(key)}={shown(text)} {error}", param_hint=option) from error
    return found


def float_type(name: str | None) -> Any:
    """torch's, of the types that recipes know; None for None."""
    from samerge_ext.recipes.run import DTYPES

    if name not in DTYPES:
        raise ValueError(f"dtype {shown(name)}; choose one of {', '.join(filter(None, DTYPES))}")
    return DTYPES[name]


def tasks_and_folders(experts: list[str]) -> list[tuple[str, Path]]:
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
