"""Where a real device VM sees its siblings' memory: in a pool that is there from its start, or in plugged windows.

The pool is a POSIX shared memory object, shown to the VM by an ivshmem-plain function. `vvupipe run --vhost-user-blk`
takes the RAM of the VM that it starts from there; other front-ends bring memory of their own, which is plugged in.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import posix_ipc

from vvupipe.errors import UserError
from vvupipe.memory import shared
from vvupipe.memory.range_lock import try_lock
from vvupipe.vfio.function import MappableArea
from vvupipe.vm.memory_plugs import MemoryPlugs, Window
from vvupipe.vm.runtime_folder import running_descriptions
from vvupipe.vvu import layout
from vvupipe.vvu.region_table import Piece

log = logging.getLogger(__name__)

_PUNCH_HOLE = 0x02 | 0x01  # linux/falloc.h: FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryPool:
    """Shared memory for one sibling at a time; only what is touched takes space."""

    def __init__(self, vm_name: str, number: int, size_bytes: int) -> None:
        """Raises: UserError when it cannot be made."""
        self.name = f"{shared.PREFIX}{os.getuid()}-{vm_name}-{os.getpid()}-pool{number}"
        self.size_bytes = size_bytes
        self.fd = shared.create_sparse(self.name, size_bytes)
        status = os.fstat(self.fd)
        self.identity = (status.st_dev, status.st_ino)

    @property
    def path(self) -> Path:
        """The file that it is."""
        return Path("/dev/shm") / self.name[1:]

    def close(self) -> None:
        """Remove it; harmless when called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
            shared.unlink(self.name)


class SiblingMemory:
    """Implements vvu.region_table.MemoryPlacer for one function. pool_devfn: the function that shows `pool`."""

    def __init__(self, plugs: MemoryPlugs, pool: MemoryPool, pool_devfn: int) -> None:
        self._plugs = plugs
        self._pool = pool
        self._pool_devfn = pool_devfn
        self._shown: list[list[Window]] = []

    async def place(self, areas: Sequence[MappableArea]) -> list[Piece]:
        """See MemoryPlacer; when it fails, what was shown before stays."""
        ends: dict[tuple[int, int], tuple[int, int]] = {}  # file -> (fd, how much of it)
        for region in areas:
            identity = _identity(region.fd)
            _, end = ends.get(identity, (0, 0))
            ends[identity] = (region.fd, max(end, region.fd_offset + region.size_bytes))
        windows: dict[tuple[int, int], list[Window] | None] = {}
        former, self._shown = self._shown, []
        try:
            for identity, (fd, end) in ends.items():
                windows[identity] = None
                if identity != self._pool.identity:
                    shown = windows[identity] = await self._plugs.show(fd, end)
                    self._shown.append(shown)
        except BaseException:
            former, self._shown = self._shown, former
            raise
        finally:
            for shown in former:
                self._plugs.hide(shown)
        pieces: list[Piece] = []
        for area in areas:
            pieces += self._pieces(area, windows[_identity(area.fd)])
        return pieces

    def _pieces(self, region: MappableArea, windows: list[Window] | None) -> list[Piece]:
        start = region.offset
        if windows is None:
            return [Piece(start, region.size_bytes, region.fd_offset, layout.WINDOW_ON_BUS, self._pool_devfn)]
        pieces = []
        for window in windows:
            first = max(region.fd_offset, window.file_offset)
            end = min(region.fd_offset + region.size_bytes, window.file_offset + window.size_bytes)
            if first < end:
                pieces.append(
                    Piece(
                        start + first - region.fd_offset,
                        end - first,
                        first - window.file_offset,
                        layout.WINDOW_BEHIND_PORT,
                        window.devfn,
                    )
                )
        return pieces

    def forget(self) -> None:
        """See MemoryPlacer."""
        while self._shown:
            self._plugs.hide(self._shown.pop())


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def pool_of_proxy(sockets: Sequence[Path], size_bytes: int) -> Iterator[Path | None]:
    """The emptied pool of a device VM that listens at one of `sockets`, ours until the end of the `with` block.

    None when there is no such VM, its pool is in use, or too small: then the sibling's memory is its own.
    """
    fd = -1
    try:
        fd = next((fd for path in sockets if (fd := _take_pool(path, size_bytes)) >= 0), -1)
        yield None if fd < 0 else Path(os.readlink(f"/proc/self/fd/{fd}"))
    finally:
        if fd >= 0:
            os.close(fd)


def _take_pool(socket_path: Path, size_bytes: int) -> int:
    """The locked fd of the pool behind a proxy's socket, -1 when it cannot be had."""
    wanted = str(socket_path.absolute())
    pools = (description.get("pools", {}) for description in running_descriptions())
    name = next((str(pool[wanted]) for pool in pools if wanted in pool), None)
    if name is None:
        return -1
    try:
        opened = posix_ipc.SharedMemory(name)
    except (posix_ipc.ExistentialError, posix_ipc.PermissionsError):
        return -1
    fd = int(opened.fd)
    os.set_inheritable(fd, False)
    if not try_lock(fd, 0, 1):
        log.info("the pool of %s is another sibling's: memory of our own is used", socket_path)
        os.close(fd)
        return -1
    if opened.size < size_bytes:
        log.info("%d MiB do not fit into the pool of %s: memory of our own is used", size_bytes >> 20, socket_path)
        os.close(fd)
        return -1
    # What the last sibling left is not for this one.
    if _libc.fallocate(fd, _PUNCH_HOLE, ctypes.c_long(0), ctypes.c_long(int(opened.size))):
        number = ctypes.get_errno()
        os.close(fd)
        raise UserError(f"cannot empty the memory pool of {socket_path}: {os.strerror(number)}")
    return fd
