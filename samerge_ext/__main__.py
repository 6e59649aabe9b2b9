"""`python -m samerge_ext`: the command `samerge`, for launchers that start modules."""

from samerge_ext.cli.main import main

main()
