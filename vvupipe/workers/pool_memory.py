"""What a pool's workers must know of the front-end's memory: regions, translations, the dirty-page log."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterable, Iterator

from vvupipe.fd_socket import close_all
from vvupipe.memory.iotlb import Iotlb, Translation
from vvupipe.memory.region import MemoryRegion
from vvupipe.workers import commands

_FDS_IN_ONE_COMMAND = commands.FDS_MAX - 4
_TRANSLATIONS_IN_ONE_COMMAND = 512

Command = tuple[commands.Fields, list[int]]


class PoolMemory:
    """Owns the fds. Every region has a number for life, so that a table names those that are mapped already."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self._regions: dict[int, MemoryRegion] = {}  # what workers have mapped, or are about to
        self._table: list[int] = []
        self._coming: list[int] = []  # of the table that comes next, where that is not the table yet
        self._users = 0
        self._given_up: list[int] = []  # fds
        self.iotlb = Iotlb()
        self._log_fd = self._log_event = -1
        self._log_bytes = self._log_offset = 0

    def add(self, regions: Iterable[MemoryRegion]) -> tuple[list[int], list[Command]]:
        """Take over `regions`, those that we have already included. Their numbers, and how workers map the new."""
        known = {id(region): number for number, region in self._regions.items()}
        numbers: list[int] = []
        new = []
        for region in regions:
            number = known.get(id(region))
            if number is None:
                number = next(self._numbers)
                self._regions[number] = region
                new.append(number)
            numbers.append(number)
        self._coming = new
        return numbers, list(self._map(new))

    def use(self, numbers: list[int]) -> Command:
        """Make `numbers` the table: the command that tells workers. `drop_unused` comes when they have it."""
        self._table = numbers
        self._coming = []
        return self._use()

    def drop_unused(self) -> None:
        """Close the regions that are not in the table."""
        self._coming = []
        for number in self._regions.keys() - set(self._table):
            region = self._regions.pop(number)
            self._close(region.fd)
            region.fd = -1

    @contextlib.contextmanager
    def fds_kept(self) -> Iterator[None]:
        """What is given up meanwhile is closed at the end: commands that are not sent yet may name it."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                given_up, self._given_up = self._given_up, []
                close_all(given_up)

    def _close(self, fd: int) -> None:
        if self._users:
            self._given_up.append(fd)
        else:
            os.close(fd)

    def set_log(self, fd: int, size_bytes: int, offset: int) -> Command:
        """The dirty-page log; -1 and 0: none. The fd belongs to us from here on."""
        if self._log_fd >= 0:
            self._close(self._log_fd)
        self._log_fd, self._log_bytes, self._log_offset = fd, size_bytes, offset
        return self._log()

    def set_log_event(self, fd: int) -> Command:
        """The eventfd that tells of news in the log; -1: none. It belongs to us from here on."""
        if self._log_event >= 0:
            self._close(self._log_event)
        self._log_event = fd
        return self._log()

    def _log(self) -> Command:
        if self._log_fd < 0:
            return {"op": "log", "size_bytes": 0, "offset": 0}, []
        fds = [self._log_fd] + ([self._log_event] if self._log_event >= 0 else [])
        return {"op": "log", "size_bytes": self._log_bytes, "offset": self._log_offset}, fds

    def commands(self) -> list[Command]:
        """Everything, for a worker that is new, but what a table that is not there yet will name (`coming`)."""
        everything = list(self._map(self._table))
        if self._table:
            everything.append(self._use())
        entries = [(entry.iova, entry.size_bytes, entry.uva, entry.access) for entry in self.iotlb]
        for start in range(0, len(entries), _TRANSLATIONS_IN_ONE_COMMAND):
            part = entries[start : start + _TRANSLATIONS_IN_ONE_COMMAND]
            everything.append(({"op": "iotlb", "update": part}, []))
        if self._log_fd >= 0:
            everything.append(self._log())
        return everything

    def coming(self) -> list[Command]:
        """How a worker that is new maps what the next table names. It comes behind `commands`, and may be refused."""
        return list(self._map(self._coming))

    def change_translations(self, invalidate: list[tuple[int, int]], update: list[Translation]) -> Command:
        """Forget ranges, then add translations: the command that tells workers."""
        for iova, size_bytes in invalidate:
            self.iotlb.invalidate(iova, size_bytes)
        for entry in update:
            self.iotlb.update(entry)
        rows = [(entry.iova, entry.size_bytes, entry.uva, entry.access) for entry in update]
        return {"op": "iotlb", "invalidate": invalidate, "update": rows}, []

    def forget_translations(self) -> Command:
        """Forget all of them."""
        self.iotlb.clear()
        return {"op": "iotlb", "clear": True}, []

    def close(self) -> None:
        """Close every fd."""
        self._table = []
        self.drop_unused()
        self.set_log(-1, 0, 0)
        self.set_log_event(-1)

    def _map(self, numbers: list[int]) -> Iterator[Command]:
        for start in range(0, len(numbers), _FDS_IN_ONE_COMMAND):
            part = numbers[start : start + _FDS_IN_ONE_COMMAND]
            regions = [self._regions[number] for number in part]
            rows = [(number, region.size_bytes, region.fd_offset) for number, region in zip(part, regions, strict=True)]
            yield {"op": "map", "regions": rows}, [region.fd for region in regions]

    def _use(self) -> Command:
        rows = [(number, self._regions[number].gpa, self._regions[number].uva) for number in self._table]
        return {"op": "memory", "regions": rows}, []
