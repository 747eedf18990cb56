"""A driver that does what a seed says: any shape of chain that the specification allows, and then anything at all.

It writes into a tests.model.GuestMemory and reads used elements from there.
"""

import struct

from tests.model.chain import ENTRY, F_INDIRECT, F_NEXT, F_WRITE
from tests.model.packed_ring import DESC, DISABLE, ENABLE, F_AVAIL, F_USED

BUFFERS = (0x400_0000, 0x6000)  # two pieces, seen as one by the guest
TABLES = (3, 0x800_0000, 0x8000)  # piece, address, bytes
_ODD_LENGTHS = (0, 1, 8, 15, 16, 17, 24, 32, 40, 1 << 20, 0x7FFF_FFFF, 0xFFFF_FFF0, 0xFFFF_FFFF)
_ODD_ADDRESSES = (
    0, 8, 0xFF0, 0xFFF, 0x1000, 0x10_0000, 0x400_0000 - 16, 0x400_3FF8, 0x400_5FF0, 0x400_5FFF, 0x400_6000,
    0x800_0000, 0x800_7FF0, 0x800_7FFF, 0x1_0000_0000, (1 << 63) - 1, 1 << 63, (1 << 64) - 16, (1 << 64) - 1,
)  # fmt: skip


class RandomDriver:
    """What both layouts share. place: tests.model.ring.Place. rng: random.Random."""

    def __init__(self, memory, place, rng, longest=6):
        self.memory, self.place, self.rng, self.longest = memory, place, rng, longest
        self.data = memory.pieces[place.piece]
        self.free = place.size
        self.outstanding = []  # what was made available and is not used yet: (name, descriptors of the ring)
        self._table = 0

    def buffer(self):
        """(address, length) within guest memory."""
        start, room = BUFFERS
        chance = self.rng.random
        length = 1 + int(chance() * (80 if chance() < 0.9 else 0x800))
        return start + int(chance() * (room - length)), length

    def count(self, most):
        """How many buffers a chain is to have."""
        return 1 + int(self.rng.random() * most)

    def buffers(self, count):
        """[(address, length, flags)] in an order that is allowed."""
        writable = int(self.rng.random() * (count + 1))
        return [(*self.buffer(), F_WRITE if k >= count - writable else 0) for k in range(count)]

    def table(self, count):
        """(address, offset) of an indirect table that nothing else uses for now."""
        bytes_wanted = 16 * count
        if self._table + bytes_wanted > TABLES[2]:
            self._table = 0
        offset = self._table
        self._table += bytes_wanted
        return TABLES[1] + offset, offset

    def odd(self, entry, limit):
        """A descriptor made wrong in one way or in several."""
        rng = self.rng
        address, length, third, fourth = entry
        kind = rng.randrange(10)
        if kind in (0, 9):
            address = rng.choice(_ODD_ADDRESSES) if rng.random() < 0.7 else rng.getrandbits(64)
        if kind in (1, 9):
            length = rng.choice(_ODD_LENGTHS)
        flags, other = self.split_fields(third, fourth)
        if kind == 2:
            flags ^= F_WRITE
        elif kind == 3:
            flags ^= F_NEXT
        elif kind == 4:
            flags |= F_INDIRECT
            address, length = TABLES[1] + 16 * rng.randrange(TABLES[2] // 16), 16 * rng.randrange(1, 40)
        elif kind == 5:
            flags = rng.getrandbits(16)
        elif kind == 6:
            other = rng.choice((limit - 1, limit, limit + 1, 0xFFFF, 0, rng.getrandbits(16)))
        elif kind == 7:
            flags ^= F_INDIRECT
        elif kind == 8:
            flags |= F_NEXT
            other = rng.randrange(limit)
        return address & (1 << 64) - 1, length, *self.join_fields(flags, other)

    def spoil_tables(self):
        """Make some entries of recent indirect tables wrong."""
        data = self.memory.pieces[TABLES[0]]
        for _ in range(self.rng.randrange(1, 4)):
            offset = 16 * self.rng.randrange(max(self._table // 16, 1))
            ENTRY.pack_into(data, offset, *self.odd(ENTRY.unpack_from(data, offset), 8))

    def spoil_ring(self):
        """Make some descriptors of the ring wrong, those in use or any."""
        for _ in range(self.rng.randrange(1, 4)):
            offset = self.place.desc + 16 * self.rng.randrange(self.place.size)
            ENTRY.pack_into(self.data, offset, *self.odd(ENTRY.unpack_from(self.data, offset), self.place.size))


class RandomSplitDriver(RandomDriver):
    """Descriptors are taken in a random order and go back in another."""

    def __init__(self, memory, place, rng, index=0, longest=6):
        super().__init__(memory, place, rng, longest)
        self.descriptors = list(range(place.size))
        rng.shuffle(self.descriptors)
        self.avail_idx = self.used_idx = index
        struct.pack_into("<HH", self.data, place.avail, 0, index)
        struct.pack_into("<HH", self.data, place.used, 0, index)

    def before_table(self, count):
        """How many descriptors a chain has before the one that refers to a table (2.7.5.3.1)."""
        return self.rng.randrange(count) if self.rng.random() < 0.3 else 0

    @staticmethod
    def split_fields(flags, following):
        return flags, following

    @staticmethod
    def join_fields(flags, other):
        return flags, other

    def add(self):
        """Write one chain and its head into the available ring, not shown yet. False when there is no room."""
        rng, place = self.rng, self.place
        if not self.free:
            return False
        count = min(self.count(self.longest), self.free)
        buffers = self.buffers(count)
        direct = count
        if place.indirect and rng.random() < 0.4:
            direct = self.before_table(count)
            more = self.count(7)
            buffers = self.buffers(direct + more)
            address, offset = self.table(more)
            order = list(range(1, more))
            rng.shuffle(order)
            order = [0, *order]
            for k, where in enumerate(order):
                last = k == more - 1
                flags = buffers[direct + k][2] | (0 if last else F_NEXT)
                ENTRY.pack_into(
                    self.memory.pieces[TABLES[0]],
                    offset + 16 * where,
                    *buffers[direct + k][:2],
                    flags,
                    rng.getrandbits(16) if last else order[k + 1],
                )
            buffers = [*buffers[:direct], (address, 16 * more, F_INDIRECT)]
        taken = [self.descriptors.pop() for _ in buffers]
        for k, (buffer, index) in enumerate(zip(buffers, taken, strict=True)):
            last = k == len(taken) - 1
            flags = buffer[2] | (0 if last else F_NEXT)
            following = 0xBAD if last else taken[k + 1]  # means nothing without NEXT
            ENTRY.pack_into(self.data, place.desc + 16 * index, buffer[0], buffer[1], flags, following)
        struct.pack_into("<H", self.data, place.avail + 4 + 2 * (self.avail_idx % place.size), taken[0])
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.free -= len(taken)
        self.outstanding.append((taken[0], taken))
        return True

    def show(self):
        struct.pack_into("<H", self.data, self.place.avail + 2, self.avail_idx)

    def reap(self):
        """Take every used element; each must be the oldest one outstanding. Returns how many."""
        place = self.place
        shown = struct.unpack_from("<H", self.data, place.used + 2)[0]
        count = (shown - self.used_idx) & 0xFFFF
        assert count <= len(self.outstanding), "more used than was available"
        for head, taken in self.outstanding[:count]:
            offset = place.used + 4 + 8 * (self.used_idx % place.size)
            assert struct.unpack_from("<I", self.data, offset)[0] == head, "used in order, once each"
            self.descriptors += taken
            self.free += len(taken)
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        del self.outstanding[:count]
        if count > 2:
            self.rng.shuffle(self.descriptors)
        return count

    def change_wish(self):
        """Say anew when to be called."""
        rng, place = self.rng, self.place
        near = (self.used_idx + rng.choice((0, 0, 1, 2, rng.randrange(place.size + 2), -1))) & 0xFFFF
        event = near if rng.random() < 0.8 else rng.getrandbits(16)
        struct.pack_into("<H", self.data, place.avail + 4 + 2 * place.size, event)
        struct.pack_into("<H", self.data, place.avail, rng.choice((0, 1, 0, 1, rng.getrandbits(16))))

    def misbehave(self):
        """Break one rule or another."""
        rng, place = self.rng, self.place
        kind = rng.randrange(8)
        if kind < 4:
            self.spoil_ring()
        if kind in (3, 4, 5):
            self.spoil_tables()
        if kind == 6:
            slot = rng.randrange(place.size)
            head = rng.choice((place.size, place.size + 1, 0xFFFF, rng.randrange(place.size)))
            struct.pack_into("<H", self.data, place.avail + 4 + 2 * slot, head)
        if kind == 7:
            jump = rng.choice((place.size, place.size + 1, -1, 0x8000, rng.getrandbits(16)))
            struct.pack_into("<H", self.data, place.avail + 2, (self.avail_idx + jump) & 0xFFFF)


class RandomPackedDriver(RandomDriver):
    """Buffer ids are drawn from all those that are free, and have nothing to do with slots."""

    def __init__(self, memory, place, rng, position=0x8000, longest=6):
        super().__init__(memory, place, rng, longest)
        self.slot, self.wrap = self.used_slot, self.used_wrap = position & 0x7FFF, position >> 15
        self.ids = list(range(place.size))
        rng.shuffle(self.ids)
        for slot in range(place.size):
            # Neither available nor used: what lies ahead has the flags of the turn before.
            old = self.wrap ^ 1 if slot >= self.slot else self.wrap
            flags = F_AVAIL | F_USED if old else 0
            struct.pack_into("<HH", self.data, place.desc + 16 * slot + 12, rng.getrandbits(16), flags)
        self._pending = []

    @staticmethod
    def split_fields(buffer_id, flags):
        return flags, buffer_id

    @staticmethod
    def join_fields(flags, other):
        return other, flags

    def add(self):
        """Write one chain, whose first descriptor's flags come with `show`. False when there is no room."""
        rng, place = self.rng, self.place
        if not self.free:
            return False
        count = min(self.count(self.longest), self.free)
        buffers = self.buffers(count)
        if place.indirect and rng.random() < 0.4:
            more = self.count(7)
            address, offset = self.table(more)
            for k, (start, length, flags) in enumerate(self.buffers(more)):
                # 2.8.7: the id and every flag but WRITE mean nothing here.
                odd = rng.choice((0, F_NEXT, F_AVAIL, F_USED))
                ENTRY.pack_into(
                    self.memory.pieces[TABLES[0]], offset + 16 * k, start, length, rng.getrandbits(16), flags | odd
                )
            buffers = [(address, 16 * more, F_INDIRECT)]
        buffer_id = self.ids.pop()
        for k, (address, length, direction) in enumerate(buffers):
            last = k == len(buffers) - 1
            flags = direction | (0 if last else F_NEXT) | (F_AVAIL if self.wrap else F_USED)
            offset = place.desc + 16 * self.slot
            name = buffer_id if last else 0xBAD  # 2.8.6: the last one's id counts
            if k == 0:
                struct.pack_into("<QIH", self.data, offset, address, length, name)
                self._pending.append((offset + 14, flags))
            else:
                ENTRY.pack_into(self.data, offset, address, length, name, flags)
            self.slot += 1
            if self.slot == place.size:
                self.slot, self.wrap = 0, self.wrap ^ 1
        self.free -= len(buffers)
        self.outstanding.append((buffer_id, len(buffers)))
        return True

    def show(self):
        for offset, flags in reversed(self._pending):
            struct.pack_into("<H", self.data, offset, flags)
        self._pending.clear()

    def reap(self):
        """Take every used descriptor; each must be of the oldest chain outstanding. Returns how many."""
        place = self.place
        count = 0
        for name, slots in self.outstanding:
            _, buffer_id, flags = struct.unpack_from("<IHH", self.data, place.desc + 16 * self.used_slot + 8)
            if not bool(flags & F_AVAIL) == bool(flags & F_USED) == bool(self.used_wrap):
                break
            assert buffer_id == name, "used in order, once each"
            self.used_slot += slots
            if self.used_slot >= place.size:
                self.used_slot, self.used_wrap = self.used_slot - place.size, self.used_wrap ^ 1
            self.free += slots
            self.ids.append(name)
            count += 1
        del self.outstanding[:count]
        if count > 2:
            self.rng.shuffle(self.ids)
        return count

    def change_wish(self):
        """Say anew when to be called."""
        rng, place = self.rng, self.place
        slot = self.used_slot + rng.choice((0, 0, 1, 2, rng.randrange(place.size + 2)))
        wrap = self.used_wrap
        if slot >= place.size:
            slot, wrap = slot % place.size, wrap ^ 1
        event = slot | wrap << 15 if rng.random() < 0.8 else rng.getrandbits(16)
        flags = rng.choice((ENABLE, DISABLE, DESC, DESC, DESC, rng.getrandbits(16)))
        struct.pack_into("<HH", self.data, place.avail, event, flags)

    def misbehave(self):
        """Break one rule or another."""
        rng, place = self.rng, self.place
        kind = rng.randrange(7)
        if kind < 4:
            self.spoil_ring()
        if kind in (3, 4, 5):
            self.spoil_tables()
        if kind == 6:
            # Lie about the wrap counter: available or used, whatever it is.
            for _ in range(rng.randrange(1, place.size + 1)):
                offset = place.desc + 16 * rng.randrange(place.size) + 14
                flags = struct.unpack_from("<H", self.data, offset)[0]
                struct.pack_into("<H", self.data, offset, flags ^ rng.choice((F_AVAIL, F_USED, F_AVAIL | F_USED)))
