"""The device's side of a packed virtqueue (virtio 1.2, 2.8), with inflight tracking (vhost-user.rst)."""

import struct

from tests.model.chain import ENTRY, F_NEXT, F_WRITE, walk_packed
from tests.model.guest_memory import Broken
from tests.model.ring import Chain, DeviceRing

F_AVAIL, F_USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2
#: features, version, desc_num, free_head, old_free_head, used_idx, old_used_idx, the two wrap counters
HEAD = struct.Struct("<QHHHHHHBB")
STATE = struct.Struct("<BxHHHQHHIQ")  # inflight, next, last, num, counter, id, flags, len, addr


class PackedDevice(DeviceRing):
    """A position is (slot, wrap counter)."""

    packed = True

    def __init__(self, memory, place, inflight, base=0x8000):
        super().__init__(memory, place, inflight)
        self.avail = self.used = self.decided = (base & 0x7FFF, base >> 15)

    @staticmethod
    def _number(position):
        return position[0] | position[1] << 15

    @property
    def last_avail_idx(self):
        return self._number(self.avail)

    @property
    def used_idx(self):
        return self._number(self.used)

    def _further(self, position, count):
        slot, wrap = position
        slot += count
        return (slot - self.place.size, wrap ^ 1) if slot >= self.place.size else (slot, wrap)

    def _entry(self, position):
        return ENTRY.unpack_from(self.memory.pieces[self.place.piece], self.place.desc + 16 * position[0])

    def _is_available(self, position):
        """2.8.1: AVAIL equals the wrap counter and USED does not."""
        flags = self._entry(position)[3]
        return bool(flags & F_AVAIL) == bool(position[1]) != bool(flags & F_USED)

    def available(self):
        """A packed ring does not tell how many chains wait, only whether one does."""
        return len(self.again) or int(self._is_available(self.avail))

    def look(self):
        """The next chain, which stays where it is. Raises: Broken, Missing."""
        if self.again:
            head, descriptors = self.again[0]
        else:
            head, descriptors, position = None, [], self.avail
            while not descriptors or descriptors[-1][3] & F_NEXT:
                if len(descriptors) == self.place.size:
                    raise Broken("CHAIN_TOO_LONG")
                descriptors.append(self._entry(position))
                position = self._further(position, 1)
        buffers = walk_packed(self.memory, self.place.size, descriptors, self.place.indirect)
        return Chain(head, buffers, descriptors)

    def _state(self, index):
        return list(STATE.unpack_from(self.inflight, 32 + 32 * index))

    def _set_state(self, index, state):
        STATE.pack_into(self.inflight, 32 + 32 * index, *state)

    def _head(self):
        return list(HEAD.unpack_from(self.inflight))

    def _set_head(self, head):
        HEAD.pack_into(self.inflight, 0, *head)

    def take(self, chain):
        if self.again:
            self.again.pop(0)
            return
        region = self._head()
        chain.head = region[4]
        for position, (address, length, buffer_id, flags) in enumerate(chain.descriptors):
            index = region[3]
            state = self._state(index)
            state[5:] = buffer_id, flags, length, address
            self._set_state(index, state)
            region[3] = state[1]
            if position == len(chain.descriptors) - 1:
                first = self._state(chain.head)
                first[0], first[2:5] = 1, (index, len(chain.descriptors), self.counter)
                self._set_state(chain.head, first)
        self.counter += 1
        region[4] = region[3]
        self._set_head(region)
        self.avail = self._further(self.avail, len(chain.descriptors))

    def give_back(self, chain, written):
        """One used descriptor for the chain, in its first slot in order (2.8.6), which the driver sees at once."""
        region = self._head()
        state = self._state(chain.head)
        tail = self._state(state[2])
        tail[1] = region[3]
        self._set_state(state[2], tail)
        offset = self.place.desc + 16 * self.used[0]
        flags = (F_AVAIL | F_USED if self.used[1] else 0) | (F_WRITE if written else 0)
        buffer_id = chain.descriptors[-1][2]
        self.memory.pack("<IHH", self.place.piece, offset + 8, written & 0xFFFFFFFF, buffer_id, flags)
        if self.place.log_gpa is not None:
            self.memory.mark(self.place.piece, offset, 16)
        self.used = self._further(self.used, len(chain.descriptors))
        self.inflight[32 + 32 * chain.head] = 0
        slot, wrap = self.used
        self._set_head([*region[:3], chain.head, chain.head, slot, slot, wrap, wrap])

    def publish(self):
        """Nothing: it is public."""

    def used_since(self):
        return self.used != self.decided

    def call_wanted(self):
        """2.8.14: whether the event's position is among those used since the last decision."""
        event, flags = self.memory.unpack("<HH", self.place.piece, self.place.avail)
        if flags & 3 == DISABLE:
            return False
        if flags & 3 != DESC or not self.place.event_idx or self.must_call:
            return True
        size = self.place.size
        if event & 0x7FFF >= size:
            return True
        # Positions numbered over two turns; what was used is a range of them that ends before `used`.
        distance = (self._turn(self.used) - self._turn((event & 0x7FFF, event >> 15))) % (2 * size)
        return 0 < distance <= (self._turn(self.used) - self._turn(self.decided)) % (2 * size)

    def _turn(self, position):
        return position[0] + (0 if position[1] else self.place.size)

    def forget_used(self):
        self.decided = self.used

    def want_kicks(self):
        """Returns whether there is work already."""
        place = self.place
        if place.event_idx:
            self.memory.pack("<HH", place.piece, place.used, self.last_avail_idx, DESC)
        else:
            self.memory.pack("<H", place.piece, place.used + 2, ENABLE)
        self.mark_used(0, 4)
        return self._is_available(self.avail) or bool(self.again)

    def refuse_kicks(self):
        self.memory.pack("<H", self.place.piece, self.place.used + 2, DISABLE)
        self.mark_used(0, 4)

    def resume(self, base):
        """Go on where a former device ended, as the inflight region tells; at `base` when there was none."""
        region = self._head()
        size = self.place.size
        if region[1] == 0:
            if base & 0x7FFF >= size:
                raise Broken("RING_BASE")
            for index in range(size):
                state = self._state(index)
                state[:2] = 0, index + 1
                self._set_state(index, state)
            slot, wrap = base & 0x7FFF, base >> 15
            region = [region[0], 1, size, 0, 0, slot, slot, wrap, wrap]
        else:
            _, _, _, free, old_free, slot, old_slot, wrap, old_wrap = region
            if (slot, wrap) != (old_slot, old_wrap) and not self._is_available((old_slot, old_wrap)):
                old_free, old_slot, old_wrap = free, slot, wrap
            region[3:] = old_free, old_free, old_slot, old_slot, old_wrap, old_wrap
        self._set_head(region)
        free = region[3]
        while free < size:
            state = self._state(free)
            state[0] = 0
            self._set_state(free, state)
            free = state[1]
        self.used = self.decided = region[5], region[7]
        inflight = sorted((state[4], index) for index in range(size) if (state := self._state(index))[0])
        self.again = [(index, self._listed(index)) for _, index in inflight]
        self.counter = inflight[-1][0] + 1 if inflight else 0
        self.avail = self._further(self.used, sum(len(descriptors) for _, descriptors in self.again))

    def _listed(self, index):
        descriptors = []
        for _ in range(self._state(index)[3]):
            state = self._state(index)
            descriptors.append((state[8], state[7], state[5], state[6]))
            index = state[1]
        return descriptors
