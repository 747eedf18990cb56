"""The program `vvupipe-block`: `vvupipe device block` for whoever starts back-ends by their file (libvirt, QEMU)."""

from __future__ import annotations

import copy
import sys

from vvupipe.cli import conventions
from vvupipe.cli.device import block
from vvupipe.cli.main import cli, run_program


def main() -> None:
    """Serve an image as the command line says, or print the capabilities, whatever else it says."""
    if "--print-capabilities" in sys.argv[1:]:
        conventions.print_capabilities()
        return
    program = copy.copy(block)
    program.name = conventions.BLOCK_PROGRAM
    program.context_settings = cli.context_settings
    run_program(program, conventions.BLOCK_PROGRAM)
