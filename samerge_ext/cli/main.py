"""The command `samerge`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from samerge_ext.cli.signals import one_line_for_signals


def main() -> None:
    """Runs the command line; without its libraries, says how to install them."""
    # Or pydantic searches the metadata of every installed package for plugins: a third of the time to refuse a recipe.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    with one_line_for_signals():
        if find_spec("typer") is None:
            sys.exit('the command line needs more packages: pip install "samerge_ext[cli]"')
        from samerge_ext.cli.commands import app

        app()
