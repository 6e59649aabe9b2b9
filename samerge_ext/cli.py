"""The command `samerge`."""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command line; without its libraries, says how to install them."""
    try:
        import typer  # noqa: F401
    except ImportError:
        sys.exit('the command line needs more packages: pip install "samerge_ext[cli]"')
    from samerge_ext.commands import app

    app()
