"""The image of a disk: a regular file or a block device, opened and checked."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from kernels.virtio_layout import BLK_ID_BYTES, SECTOR_BYTES
from vvupipe.devices.block import direct_alignment, image_limits, image_lock
from vvupipe.devices.block.image_limits import ImageLimits
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
    limits: ImageLimits
    direct: bool = False

    def current_size_bytes(self) -> int:
        """The size that the file has now."""
        return os.lseek(self.fd, 0, os.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def open_image(
    path: Path,
    *,
    read_only: bool,
    block_size_bytes: int | None = None,
    serial: str | None = None,
    direct: bool = False,
    lock: bool = True,
) -> Image:
    """Open `path` as a disk of whole blocks. block_size_bytes: None takes 512, or what the device or O_DIRECT needs.

    Raises: UserError with one line that says what is wrong with the file or the numbers.
    """
    if block_size_bytes is not None and block_size_bytes not in BLOCK_SIZES:
        raise UserError(f"--block-size {block_size_bytes}: use one of {', '.join(map(str, BLOCK_SIZES))}")
    if serial is not None and (len(serial.encode()) > BLK_ID_BYTES or not serial.isascii()):
        raise UserError(f"--serial '{serial}': at most {BLK_ID_BYTES} ASCII characters")
    try:
        fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | (os.O_DIRECT if direct else 0) | os.O_CLOEXEC)
    except OSError as error:
        if direct and error.errno == errno.EINVAL:
            raise UserError(f"{path}: its file system has no direct I/O: leave --direct away") from error
        raise UserError(_why_not(path, error, read_only)) from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UserError(f"{path} is neither a regular file nor a block device")
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes == 0:
            raise UserError(f"{path} is empty: give it a size first (truncate -s 1G {path})")
        block_size_bytes = _block_size(path, fd, block_size_bytes, direct=direct)
        if size_bytes % block_size_bytes:
            rounded = size_bytes - size_bytes % block_size_bytes + block_size_bytes
            raise UserError(
                f"{path}: {human_bytes(size_bytes)} ({size_bytes} bytes) is not a multiple of the block size "
                f"{block_size_bytes}: pad it (truncate -s {rounded} {path})"
                + (" or use --block-size 512" if block_size_bytes > SECTOR_BYTES else "")
            )
        if lock:
            image_lock.lock(fd, path, read_only=read_only)
        limits = image_limits.probe(fd, read_only=read_only)
    except BaseException:
        os.close(fd)
        raise
    return Image(path, fd, size_bytes, block_size_bytes, read_only, serial or _default_serial(path), limits, direct)


def _block_size(path: Path, fd: int, wanted: int | None, *, direct: bool) -> int:
    if not direct:
        # What is partitioned on the host counts in the device's own blocks.
        is_device = stat.S_ISBLK(os.fstat(fd).st_mode)
        return wanted or (min(direct_alignment.logical_block(fd), BLOCK_SIZES[-1]) if is_device else SECTOR_BYTES)
    needed = direct_alignment.of(fd)
    if needed == 0:
        raise UserError(f"{path}: direct I/O does not work on it: leave --direct away")
    if wanted is not None and wanted < needed:
        raise UserError(f"{path}: direct I/O takes blocks of {needed} bytes here: use --block-size {needed}")
    return wanted or needed


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
