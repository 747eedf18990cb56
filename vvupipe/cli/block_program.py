"""The program `vvupipe-block`: `vvupipe device block` with the options that QEMU's conventions name."""

from __future__ import annotations

import copy
import sys

import click

from vvupipe.cli import conventions
from vvupipe.cli.device import block
from vvupipe.cli.main import cli, run_program


def main() -> None:
    """Serve an image as the command line says, or print the capabilities, whatever else it says."""
    if "--print-capabilities" in sys.argv[1:]:
        conventions.print_capabilities()
        return
    run_program(_program(), conventions.BLOCK_PROGRAM)


def _program() -> click.Command:
    program = copy.copy(block)
    program.name = conventions.BLOCK_PROGRAM
    program.context_settings = cli.context_settings
    program.params = [_with_alias(parameter) for parameter in block.params]
    return program


def _with_alias(parameter: click.Parameter) -> click.Parameter:
    aliases = [alias for alias, name in conventions.OPTION_ALIASES.items() if name in parameter.opts]
    missing = [alias for alias in aliases if alias not in parameter.opts]
    if not missing:
        return parameter
    parameter = copy.copy(parameter)
    parameter.opts = [*parameter.opts, *missing]
    return parameter
