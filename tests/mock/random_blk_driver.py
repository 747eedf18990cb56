"""Random requests to a block device, on tests.mock.random_driver's rings."""

import itertools
import struct

from tests.mock.random_driver import BUFFERS, RandomPackedDriver, RandomSplitDriver
from tests.model.blk import DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES
from tests.model.chain import F_WRITE

_KINDS = (IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 10, 0xFFFF_FFFF)


class _Requests:
    """Spreads each request over as many descriptors as the chain is to have. sectors: of the disk."""

    sectors = 0
    _at = 0

    def _room(self, length):
        """Address of buffers that were not used for a while."""
        if self._at + length > BUFFERS[1]:
            self._at = self.rng.randrange(64)
        address = BUFFERS[0] + self._at
        self._at += length + int(self.rng.random() * 9)
        return address

    def _write(self, address, data):
        for byte, piece in ((0, 1), (0x4000, 2)):
            offset = address - BUFFERS[0] - byte
            memory = self.memory.pieces[piece]
            start, end = max(offset, 0), min(offset + len(data), len(memory))
            if start < end:
                memory[start:end] = data[start - offset : end - offset]

    def _sector(self):
        rng = self.rng
        if rng.random() < 0.97:
            return rng.randrange(self.sectors)
        return rng.choice((self.sectors, self.sectors + 1, (1 << 55) - 1, 1 << 55, (1 << 64) - 1))

    def _ranges(self):
        rng = self.rng
        data = b""
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            count = rng.randrange(9) if rng.random() < 0.97 else rng.choice((1 << 21, 0xFFFF_FFFF))
            data += struct.pack("<QII", self._sector(), count, rng.choice((0, 0, 0, 1, 2)))
        return data if rng.random() < 0.95 else data[: rng.randrange(len(data))]

    def buffers(self, count):
        """[(address, length, flags)], `count` of them."""
        rng = self.rng
        kind = rng.choice(_KINDS)
        sent, room = b"", 0
        length = rng.choice((512, 512, 1024, 2048)) if rng.random() < 0.97 else rng.randrange(1500)
        if kind == OUT:
            sent = rng.randbytes(length)
        elif kind in (DISCARD, WRITE_ZEROES):
            sent = self._ranges()
        elif kind == IN:
            room = length
        elif kind == GET_ID:
            room = rng.choice((20, 20, 0, 19, 40))
        sent = struct.pack("<IIQ", kind, rng.getrandbits(32), self._sector()) + sent
        if rng.random() < 0.01:
            sent = sent[: rng.randrange(1, 16)]
        readable = 0 if count == 1 else min(rng.randrange(1, count), len(sent))
        writable = min(count - readable, room + 1)
        readable = min(count - writable, len(sent))
        spare = count - readable - writable  # a request too short for so many descriptors: an odd one more
        found = [self._piece(sent[a:b], 0) for a, b in self._cuts(len(sent), readable)]
        found += [self._piece(bytes(b - a), F_WRITE) for a, b in self._cuts(room + 1 + spare, writable + spare)]
        return found

    def _piece(self, data, flags):
        address = self._room(len(data))
        self._write(address, data)
        return address, len(data), flags

    def _cuts(self, total, parts):
        points = [0, *sorted(self.rng.sample(range(1, total), parts - 1)), total] if parts else []
        return list(itertools.pairwise(points))


class SplitBlkDriver(_Requests, RandomSplitDriver):
    pass


class PackedBlkDriver(_Requests, RandomPackedDriver):
    pass
