"""What `vvupipe device block` was asked for, and the conventions that QEMU and libvirt expect of such a program.

Conventions: QEMU docs/interop/vhost-user.rst, "Backend program conventions"; systemd: sd_listen_fds(3).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from vvupipe.cli import conventions
from vvupipe.errors import UserError

_QUEUE_SIZE_MAX = 32768
_LISTEN_FDS_START = 3  # sd_listen_fds(3)


def print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    """--print-capabilities: print and exit, whatever else was said."""
    if wanted and not context.resilient_parsing:
        conventions.print_capabilities()
        context.exit(0)


@dataclass(slots=True, kw_only=True)
class BlockOptions:
    """The options by their names on the command line."""

    image: Path | None
    socket: Path | None
    fd: int | None
    vfio: str | None
    vm: str | None
    bind: bool
    read_only: bool
    cpus: list[int]
    num_queues: int
    queue_size: int
    block_size: int | None
    serial: str | None
    cache: str
    direct: bool
    engine: str
    sqpoll: bool
    iopoll: bool
    pin_memory: bool
    sparse: bool
    lock: bool
    spin_us: int
    as_json: bool

    def check(self) -> None:
        """Raises: UserError when they do not go together."""
        if self.image is None:
            raise UserError("say what to serve: --file IMAGE")
        given = sum(each is not None for each in (self.socket, self.fd, self.vfio))
        if given == 0:
            self.fd = _listen_fd()
        if given > 1 or (given == 0 and self.fd is None):
            raise UserError("say where front-ends come from: one of --socket PATH, --fd N or --vfio ADDR")
        if self.vm is not None and self.vfio is None:
            raise UserError("--vm goes with --vfio")
        if self.bind and self.vfio is None:
            raise UserError("--bind goes with --vfio")
        size = self.queue_size
        if not 2 <= size <= _QUEUE_SIZE_MAX or size & (size - 1):
            raise UserError(f"--queue-size {size}: use a power of two from 2 to {_QUEUE_SIZE_MAX}")


def _listen_fd() -> int | None:
    """The socket that systemd hands over. Raises: UserError when there are several."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return None
    count = os.environ.get("LISTEN_FDS", "")
    if count != "1":
        raise UserError(f"LISTEN_FDS={count}: one socket is what a back-end can listen on")
    return _LISTEN_FDS_START
