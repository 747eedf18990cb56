"""A split virtqueue in plain Python, both sides (virtio 1.2, 2.7): for control queues and as a model in tests.

Indices are read and written as whole 16-bit words (memoryview items), so the other process never sees half of one.
Neither side suppresses notifications by itself; the device heeds VIRTQ_AVAIL_F_NO_INTERRUPT.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kernels.virtio_layout import (
    AVAIL_F_NO_INTERRUPT,
    AVAIL_FLAGS,
    AVAIL_IDX,
    AVAIL_RING,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    QUEUE_SIZE_MAX,
    USED_ELEM_SIZE,
    USED_F_NO_NOTIFY,
    USED_FLAGS,
    USED_IDX,
    USED_RING,
    avail_bytes,
    used_bytes,
)
from vvupipe.errors import ProtocolError

_FENCE = threading.Lock()


def _full_fence() -> None:
    # Taking an uncontended lock is an atomic read-modify-write: a full barrier on every CPU that Python runs on.
    with _FENCE:
        return


class BusMemory(Protocol):
    """What a device reaches by DMA."""

    def view(self, address_gpa: int, size_bytes: int) -> memoryview:
        """A view of these bytes, read-only where the device may not write. Raises: ProtocolError: not all mapped."""


class FlatMemory:
    """One piece of memory that begins at `base_gpa`."""

    def __init__(self, view: memoryview, base_gpa: int = 0) -> None:
        self._view = view
        self._base = base_gpa

    def view(self, address_gpa: int, size_bytes: int) -> memoryview:
        """See BusMemory."""
        start = address_gpa - self._base
        if start < 0 or size_bytes < 0 or start + size_bytes > len(self._view):
            raise ProtocolError(f"{size_bytes} bytes at {address_gpa:#x} are outside of memory")
        return self._view[start : start + size_bytes]


@dataclass(frozen=True, slots=True)
class QueueLayout:
    """Where the three parts of a queue lie; the driver tells the device."""

    size: int
    desc_gpa: int
    avail_gpa: int
    used_gpa: int

    def check(self) -> None:
        """Raises: ProtocolError on a size or an alignment that 2.7 forbids."""
        if not 1 <= self.size <= QUEUE_SIZE_MAX or self.size & (self.size - 1):
            raise ProtocolError(f"queue size {self.size} is not a power of two up to {QUEUE_SIZE_MAX}")
        if self.desc_gpa & 15 or self.avail_gpa & 1 or self.used_gpa & 3:
            raise ProtocolError("a part of the queue is not aligned")

    @classmethod
    def packed_at(cls, start_gpa: int, size: int) -> QueueLayout:
        """The three parts one after the other from `start_gpa` (aligned to 16) on."""
        avail = start_gpa + size * DESC_SIZE
        used = (avail + avail_bytes(size) + 3) & ~3
        return cls(size, start_gpa, avail, used)

    @property
    def parts(self) -> list[tuple[int, int]]:
        """(address, size in bytes) of descriptor table, available ring and used ring, which may lie anywhere."""
        sizes = self.size * DESC_SIZE, int(avail_bytes(self.size)), int(used_bytes(self.size))
        return list(zip((self.desc_gpa, self.avail_gpa, self.used_gpa), sizes, strict=True))

    @property
    def end_gpa(self) -> int:
        """The first byte after the used ring, the last part of `packed_at`."""
        return self.used_gpa + int(used_bytes(self.size))


class _Rings:
    """The three parts as arrays of words; released by `close`."""

    def __init__(self, memory: BusMemory, layout: QueueLayout) -> None:
        layout.check()
        size = layout.size
        desc = memory.view(layout.desc_gpa, size * DESC_SIZE)
        self.desc_u64 = desc.cast("Q")
        self.desc_u32 = desc.cast("I")
        self.desc_u16 = desc.cast("H")
        self.avail = memory.view(layout.avail_gpa, avail_bytes(size)).cast("H")
        used = memory.view(layout.used_gpa, used_bytes(size))
        if used.readonly:
            raise ProtocolError(f"the used ring at {layout.used_gpa:#x} is not mapped for writing")
        self.used_u16 = used.cast("H")
        self.used_elem = used[USED_RING : USED_RING + size * USED_ELEM_SIZE].cast("I")

    def close(self) -> None:
        for view in (self.desc_u64, self.desc_u32, self.desc_u16, self.avail, self.used_u16, self.used_elem):
            view.release()


@dataclass(frozen=True, slots=True)
class Chain:
    """A descriptor chain that the driver made available."""

    head: int
    readable: list[memoryview]
    writable: list[memoryview]

    def read(self) -> bytes:
        """The device-readable bytes, one after the other."""
        return b"".join(self.readable)

    @property
    def readable_bytes(self) -> int:
        """How much `read` gives: up to 4 GiB for each descriptor of the queue, if the driver says so."""
        return sum(len(part) for part in self.readable)

    @property
    def room_bytes(self) -> int:
        """How much the device may write."""
        return sum(len(part) for part in self.writable)

    def write(self, data: bytes) -> int:
        """Fill the device-writable part from its start; returns the bytes written. Raises: ProtocolError (no room)."""
        if len(data) > self.room_bytes:
            raise ProtocolError(f"{len(data)} bytes do not fit into a chain of {self.room_bytes}")
        start = 0
        for part in self.writable:
            piece = data[start : start + len(part)]
            part[: len(piece)] = piece
            start += len(piece)
        return len(data)


class DeviceQueue:
    """The device's side. Everything in memory is the driver's word and is checked.

    Indirect descriptors are refused: whoever uses this queue does not offer them.
    """

    def __init__(self, memory: BusMemory, layout: QueueLayout) -> None:
        self._memory = memory
        self._rings = _Rings(memory, layout)
        self._size = layout.size
        self._last_avail = 0
        self._used_idx = 0

    @property
    def available(self) -> int:
        """Chains that wait to be taken. Raises: ProtocolError when the driver counts more than the ring holds."""
        count: int = (self._rings.avail[AVAIL_IDX // 2] - self._last_avail) & 0xFFFF
        if count > self._size:
            raise ProtocolError(f"{count} chains made available in a queue of {self._size}")
        return count

    def pop(self) -> Chain | None:
        """Take the next chain, None when there is none. Raises: ProtocolError on a malformed one."""
        if not self.available:
            return None
        head = self._rings.avail[AVAIL_RING // 2 + self._last_avail % self._size]
        chain = self._walk(head)
        self._last_avail = (self._last_avail + 1) & 0xFFFF
        return chain

    def _walk(self, head: int) -> Chain:
        chain = Chain(head, [], [])
        index = head
        for _ in range(self._size):
            if index >= self._size:
                raise ProtocolError(f"descriptor {index} in a table of {self._size}")
            address, length = self._rings.desc_u64[2 * index], self._rings.desc_u32[4 * index + 2]
            flags, following = self._rings.desc_u16[8 * index + 6], self._rings.desc_u16[8 * index + 7]
            if flags & DESC_F_INDIRECT:
                raise ProtocolError("indirect descriptor, which was not offered")
            part = self._memory.view(address, length)
            if flags & DESC_F_WRITE:
                if part.readonly:
                    raise ProtocolError(f"a buffer at {address:#x} is not mapped for writing")
                chain.writable.append(part)
            elif chain.writable:
                raise ProtocolError("device-readable descriptor after a device-writable one")
            else:
                chain.readable.append(part)
            if not flags & DESC_F_NEXT:
                return chain
            index = following
        raise ProtocolError("descriptor chain longer than its queue")

    def push(self, head: int, written_bytes: int) -> bool:
        """Give a chain back. Returns whether the driver wants an interrupt."""
        slot = self._used_idx % self._size
        self._rings.used_elem[2 * slot] = head
        self._rings.used_elem[2 * slot + 1] = written_bytes
        self._used_idx = (self._used_idx + 1) & 0xFFFF
        _full_fence()
        self._rings.used_u16[USED_IDX // 2] = self._used_idx
        _full_fence()
        return not self._rings.avail[AVAIL_FLAGS // 2] & AVAIL_F_NO_INTERRUPT

    def close(self) -> None:
        """Let go of the memory."""
        self._rings.close()


class DriverQueue:
    """The driver's side, on zeroed memory. Buffers are (gpa, size in bytes)."""

    def __init__(self, memory: BusMemory, layout: QueueLayout) -> None:
        self.layout = layout
        self._rings = _Rings(memory, layout)
        self._size = layout.size
        self._free = list(range(layout.size - 1, -1, -1))
        self._chains: dict[int, list[int]] = {}
        self._avail_idx = 0
        self._last_used = 0

    @property
    def free_descriptors(self) -> int:
        """How many descriptors `add` can still use."""
        return len(self._free)

    def add(self, readable: Sequence[tuple[int, int]], writable: Sequence[tuple[int, int]]) -> int:
        """Make a chain available; returns its head. Raises: ValueError when there are too few descriptors."""
        parts = [(*buffer, 0) for buffer in readable] + [(*buffer, DESC_F_WRITE) for buffer in writable]
        if not parts or len(parts) > len(self._free):
            raise ValueError(f"{len(parts)} descriptors for {len(self._free)} free ones")
        indices = [self._free.pop() for _ in parts]
        rings = self._rings
        for k, (index, (address, length, flags)) in enumerate(zip(indices, parts, strict=True)):
            more = k + 1 < len(indices)
            rings.desc_u64[2 * index] = address
            rings.desc_u32[4 * index + 2] = length
            rings.desc_u16[8 * index + 6] = flags | (DESC_F_NEXT if more else 0)
            rings.desc_u16[8 * index + 7] = indices[k + 1] if more else 0
        head = indices[0]
        self._chains[head] = indices
        rings.avail[AVAIL_RING // 2 + self._avail_idx % self._size] = head
        self._avail_idx = (self._avail_idx + 1) & 0xFFFF
        _full_fence()
        rings.avail[AVAIL_IDX // 2] = self._avail_idx
        _full_fence()
        return head

    @property
    def wants_notification(self) -> bool:
        """Whether the device wants to hear of new chains (2.7.7)."""
        return not self._rings.used_u16[USED_FLAGS // 2] & USED_F_NO_NOTIFY

    def take(self) -> tuple[int, int] | None:
        """(head, bytes written) of the next chain given back, or None.

        Raises: ProtocolError when the device gives back what it was not given.
        """
        if self._rings.used_u16[USED_IDX // 2] == self._last_used:
            return None
        slot = self._last_used % self._size
        head, written = self._rings.used_elem[2 * slot], self._rings.used_elem[2 * slot + 1]
        indices = self._chains.pop(head, None)
        if indices is None:
            raise ProtocolError(f"the device gave back chain {head}, which it does not have")
        self._last_used = (self._last_used + 1) & 0xFFFF
        self._free.extend(reversed(indices))
        return head, written

    def close(self) -> None:
        """Let go of the memory."""
        self._rings.close()
