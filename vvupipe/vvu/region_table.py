"""The region table of the VVU function: where a driver maps the pieces of BAR 4 (docs/vvu.md, "Region table").

A real hypervisor cannot put memory that comes and goes into a BAR of the function, but it can show it in *windows*:
other PCI functions of the same VM whose BAR 2 is that memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from vvupipe.errors import TransportError
from vvupipe.vfio.function import MappableArea
from vvupipe.vvu import layout


@dataclass(frozen=True, slots=True)
class Piece:
    """`size_bytes` of BAR 4 from `bar_offset` on; `place` is a layout.WINDOW_*, `devfn` device << 3 | function."""

    bar_offset: int
    size_bytes: int
    window_offset: int = 0
    place: int = layout.WINDOW_IN_BAR
    devfn: int = 0


class MemoryPlacer(Protocol):
    """Shows a sibling's memory to the VM of the function."""

    async def place(self, areas: Sequence[MappableArea]) -> list[Piece]:
        """Where the areas of BAR 4, whose fds stay the caller's, can be mapped from now on.

        Raises: ProtocolError, with one line that says what to do, when they cannot be shown.
        """

    def forget(self) -> None:
        """The sibling is gone, or about to bring other memory."""


def pack(pieces: Sequence[Piece]) -> bytes:
    """The table as the driver reads it. Raises: ValueError when there are more pieces than it holds."""
    if len(pieces) > layout.REGION_TABLE_MAX:
        raise ValueError(f"{len(pieces)} pieces of memory, the region table holds {layout.REGION_TABLE_MAX}")
    return layout.REGION_TABLE_HEAD.pack(len(pieces)) + b"".join(
        layout.REGION_TABLE_ENTRY.pack(p.bar_offset, p.size_bytes, p.window_offset, p.place, p.devfn) for p in pieces
    )


def unpack_count(head: bytes) -> int:
    """How many entries follow the table's head. Raises: TransportError when they do not fit into the table."""
    (count,) = layout.REGION_TABLE_HEAD.unpack(head)
    if count > layout.REGION_TABLE_MAX:
        raise TransportError(f"a region table of {count} entries")
    return int(count)


def unpack_entries(data: bytes) -> list[Piece]:
    """The pieces in the bytes behind the head."""
    return [
        Piece(bar_offset, size, window_offset, place, devfn)
        for bar_offset, size, window_offset, place, devfn in layout.REGION_TABLE_ENTRY.iter_unpack(data)
    ]
