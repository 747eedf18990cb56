"""The embedded sibling's whole disk to a file, from a file, or through sha256.

The kernel moves windows of the disk between the disk, guest memory and the file; this process hashes a window while the
vCPU moves the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from kernels.virtio_layout import BLK_T_IN, BLK_T_OUT, SECTOR_BYTES
from vvupipe.errors import TransportError, UserError
from vvupipe.units import human_bytes
from vvupipe.vm.disk_probe import PROBE_BYTES, DiskContents, probe
from vvupipe.vm.sibling_disk import SiblingDisk
from vvupipe.vm.sibling_workload import require_ok

_CHUNK_BYTES = 256 << 10  # one request: large enough that its cost does not count, small enough to have many in flight
_WINDOW_BYTES = 16 << 20  # what is hashed at a time
_NAME_KEPT_BYTES = 200

Progress = Callable[[int], None]  #: called with the bytes that were moved since the last call


def _sizes(disk: SiblingDisk) -> tuple[int, int]:
    """(bytes of a request, bytes of a window); two windows fit in the data area."""
    room = disk.layout.vrings[0].data_bytes // 2
    chunk = min(_CHUNK_BYTES, disk.facts.request_bytes_max or _CHUNK_BYTES, room)
    chunk -= chunk % disk.facts.sector_bytes
    if not chunk:
        raise UserError(f"{human_bytes(disk.layout.mem_bytes)} of RAM is not enough for a request: use a larger --mem")
    return chunk, min(_WINDOW_BYTES, room) // chunk * chunk


async def _stream(disk: SiblingDisk, kind: int, file_fd: int | None, progress: Progress) -> str:
    """Move the whole disk in windows. Returns the sha256 of it in hex."""
    chunk_bytes, window_bytes = _sizes(disk)
    state = hashlib.sha256()
    hashing: asyncio.Task[None] | None = None
    try:
        for number, start in enumerate(range(0, disk.facts.size_bytes, window_bytes)):
            size_bytes = min(window_bytes, disk.facts.size_bytes - start)
            data_off = number % 2 * window_bytes
            counters = await disk.transfer(
                kind,
                sector=start // SECTOR_BYTES,
                size_bytes=size_bytes,
                chunk_bytes=chunk_bytes,
                data_off=data_off,
                file=None if file_fd is None else (file_fd, start),
            )
            require_ok(counters, "the copy" if file_fd is not None else "reading the disk")
            if hashing:
                await hashing
            hashing = asyncio.create_task(asyncio.to_thread(_hash, state, disk.data(data_off, size_bytes)))
            progress(size_bytes)
    finally:
        # Also on an error: the thread must not read memory that is about to be unmapped.
        if hashing:
            await hashing
    return state.hexdigest()


def _hash(state: hashlib._Hash, view: memoryview) -> None:
    with view:
        state.update(view)


async def sha256_of_disk(disk: SiblingDisk, progress: Progress) -> str:
    """Read the whole disk; its sha256 in hex. Raises: TransportError on a read error."""
    return await _stream(disk, BLK_T_IN, None, progress)


def check_copy_out(path: Path) -> Path:
    """The file that `path` leads to. Raises: UserError when it cannot be replaced by a copy."""
    target = Path(os.path.realpath(path))
    try:
        os.stat(f"{target.parent}/.")
        if not os.access(target.parent, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        regular = stat.S_ISREG(target.stat().st_mode) if os.path.lexists(target) else True
    except OSError as error:
        raise UserError(f"--copy-out {path}: {error.strerror}") from error
    if not regular:
        raise UserError(f"--copy-out {path}: this is no regular file")
    return target


async def copy_out(disk: SiblingDisk, path: Path, progress: Progress) -> str:
    """Copy the whole disk to the file `path`, which appears when it is complete. Returns its sha256.

    Raises: UserError when the file cannot be written; TransportError on a read error.
    """
    target = check_copy_out(path)
    # A name may be as long as the file system has them: not all of it fits beside what is added.
    name = os.fsdecode(os.fsencode(target.name)[:_NAME_KEPT_BYTES])
    try:
        fd, partial = tempfile.mkstemp(prefix=f".{name}.", suffix=".partial", dir=target.parent)
    except OSError as error:
        raise UserError(f"--copy-out {path}: {error.strerror}") from error
    try:
        digest = await _stream(disk, BLK_T_IN, fd, progress)
        os.fchmod(fd, 0o666 & ~_umask())
        await asyncio.to_thread(os.fsync, fd)
        os.rename(partial, target)
        partial = ""
        await asyncio.to_thread(_sync_folder, target.parent)
    except OSError as error:
        raise UserError(f"--copy-out {path}: {error.strerror}") from error
    finally:
        os.close(fd)
        if partial:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return digest


def check_copy_in(disk: SiblingDisk, path: Path) -> int:
    """An fd of the file to copy in, after a check of its size and of the disk. Raises: UserError."""
    if disk.facts.read_only:
        raise UserError(f"--copy-in {path} writes and the disk is read-only")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"--copy-in {path}: {error.strerror}") from error
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise UserError(f"--copy-in {path}: this is neither a regular file nor a block device")
        size_bytes = os.lseek(fd, 0, os.SEEK_END)
        if size_bytes != disk.facts.size_bytes:
            relation = "larger" if size_bytes > disk.facts.size_bytes else "smaller"
            raise UserError(
                f"--copy-in {path}: {size_bytes} bytes is {relation} than the disk of {disk.facts.size_bytes} bytes; "
                "the two must be equal"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


async def copy_in(disk: SiblingDisk, path: Path, progress: Progress) -> str:
    """Copy the file `path` over the whole disk, and flush. Returns its sha256.

    Raises: UserError when the file does not fit or cannot be read; TransportError on a write error.
    """
    fd = check_copy_in(disk, path)
    try:
        digest = await _stream(disk, BLK_T_OUT, fd, progress)
        await disk.flush()
    except OSError as error:
        raise UserError(f"--copy-in {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return digest


async def look_at(disk: SiblingDisk) -> DiskContents:
    """Read both ends of the disk and tell what is on it."""
    ends = []
    size_bytes = disk.facts.size_bytes
    length = min(PROBE_BYTES, size_bytes)
    chunk_bytes, window_bytes = _sizes(disk)
    length = min(length, window_bytes)
    length -= length % disk.facts.sector_bytes
    if not length:
        return DiskContents(unknown="the disk is smaller than a sector")
    try:
        for start in (0, (size_bytes - length) // SECTOR_BYTES * SECTOR_BYTES):
            counters = await disk.transfer(
                BLK_T_IN, sector=start // SECTOR_BYTES, size_bytes=length, chunk_bytes=chunk_bytes
            )
            require_ok(counters, "looking at the disk")
            with disk.data(0, length) as view:
                ends.append(bytes(view))
    except TransportError as error:
        if disk.failed.done():
            raise
        return DiskContents(unknown=str(error))
    return await asyncio.to_thread(probe, size_bytes, disk.facts.sector_bytes, ends[0], ends[1])


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
