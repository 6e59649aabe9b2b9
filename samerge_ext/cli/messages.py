"""How the command line shows the package's warnings: a line each, once."""

from __future__ import annotations

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
            elif str(message) not in shown:  # a plan and the merge after it compare the same folders
                shown.add(str(message))
                typer.echo(f"{getattr(category, 'shown_as', 'note')}: {message}", err=True)

        warnings.showwarning = show
        yield
