"""MSI-X as its function shows it (PCI Local Bus 3.0, 6.8.2): capability, vector table, pending bits.

Over VFIO the client owns delivery: it ties eventfds to vectors by SET_IRQS and traps the table. The table here only
keeps what was written; the pending bits tell of vectors that the client masked.
"""

from __future__ import annotations

import struct

from vvupipe.pci.config_space import CAP_MSIX, ConfigSpace

ENTRY_BYTES = 16
_VECTORS_MAX = 2048
_ENTRY_MASKED = 1  # "Vector Control": bit 0, set after reset
_CONTROL_WRITABLE = 0xC000  # enable and function mask
_CONTROL_ENABLE = 0x8000


class Msix:
    """`count` vectors; the table at `table_offset` and the pending bits at `pba_offset` of BAR `bar`."""

    def __init__(self, config: ConfigSpace, count: int, bar: int, table_offset: int, pba_offset: int) -> None:
        if not 1 <= count <= _VECTORS_MAX or table_offset & 7 or pba_offset & 7:
            raise ValueError("MSI-X takes 1 to 2048 vectors, table and pending bits aligned to 8")
        self.count = count
        self.table_bytes = count * ENTRY_BYTES
        self.pba_bytes = (count + 63) // 64 * 8
        self._config = config
        self._table = bytearray()
        self._pending = 0
        body = struct.pack("<HII", count - 1, table_offset | bar, pba_offset | bar)
        self._offset = config.add_capability(CAP_MSIX, body, struct.pack("<H", _CONTROL_WRITABLE))
        self.reset()

    def reset(self) -> None:
        """Every vector masked, nothing pending."""
        self._table[:] = struct.pack("<QII", 0, 0, _ENTRY_MASKED) * self.count
        self._pending = 0

    @property
    def enabled(self) -> bool:
        """Whether the driver set MSI-X Enable in the capability."""
        return bool(self._config.get(self._offset + 2, 2) & _CONTROL_ENABLE)

    def set_pending(self, vector: int, pending: bool) -> None:
        """Set or clear a pending bit."""
        self._pending = (self._pending & ~(1 << vector)) | (int(pending) << vector)

    def read_table(self, offset: int, count: int) -> bytes:
        """Bytes of the vector table; zeros beyond it."""
        return bytes(self._table[offset : offset + count]).ljust(count, b"\0")

    def write_table(self, offset: int, data: bytes) -> None:
        """A write to the vector table; what lies beyond it is dropped."""
        end = min(offset + len(data), self.table_bytes)
        if offset < end:
            self._table[offset:end] = data[: end - offset]

    def read_pending(self, offset: int, count: int) -> bytes:
        """Bytes of the pending bit array, which is read-only."""
        whole = self._pending.to_bytes(self.pba_bytes, "little")
        return whole[offset : offset + count].ljust(count, b"\0")
