"""Random requests to a block device, on tests.mock.random_driver's rings."""

import itertools
import struct

from tests.mock.random_driver import BUFFERS, RandomPackedDriver, RandomSplitDriver
from tests.model.blk import DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES
from tests.model.chain import F_WRITE
from tests.model.packed_ring import F_AVAIL, F_USED

#: More than any request takes of the buffers.
_ROOM_EACH = 0xA00
_KINDS = (IN, IN, IN, OUT, OUT, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, 10, 0xFFFF_FFFF)


class _Requests:
    """Spreads each request over as many descriptors as the chain is to have. sectors: of the disk."""

    sectors = 0
    _at = 0
    _room_taken = 0

    def add(self):
        """False also when what is not shown yet has most of the room: no byte shall be in two requests at once."""
        return self._room_taken < BUFFERS[1] - 2 * _ROOM_EACH and super().add()

    def show(self):
        self._room_taken = 0
        super().show()

    def _room(self, length):
        """Address of buffers that were not used for a while."""
        if self._at + length > BUFFERS[1]:
            self._room_taken += BUFFERS[1] - self._at
            self._at = self.rng.randrange(64)
            self._room_taken += self._at
        address, before = BUFFERS[0] + self._at, self._at
        self._at += length + int(self.rng.random() * 9)
        self._room_taken += self._at - before
        return address

    def _write(self, address, data):
        for byte, piece in ((0, 1), (0x4000, 2)):
            offset = address - BUFFERS[0] - byte
            memory = self.memory.pieces[piece]
            start, end = max(offset, 0), min(offset + len(data), len(memory))
            if start < end:
                memory[start:end] = data[start - offset : end - offset]

    def _kind(self):
        return self.rng.choice(_KINDS)

    def _sector(self, sectors):
        """Where a request for `sectors` begins."""
        rng = self.rng
        if rng.random() < 0.97:
            return rng.randrange(self.sectors)
        return rng.choice((self.sectors, self.sectors + 1, (1 << 55) - 1, 1 << 55, (1 << 64) - 1))

    def _ranges(self):
        rng = self.rng
        data = b""
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            count = rng.randrange(9) if rng.random() < 0.97 else rng.choice((1 << 21, 0xFFFF_FFFF))
            data += struct.pack("<QII", self._sector(count), count, rng.choice((0, 0, 0, 1, 2)))
        return data if rng.random() < 0.95 else data[: rng.randrange(len(data))]

    def count(self, most):
        """Three more often than not, as most drivers have it."""
        return 3 if most >= 3 and self.rng.random() < 0.6 else super().count(most)

    def buffers(self, count):
        """[(address, length, flags)], `count` of them."""
        rng = self.rng
        kind = self._kind()
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
        sent = struct.pack("<IIQ", kind, rng.getrandbits(32), self._sector(-(-max(room, len(sent)) // 512))) + sent
        if rng.random() < 0.01:
            sent = sent[: rng.randrange(1, 16)]
        if count == 3 and kind in (IN, OUT) and length and len(sent) >= 16 and rng.random() < 0.8:
            data = self._piece(bytes(room), F_WRITE) if kind == IN else self._piece(sent[16:], 0)
            return [self._piece(sent[:16], 0), data, self._piece(b"\0", F_WRITE)]
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


class _Apart(_Requests):
    """Requests of a batch touch no sector and no byte of memory twice, so that their order changes nothing.

    They may complete in any order: `reap_all` says which did.
    """

    _next_sector = 0
    _last_kind = IN

    def put_batch(self, most):
        """Put up to `most` chains, whatever of them has room, and show them. How many."""
        self._at = self.rng.randrange(64)
        self._next_sector = self.rng.randrange(16)
        count = 0
        while count < most and self.add():
            count += 1
        self.show()
        return count

    def _room(self, length):
        before = self._at
        address = super()._room(length)
        assert self._at > before, "a batch does not wrap around"
        return address

    def _kind(self):
        if self.rng.random() < 0.5:
            self._last_kind = super()._kind()
        return self._last_kind

    def _sector(self, sectors):
        """The next to the last one more often than not: adjacent requests may be done together."""
        rng = self.rng
        if sectors > 16 or rng.random() < 0.03:
            return rng.choice((self.sectors, self.sectors + 1, (1 << 55) - 1, 1 << 55, (1 << 64) - 1))
        start = self._next_sector + rng.choice((0, 0, 0, 0, 1, 5))
        if start + sectors > self.sectors:
            return self.sectors
        self._next_sector = start + sectors
        return start


class SplitApartDriver(_Apart, RandomSplitDriver):
    def reap_all(self):
        """[(head, bytes written)] of everything outstanding, as it was used."""
        place, taken_of = self.place, dict(self.outstanding)
        shown = struct.unpack_from("<H", self.data, place.used + 2)[0]
        assert (shown - self.used_idx) & 0xFFFF == len(self.outstanding)
        found = []
        while self.used_idx != shown:
            element = struct.unpack_from("<II", self.data, place.used + 4 + 8 * (self.used_idx % place.size))
            taken = taken_of.pop(element[0])  # used once, and never more
            self.descriptors += taken
            self.free += len(taken)
            self.used_idx = (self.used_idx + 1) & 0xFFFF
            found.append(element)
        self.outstanding.clear()
        self.rng.shuffle(self.descriptors)
        return found


class PackedApartDriver(_Apart, RandomPackedDriver):
    def reap_all(self):
        """[(buffer id, bytes written)] of everything outstanding, as it was used."""
        place, slots_of = self.place, dict(self.outstanding)
        found = []
        while slots_of:
            length, name, flags = struct.unpack_from("<IHH", self.data, place.desc + 16 * self.used_slot + 8)
            assert bool(flags & F_AVAIL) == bool(flags & F_USED) == bool(self.used_wrap), "not used"
            slots = slots_of.pop(name)  # used once, and never more
            self.used_slot += slots
            if self.used_slot >= place.size:
                self.used_slot, self.used_wrap = self.used_slot - place.size, self.used_wrap ^ 1
            self.free += slots
            self.ids.append(name)
            found.append((name, length))
        self.outstanding.clear()
        self.rng.shuffle(self.ids)
        return found
