"""Memory of this process for kernels to work on: a numpy buffer with a region table on it."""

import numpy as np

from kernels import control_block as cb
from kernels.region_table import COLUMNS
from kernels.ring_record import RING
from kernels.virtio_layout import ACCESS_BOTH


class ProcessMemory:
    """Guest memory in pieces; layout is [(gpa, size_bytes)], uva is gpa + UVA_BASE."""

    UVA_BASE = 0x7000_0000_0000

    def __init__(self, layout):
        self.layout = layout
        self.pieces = [np.zeros(size + 64, np.uint8) for _, size in layout]
        rows = []
        for (gpa, size), piece in zip(layout, self.pieces, strict=True):
            address = piece.ctypes.data
            rows.append((gpa, size, address + -address % 64, gpa + self.UVA_BASE, ACCESS_BOTH))
        self.regions = np.array(rows, np.uint64).reshape(-1, COLUMNS)

    def address(self, gpa):
        for base, size, address, _, _ in self.regions.tolist():
            if base <= gpa < base + size:
                return address + gpa - base
        raise KeyError(hex(gpa))

    def _view(self, gpa, size):
        for (base, length), piece, row in zip(self.layout, self.pieces, self.regions.tolist(), strict=True):
            if base <= gpa and gpa + size <= base + length:
                start = row[2] - piece.ctypes.data + gpa - base
                return piece[start : start + size]
        raise KeyError(hex(gpa))

    def write(self, gpa, data):
        self._view(gpa, len(data))[:] = np.frombuffer(bytes(data), np.uint8)

    def read(self, gpa, size):
        return self._view(gpa, size).tobytes()


def new_ring(memory, size, desc_gpa, avail_gpa, used_gpa, *, event_idx=0, indirect=1):
    """(RING[1], the control-block record behind it)."""
    rings = np.zeros(1, RING)
    record = np.zeros(1, cb.VRING)
    ring = rings[0]
    ring["desc"], ring["avail"], ring["used"] = (memory.address(gpa) for gpa in (desc_gpa, avail_gpa, used_gpa))
    ring["record"] = record.ctypes.data
    ring["size"], ring["event_idx"], ring["indirect"] = size, event_idx, indirect
    ring["kick_fd"] = ring["call_fd"] = ring["err_fd"] = -1
    ring["state"] = cb.VRING_RUNNING
    return rings, record
