"""The `vvupipe` command."""

from __future__ import annotations

import io
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
    _make_streams_usable()
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
        status = _FAILURE
    except OSError as error:
        logging.getLogger(__name__).debug("failed", exc_info=True)
        where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
        status = _fail(f"{name}: {where}{error.strerror or error}", _FAILURE)
    _end_output()
    sys.exit(status or 0)


def _make_streams_usable() -> None:
    """Where a standard stream is closed, /dev/null; no character that cannot be written ends the program."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free fd is this one: else a file of ours would get it, and what is written to a stream.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # UTF-8 lacks nothing but the bytes of file names that are no text, and those are written as they are.
            utf_8 = stream.encoding.lower().replace("_", "-") == "utf-8"
            stream.reconfigure(errors="surrogateescape" if utf_8 else "backslashreplace")


def _end_output() -> None:
    """What cannot be written is not tried again, in vain and with a traceback, when the interpreter ends."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(line: str, status: int) -> int:
    try:
        click.echo(" ".join(line.split()), err=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    return status
