"""`python -m samerge_ext` is the command `samerge`; torchrun starts it as `-m samerge_ext`."""

from samerge_ext.cli.main import main

if __name__ == "__main__":
    main()
