"""BAR 4: the sibling's memory regions one after another, in the order of its memory table; above them what comes later.

Memory slots (ADD_MEM_REG) go behind the table, the areas that are no guest memory (dirty-page log, inflight region)
into the upper eighth. A change is planned first, so that what cannot be shown leaves everything as it was.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field

from vvupipe.errors import ProtocolError
from vvupipe.memory.mapping import Mapping
from vvupipe.memory.region import MemoryRegion
from vvupipe.vfio.function import MappableArea

log = logging.getLogger(__name__)

_PAGE = 4096
SlotKey = tuple[int, int, int]  #: gpa, user address, size: what REM_MEM_REG names


@dataclass(frozen=True, slots=True)
class Plan:
    """What the BAR is to hold."""

    memory: dict[SlotKey, MappableArea] = field(default_factory=dict)
    extras: dict[str, MappableArea] = field(default_factory=dict)

    @property
    def areas(self) -> list[MappableArea]:
        """Everything."""
        return [*self.memory.values(), *self.extras.values()]


class SharedMemoryBar:
    """Owns the fds of the areas in it."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._memory_end = size_bytes - size_bytes // 8
        self._now = Plan()

    @property
    def areas(self) -> list[MappableArea]:
        """What is in it."""
        return self._now.areas

    @property
    def slots(self) -> int:
        """How many of them are the sibling's memory."""
        return len(self._now.memory)

    # Plans. The fds in them are the caller's until `commit`.

    def plan_table(self, regions: list[MemoryRegion]) -> Plan:
        """SET_MEM_TABLE. Raises: ProtocolError when `regions` do not fit."""
        total = sum(region.size_bytes for region in regions)
        if total > self._memory_end:
            raise ProtocolError(f"{total >> 20} MiB of memory do not fit into a BAR of {self.size_bytes >> 20} MiB")
        memory = {}
        offset = 0
        for region in regions:
            memory[_key(region)] = MappableArea(offset, region.size_bytes, region.fd, region.fd_offset)
            offset += region.size_bytes
        if len(memory) < len(regions):
            raise ProtocolError("a memory table with the same region twice")
        return Plan(memory, self._now.extras)

    def plan_slot(self, region: MemoryRegion) -> tuple[Plan, int]:
        """ADD_MEM_REG. (the plan, the slot's offset in the BAR). Raises: ProtocolError when it does not fit."""
        if _key(region) in self._now.memory:
            raise ProtocolError(f"there is a memory slot of {region.size_bytes:#x} bytes at {region.gpa:#x} already")
        offset = self._free(region.size_bytes, self._now.memory.values(), 0, self._memory_end)
        area = MappableArea(offset, region.size_bytes, region.fd, region.fd_offset)
        return Plan({**self._now.memory, _key(region): area}, self._now.extras), offset

    def plan_removal(self, key: SlotKey) -> Plan:
        """REM_MEM_REG. Raises: ProtocolError when there is no such slot."""
        if key not in self._now.memory:
            raise ProtocolError(f"there is no memory slot of {key[2]:#x} bytes at {key[0]:#x}")
        return Plan({each: area for each, area in self._now.memory.items() if each != key}, self._now.extras)

    def plan_extra(self, name: str, fd: int, size_bytes: int, fd_offset: int) -> tuple[Plan, int]:
        """Memory that is not the guest's, instead of the former `name`. (the plan, offset of its first byte).

        Raises: ProtocolError when it does not fit.
        """
        start = fd_offset - fd_offset % _PAGE
        others = {each: area for each, area in self._now.extras.items() if each != name}
        length = fd_offset - start + size_bytes
        # The former one keeps its place until the plan is carried out.
        offset = self._free(length, self._now.extras.values(), self._memory_end, self.size_bytes)
        area = MappableArea(offset, length, fd, start)
        return Plan(self._now.memory, {**others, name: area}), offset + fd_offset - start

    @staticmethod
    def _free(size_bytes: int, taken: Iterable[MappableArea], start: int, end: int) -> int:
        """The first gap of that size, at a page's border. Raises: ProtocolError when there is none."""
        for area in sorted(taken, key=lambda area: area.offset):
            if area.offset - start >= size_bytes:
                break
            start = -(-(area.offset + area.size_bytes) // _PAGE) * _PAGE
        if end - start < size_bytes:
            raise ProtocolError(f"{size_bytes >> 20} MiB of memory do not fit into what is left of the BAR")
        return start

    def commit(self, plan: Plan) -> None:
        """Carry a plan out: its fds are ours, those that are in it no more are closed."""
        kept = {id(area) for area in plan.areas}
        for area in self._now.areas:
            if id(area) not in kept:
                area.close()
        self._now = plan

    def clear(self) -> None:
        """Let go of everything."""
        self.commit(Plan())

    # Accesses of clients that cannot map.

    def read(self, offset: int, count: int) -> bytes:
        """Zeros where there is no memory."""
        data = bytearray(count)
        for area, area_offset, data_offset, size in self._pieces(offset, count):
            # A read that the sibling's truncated file cuts short leaves zeros; through a mapping it would kill us.
            piece = os.pread(area.fd, size, area.fd_offset + area_offset)
            data[data_offset : data_offset + len(piece)] = piece
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        """What goes where there is no memory is dropped."""
        for area, area_offset, data_offset, size in self._pieces(offset, len(data)):
            piece = data[data_offset : data_offset + size]
            start = area.fd_offset + area_offset
            if start + size > os.fstat(area.fd).st_size:
                log.warning("a write beyond the end of the sibling's memory file was dropped")
                continue
            try:
                os.pwrite(area.fd, piece, start)
            except OSError:
                # hugetlbfs cannot be written by system call
                with Mapping(area.fd, size, start) as mapping:
                    mapping.view[:] = piece

    def _pieces(self, offset: int, count: int) -> list[tuple[MappableArea, int, int, int]]:
        """(area, offset in it, offset in the data, size) of each part of the access that is memory."""
        pieces = []
        for area in self.areas:
            start = max(offset, area.offset)
            end = min(offset + count, area.offset + area.size_bytes)
            if start < end:
                pieces.append((area, start - area.offset, start - offset, end - start))
        return pieces


def _key(region: MemoryRegion) -> SlotKey:
    return region.gpa, region.uva, region.size_bytes
