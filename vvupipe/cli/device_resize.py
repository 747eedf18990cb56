"""`vvupipe device resize`: change the size of an image while it is served."""

from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import click

from vvupipe.cli.parameters import SIZE
from vvupipe.errors import UserError

_SECTOR = 512


@click.command()
@click.argument("image", type=click.Path(path_type=Path))
@click.argument("size", type=SIZE, required=False)
@click.option("--shrink", is_flag=True, help="Allow a smaller size: what is behind it is lost.")
def resize(image: Path, size: int | None, shrink: bool) -> int:
    """Give IMAGE, which a back-end serves, another SIZE, and have its guest see that.

    Without SIZE the image (or the block device) has its new size already.
    """
    from vvupipe.devices.block.served_by import block_back_ends
    from vvupipe.units import human_bytes

    try:
        status = image.stat()
        back_ends = block_back_ends(status)
        if not back_ends:
            raise UserError(f"no back-end of yours serves {image}: start one, or use truncate")
        if size is not None:
            _check(image, status, size, shrink=shrink)
            os.truncate(image, size)
    except OSError as error:
        raise UserError(f"{image}: {error.strerror}") from error
    for pid in back_ends:
        os.kill(pid, signal.SIGUSR1)
        click.echo(f"told the back-end (process {pid}) that {image} has {human_bytes(_size(image))}")
    return 0


def _check(image: Path, status: os.stat_result, size: int, *, shrink: bool) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{image} is no regular file: resize it where it comes from, then leave SIZE away")
    if size == 0 or size % _SECTOR:
        raise UserError(f"{size} bytes are not a number of sectors of {_SECTOR} bytes")
    if size < status.st_size and not shrink:
        raise UserError(f"{image} has {status.st_size} bytes, {size} are fewer: say --shrink if that is meant")


def _size(image: Path) -> int:
    with image.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_END)
