"""Guest RAM in a memfd, with a bump allocator: what a driver's memory is to a test."""

import mmap
import os
import struct


class GuestMemory:
    """`regions` is a list of (gpa, size_bytes, uva, fd, fd_offset); addresses handed out are guest-physical."""

    def __init__(self, layout=((0x0, 8 << 20),), uva_base=0x7F0000000000, fd_offset=0):
        self.regions = []
        self._maps = []
        for gpa, size_bytes in layout:
            fd = os.memfd_create("guest")
            os.ftruncate(fd, size_bytes + fd_offset)
            self.regions.append((gpa, size_bytes, uva_base + gpa, fd, fd_offset))
            self._maps.append(mmap.mmap(fd, size_bytes + fd_offset))
        self._fd_offset = fd_offset
        self._next = layout[0][0] + 0x1000

    def close(self):
        for region in self.regions:
            os.close(region[3])
        for mapping in self._maps:
            mapping.close()

    def allocate(self, size_bytes, align=16):
        gpa = -(-self._next // align) * align
        self._next = gpa + size_bytes
        return gpa

    def to_uva(self, gpa):
        for base, size_bytes, uva, _, _ in self.regions:
            if base <= gpa < base + size_bytes:
                return uva + gpa - base
        raise KeyError(hex(gpa))

    def _locate(self, gpa):
        for (base, size_bytes, *_), mapping in zip(self.regions, self._maps, strict=True):
            if base <= gpa < base + size_bytes:
                return mapping, gpa - base + self._fd_offset, base + size_bytes - gpa
        raise KeyError(hex(gpa))

    def write(self, gpa, data):
        data = bytes(data)
        while data:
            mapping, offset, room = self._locate(gpa)
            part = data[:room]
            mapping[offset : offset + len(part)] = part
            gpa, data = gpa + len(part), data[len(part) :]

    def read(self, gpa, size_bytes):
        parts = []
        while size_bytes:
            mapping, offset, room = self._locate(gpa)
            part = mapping[offset : offset + min(room, size_bytes)]
            parts.append(part)
            gpa, size_bytes = gpa + len(part), size_bytes - len(part)
        return b"".join(parts)

    def pack(self, layout, gpa, *values):
        self.write(gpa, struct.pack(layout, *values))

    def unpack(self, layout, gpa):
        values = struct.unpack(layout, self.read(gpa, struct.calcsize(layout)))
        return values[0] if len(values) == 1 else values
