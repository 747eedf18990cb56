"""The image of a disk: a regular file or a block device, opened and checked."""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES
from vvupipe.errors import UserError
from vvupipe.units import human_bytes

BLOCK_SIZES = (512, 1024, 2048, 4096)


@dataclass(slots=True)
class Image:
    """An open image. The holder owns `fd`."""

    path: Path
    fd: int
    size_bytes: int
    block_size_bytes: int
    read_only: bool
    serial: str

    def current_size_bytes(self) -> int:
        """The size that the file has now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_image(path: Path, *, read_only: bool, block_size_bytes: int, serial: str | None) -> Image:
    """Open `path` as a disk of whole blocks.

    Raises: UserError with one line that says what is wrong with the file or the numbers.
    """
    if block_size_bytes not in BLOCK_SIZES:
        raise UserError(f"--block-size {block_size_bytes}: use one of {', '.join(map(str, BLOCK_SIZES))}")
    if serial is not None and (len(serial.encode()) > BLK_ID_BYTES or not serial.isascii()):
        raise UserError(f"--serial '{serial}': at most {BLK_ID_BYTES} ASCII characters")
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(_why_not(path, error, read_only)) from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UserError(f"{path} is neither a regular file nor a block device")
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes == 0:
            raise UserError(f"{path} is empty: give it a size first (truncate -s 1G {path})")
        if size_bytes % block_size_bytes:
            rounded = size_bytes - size_bytes % block_size_bytes + block_size_bytes
            raise UserError(
                f"{path}: {human_bytes(size_bytes)} ({size_bytes} bytes) is not a multiple of the block size "
                f"{block_size_bytes}: pad it (truncate -s {rounded} {path})"
                + (" or use --block-size 512" if block_size_bytes > SECTOR_BYTES else "")
            )
    except BaseException:
        os.close(fd)
        raise
    return Image(path, fd, size_bytes, block_size_bytes, read_only, serial or _default_serial(path))


def _why_not(path: Path, error: OSError, read_only: bool) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path}: no such image"
    if isinstance(error, IsADirectoryError):
        return f"{path} is a folder, not an image"
    hint = "" if read_only or not os.access(path, os.R_OK) else ": it can be read, try --read-only"
    return f"{path}: {error.strerror}{hint}"


def _default_serial(path: Path) -> str:
    """The same for the same file, so that a guest finds its disk again by /dev/disk/by-id."""
    return "vvu-" + hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
