"""All subcommands of `samerge`, each where it is imported from. What needs torch is imported once the arguments are checked."""

from samerge_ext.cli import merge, models, reports
from samerge_ext.cli.common import app

__all__ = ["app", "merge", "models", "reports"]
