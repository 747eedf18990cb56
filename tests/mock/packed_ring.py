"""A driver's side of a packed virtqueue in plain Python (virtio 1.2, 2.8), with the interface of driver_ring."""

from tests.mock.driver_ring import F_INDIRECT, F_NEXT, F_WRITE, DriverRing

F_AVAIL, F_USED = 1 << 7, 1 << 15
EVENT_ENABLE, EVENT_DISABLE, EVENT_DESC = 0, 1, 2


class PackedRing(DriverRing):
    """A chain is a list of (gpa, length, writable); its buffer id is the slot of its first descriptor."""

    START = 0x8000  # the base of a fresh ring: slot 0, wrap counter 1

    def __init__(self, memory, size=16, event_idx=False):
        super().__init__(memory, size, event_idx)
        self.wrap = 1
        self.used_slot, self.used_wrap = 0, 1
        self._lengths = {}
        self._heads = []
        self.memory.pack("<HH", self.avail, 0, EVENT_ENABLE)

    def _put(self, slot, gpa, length, flags, buffer_id, wrap):
        """The flags last, as a driver does, so that the device sees a whole descriptor."""
        flags |= (F_AVAIL if wrap else 0) | (0 if wrap else F_USED)
        self.memory.pack("<QIH", self.desc + 16 * slot, gpa, length, buffer_id)
        return self.desc + 16 * slot + 14, flags

    def put_chain(self, chain):
        """Write a chain; `make_available` shows it. Returns its buffer id."""
        first = self.next_desc
        pending = []
        slot, wrap = first, self.wrap
        for position, (gpa, length, writable) in enumerate(chain):
            last = position == len(chain) - 1
            flags = (F_WRITE if writable else 0) | (0 if last else F_NEXT)
            pending.append(self._put(slot, gpa, length, flags, first, wrap))
            slot += 1
            if slot == self.size:
                slot, wrap = 0, wrap ^ 1
        self.next_desc, self.wrap = slot, wrap
        self._lengths[first] = len(chain)
        self._heads.append(pending)
        return first

    def put_indirect(self, chain):
        table = self.memory.allocate(16 * len(chain))
        for index, (gpa, length, writable) in enumerate(chain):
            self.memory.pack("<QIHH", table + 16 * index, gpa, length, 0, F_WRITE if writable else 0)
        slot = self.next_desc
        pending = [self._put(slot, table, 16 * len(chain), F_INDIRECT, slot, self.wrap)]
        self.next_desc += 1
        if self.next_desc == self.size:
            self.next_desc, self.wrap = 0, self.wrap ^ 1
        self._lengths[slot] = 1
        self._heads.append(pending)
        return slot

    def make_available(self, *heads):
        pending, self._heads = self._heads, []
        for chain in pending:
            for place, flags in reversed(chain):
                self.memory.pack("<H", place, flags)

    def _used(self):
        length, buffer_id, flags = self.memory.unpack("<IHH", self.desc + 16 * self.used_slot + 8)
        is_used = bool(flags & F_AVAIL) == bool(flags & F_USED) == bool(self.used_wrap)
        return (buffer_id, length) if is_used else None

    def used_idx(self):
        return self.seen_used + (self._used() is not None)

    def wait_used(self, timeout_s=10):
        while (element := self._used()) is None:
            if not self.wait_call(timeout_s) and self._used() is None:
                raise TimeoutError("the device used nothing")
        self.used_slot += self._lengths.pop(element[0])
        if self.used_slot >= self.size:
            self.used_slot -= self.size
            self.used_wrap ^= 1
        if self.event_idx:
            self.memory.pack("<HH", self.avail, self.used_slot | self.used_wrap << 15, EVENT_DESC)
        return element

    def position(self):
        """Where the next chain goes, as a ring base."""
        return self.next_desc | self.wrap << 15

    def set_position(self, slot, wrap):
        """Start at a slot, as after a migration."""
        self.next_desc = self.used_slot = slot
        self.wrap = self.used_wrap = wrap
        for index in range(self.size):
            # What lies ahead belongs to the driver still: neither available nor used with these wrap counters.
            old = wrap ^ 1 if index >= slot else wrap
            flags = (F_AVAIL | F_USED) if old else 0
            self.memory.pack("<H", self.desc + 16 * index + 14, flags)

    def event(self):
        """(slot and wrap counter, flags) of the device's event suppression."""
        return self.memory.unpack("<HH", self.used)
