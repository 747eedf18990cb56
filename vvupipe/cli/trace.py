"""`vvupipe trace`: the messages between a vhost-user front-end and its back-end, as strace shows system calls."""

from __future__ import annotations

import asyncio
import sys
from io import FileIO
from pathlib import Path

import click

from vvupipe.cli.parameters import json_option, open_output, set_up_logging, verbose_option
from vvupipe.errors import UserError


@click.command()
@click.argument("back_end", metavar="SOCK", type=click.Path(path_type=Path))
@click.option("--listen", type=click.Path(path_type=Path), help="Where front-ends connect.  [default: SOCK.trace]")
@click.option("--output", type=click.Path(path_type=Path), help="Write the trace to a file.  [default: stdout]")
@json_option
@verbose_option
def trace(back_end: Path, listen: Path | None, output: Path | None, as_json: bool, verbose: int) -> int:
    """Show every vhost-user message between front-ends and the back-end at SOCK.

    Give the front-end SOCK.trace in the place of SOCK. Messages and file descriptors pass unchanged; the requests that
    the back-end sends are shown as well. The back-end may come later.
    """
    set_up_logging(verbose)
    if not back_end.name:
        raise UserError(f"{back_end} is no socket: name the one that the back-end listens on")
    listen = listen or back_end.with_name(back_end.name + ".trace")
    if listen.absolute() == back_end.absolute():
        raise UserError(f"--listen {listen} is the back-end's own socket: choose another path")
    with open_output(output) if output else open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as sink:
        return asyncio.run(_trace(back_end, listen, sink, as_json))


async def _trace(back_end: Path, listen: Path, sink: FileIO, as_json: bool) -> int:
    from vvupipe.vhost_user.trace_lines import trace_lines
    from vvupipe.vhost_user.trace_relay import TraceRelay, run_until_signal
    from vvupipe.vhost_user.tracer import Tracer

    relay = TraceRelay(back_end, listen, Tracer(trace_lines(sink, as_json=as_json)), _say)
    try:
        await run_until_signal(relay, lambda: _say(f"tracing {back_end}: connect the front-end to {listen}"))
    finally:
        relay.close()
    return 0


def _say(line: str) -> None:
    click.echo(f"vvupipe trace: {line}", err=True)
