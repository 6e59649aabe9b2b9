"""How the command line shows warnings of the library: a line each, once."""

from __future__ import annotations

import warnings
from typing import Any

from rich.console import Console
from rich.text import Text

from samerge_ext.checkpoints.compatibility import CompatibilityWarning


def show_warnings() -> None:
    """From now on a `CompatibilityWarning` is one line on stderr, without the place in the code; others stay as they are."""
    show_others, shown = warnings.showwarning, set[str]()

    def show(message: Warning | str, category: type[Warning], *where: Any, **options: Any) -> None:
        if not issubclass(category, CompatibilityWarning):
            show_others(message, category, *where, **options)
        elif str(message) not in shown:  # a plan and the merge after it compare the same folders
            shown.add(str(message))
            Console(stderr=True).print(Text.assemble(("warning: ", "bold yellow"), str(message)), soft_wrap=True)

    warnings.showwarning = show
    warnings.simplefilter("always", CompatibilityWarning)
