"""How the command line shows the package's warnings: a line each, once; and which of several processes speaks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer

import samerge_ext

PACKAGE = Path(samerge_ext.__file__).parent


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Inside, what the package warns of is a line on stderr without the place in the code; others' warnings stay as they are."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        show_others, shown = warnings.showwarning, set[str]()

        def show(message: Warning | str, category: type[Warning], filename: str, *where: Any, **options: Any) -> None:
            ours = hasattr(category, "shown_as") or PACKAGE in Path(filename).parents
            if not ours:
                show_others(message, category, filename, *where, **options)
            elif str(message) in shown:  # a plan and the merge after it compare the same folders
                return
            elif hasattr(category, "of_one_rank") or is_speaker():
                shown.add(str(message))
                typer.echo(f"{getattr(category, 'shown_as', 'note')}: {message}", err=True)

        warnings.showwarning = show
        yield


def is_speaker() -> bool:
    """Whether this process is the one of several that says what they have in common."""
    return torchrun_rank() in (None, 0)


def torchrun_rank() -> int | None:
    """This process's rank where torchrun started it, without importing torch."""
    return int(os.environ["RANK"]) if "TORCHELASTIC_RUN_ID" in os.environ else None
