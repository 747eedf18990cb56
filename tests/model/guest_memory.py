"""Guest memory as a device sees it: pieces of bytes, and rows that say where a driver's address leads."""

import bisect
import struct
from typing import NamedTuple

READ, WRITE, BOTH, REFUSED = 1, 2, 3, 4
MASK64 = (1 << 64) - 1
PAGE_BYTES = 4096


class Row(NamedTuple):
    """`size` bytes from driver address `start` on lie in pieces[piece] from `offset` on."""

    start: int
    size: int
    piece: int
    offset: int
    access: int


class Segment(NamedTuple):
    """Bytes of a buffer; piece -1: not in guest memory."""

    piece: int
    offset: int
    length: int


class Broken(Exception):
    """The driver broke the ring's structure, which ends its service. args[0]: the rule, as kernels.status names it."""


class Missing(Exception):
    """The IOTLB does not know `address` (args[0]) for `access` (args[1])."""


class GuestMemory:
    """layout: [(guest-physical address, bytes)]. rows: what the driver's addresses mean; None: they are physical."""

    def __init__(self, layout, rows=None):
        self.layout = list(layout)
        self.pieces = [bytearray(size) for _, size in layout]
        self.iotlb = rows is not None
        plain = [Row(gpa, size, piece, 0, BOTH) for piece, (gpa, size) in enumerate(layout)]
        self.set_rows(plain if rows is None else rows)
        self.log = None  # a bit for each page (vhost-user: Migration); None: nothing is logged

    def set_rows(self, rows):
        self.rows = sorted(rows)
        self._starts = [row.start for row in self.rows]

    def row_of(self, address):
        """The row that holds the address, or None."""
        k = bisect.bisect_right(self._starts, address) - 1
        if k < 0:
            return None
        row = self.rows[k]
        return row if address - row.start < row.size else None

    def may(self, row, access):
        """Whether the row is there for the access; one that lacks a permission has to be asked for, like none."""
        return row is not None and not row.access & REFUSED and row.access & access == access

    def segments(self, address, length, access):
        """[Segment] of a buffer, whole rows of it until it leaves guest memory. Raises: Missing."""
        found = []
        while length:
            row = self.row_of(address)
            if not self.may(row, access):
                if self.iotlb and not (row and row.access & REFUSED):
                    raise Missing(address, access)
                found.append(Segment(-1, 0, length))
                break
            inside = address - row.start
            part = min(length, row.size - inside)
            found.append(Segment(row.piece, row.offset + inside, part))
            address += part
            length -= part
        return found

    def in_one_piece(self, address, length):
        """(piece, offset) of a table that the device reads, None when it is not in one row. Raises: Missing."""
        row = self._row_for_table(address)
        if row is None:
            return None
        inside = address - row.start
        if row.size - inside >= length:
            return row.piece, row.offset + inside
        self._row_for_table(row.start + row.size)  # may be missing; if not, the table lies in two rows
        return None

    def _row_for_table(self, address):
        row = self.row_of(address)
        if self.may(row, READ):
            return row
        if self.iotlb and not (row and row.access & REFUSED):
            raise Missing(address, READ)
        return None

    def mark_physical(self, gpa, length):
        """Note pages as written."""
        if self.log is None or not length:
            return
        for page in range(gpa // PAGE_BYTES, (gpa + length - 1) // PAGE_BYTES + 1):
            if page // 8 < len(self.log):
                self.log[page // 8] |= 1 << page % 8

    def mark(self, piece, offset, length):
        """Note bytes of a piece as written."""
        if self.log is not None and piece >= 0:
            self.mark_physical(self.layout[piece][0] + offset, length)

    def pack(self, form, piece, offset, *values):
        struct.pack_into(form, self.pieces[piece], offset, *values)

    def unpack(self, form, piece, offset):
        return struct.unpack_from(form, self.pieces[piece], offset)
