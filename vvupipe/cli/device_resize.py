"""`vvupipe device resize`: another size for an image that is being served."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vvupipe.cli.parameters import SIZE
from vvupipe.errors import UserError
from vvupipe.units import human_bytes

if TYPE_CHECKING:
    import psutil

_SECTOR_BYTES = 512
_RESIZE = signal.SIGUSR1


@click.command("resize")
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("size", type=SIZE, required=False)
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what lies beyond it is lost.")
def resize(image: Path, size: int | None, shrink: bool) -> None:
    """Give IMAGE another SIZE and tell the back-ends that serve it.

    Without SIZE they are only told: when the file was resized already, or IMAGE is a block device.
    """
    fd = _open(image, writable=size is not None)
    try:
        status = os.fstat(fd)
        if size is not None:
            _check(image, status, size, shrink)
        told = _find_back_ends(image, status)
        if size is not None:
            _change_size(fd, image, size)
        size_now = os.lseek(fd, 0, os.SEEK_END)
    finally:
        os.close(fd)
    for process in told:
        _tell(process, image, size_now)


def _open(image: Path, *, writable: bool) -> int:
    try:
        return os.open(image, (os.O_RDWR if writable else os.O_RDONLY) | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise UserError(f"{image}: no such image") from error
    except OSError as error:
        raise UserError(f"{image} cannot be opened: {error.strerror}") from error


def _check(image: Path, status: os.stat_result, size: int, shrink: bool) -> None:
    if stat.S_ISBLK(status.st_mode):
        raise UserError(f"{image} is a block device: resize it with its own tools, then leave SIZE out here")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{image} is not a regular file: only those can be given a size")
    if size == 0 or size % _SECTOR_BYTES:
        raise UserError(f"a size of {size} bytes: use a multiple of {_SECTOR_BYTES}, and not 0")
    if size < status.st_size and not shrink:
        raise UserError(
            f"{image} has {human_bytes(status.st_size)} ({status.st_size} bytes), which is more than {size}: "
            "shrink the file system on it first, then use --shrink"
        )


def _find_back_ends(image: Path, status: os.stat_result) -> list[psutil.Process]:
    from vvupipe.devices.block import served_by

    found = served_by.back_ends(status)
    if not found:
        raise UserError(
            f"no back-end of this user serves {image}: start one with vvupipe device block --file {image}, "
            f"or change the file alone with truncate -s SIZE {image}"
        )
    for process in found:
        if not served_by.takes_signal(process, _RESIZE):
            raise UserError(
                f"the back-end {process.pid} cannot take another size, or not yet: "
                "try again in a second, or stop it and start it again"
            )
    return found


def _change_size(fd: int, image: Path, size: int) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise UserError(f"{image} cannot be given {human_bytes(size)}: {error.strerror}") from error


def _tell(process: psutil.Process, image: Path, size: int) -> None:
    import psutil

    try:
        process.send_signal(_RESIZE)
    except psutil.NoSuchProcess:
        click.echo(f"back-end {process.pid}: ended meanwhile")
        return
    click.echo(f"back-end {process.pid}: told that {image} has {human_bytes(size)} ({size} bytes)")
