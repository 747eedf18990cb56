"""The `vvupipe` command."""

from __future__ import annotations

import logging
import os
import sys
from typing import NoReturn

import click

from vvupipe import __version__
from vvupipe.cli.device import device
from vvupipe.cli.lspci import lspci
from vvupipe.cli.run import run
from vvupipe.cli.trace import trace
from vvupipe.errors import UserError, VvupipeError

_USER_ERROR = 2
_FAILURE = 1


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="vvupipe")
def cli() -> None:
    """Virtio-vhost-user: a device back-end inside one VM that serves another VM, with no copy.

    \b
    Device VM:   vvupipe run --vvu-proxy /tmp/vhost-user.socket,addr=0000:00:10.0
    Back-end:    vvupipe device block --vfio 0000:00:10.0 --file disk.img
    Sibling VM:  vvupipe run --vhost-user-blk /tmp/vhost-user.socket
    """


cli.add_command(run)
cli.add_command(device)
cli.add_command(lspci)
cli.add_command(trace)


def main() -> None:
    """Run the command line of `vvupipe`."""
    run_program(cli, "vvupipe")


def run_program(command: click.Command, name: str) -> NoReturn:
    """Run `command` as a program; errors become one line and an exit status (2: the user's, 1: ours or a peer's)."""
    try:
        status = command.main(standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        status = _USER_ERROR
    except click.ClickException as error:
        where = f"{error.ctx.command_path}: " if isinstance(error, click.UsageError) and error.ctx else f"{name}: "
        status = _fail(where + error.format_message(), _USER_ERROR)
    except UserError as error:
        status = _fail(f"{name}: {error}", _USER_ERROR)
    except VvupipeError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        status = _fail(f"{name}: {error}", _FAILURE)
    except (KeyboardInterrupt, click.Abort):
        status = 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = _FAILURE
    sys.exit(status or 0)


def _fail(line: str, status: int) -> int:
    click.echo(" ".join(line.split()), err=True)
    return status
