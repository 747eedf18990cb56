"""`python -m vvupipe`."""

from vvupipe.cli.main import main

main()
