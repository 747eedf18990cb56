"""A driver's side of a split virtqueue in plain Python (virtio 1.2, 2.7), able to break every rule on purpose."""

import os
import select

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4


class DriverRing:
    """A vring of `size` entries in `memory`; a chain is a list of (gpa, length, writable)."""

    def __init__(self, memory, size=16, event_idx=False):
        self.memory, self.size, self.event_idx = memory, size, event_idx
        self.desc = memory.allocate(16 * size, 16)
        self.avail = memory.allocate(6 + 2 * size, 2)
        self.used = memory.allocate(6 + 8 * size, 4)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.next_desc = 0
        self.avail_idx = 0
        self.seen_used = 0

    def close(self):
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    def put_desc(self, index, gpa, length, flags, following=0, table=None):
        self.memory.pack("<QIHH", (self.desc if table is None else table) + 16 * index, gpa, length, flags, following)

    def put_chain(self, chain):
        """Write a chain into the next free descriptors; returns its head. Descriptors are never reclaimed by it."""
        head = self.next_desc
        for position, (gpa, length, writable) in enumerate(chain):
            index = (head + position) % self.size
            last = position == len(chain) - 1
            flags = (F_WRITE if writable else 0) | (0 if last else F_NEXT)
            self.put_desc(index, gpa, length, flags, 0 if last else (index + 1) % self.size)
        self.next_desc = (head + len(chain)) % self.size
        return head

    def put_indirect(self, chain):
        """Write a chain into an indirect table; returns the head."""
        table = self.memory.allocate(16 * len(chain))
        for index, (gpa, length, writable) in enumerate(chain):
            last = index == len(chain) - 1
            flags = (F_WRITE if writable else 0) | (0 if last else F_NEXT)
            self.put_desc(index, gpa, length, flags, 0 if last else index + 1, table)
        head = self.next_desc
        self.put_desc(head, table, 16 * len(chain), F_INDIRECT)
        self.next_desc = (head + 1) % self.size
        return head

    def make_available(self, *heads):
        for head in heads:
            self.memory.pack("<H", self.avail + 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.memory.pack("<H", self.avail + 2, self.avail_idx)

    def kick(self):
        os.eventfd_write(self.kick_fd, 1)

    def used_idx(self):
        return self.memory.unpack("<H", self.used + 2)

    def set_used_event(self, index):
        self.memory.pack("<H", self.avail + 4 + 2 * self.size, index)

    def avail_event(self):
        return self.memory.unpack("<H", self.used + 4 + 8 * self.size)

    def set_index(self, index):
        """Start both rings at `index`, as after a migration."""
        self.avail_idx = self.seen_used = index
        self.memory.pack("<H", self.avail + 2, index)
        self.memory.pack("<H", self.used + 2, index)

    def wait_call(self, timeout_s=10):
        """True when the device called in time."""
        if not select.select([self.call_fd], [], [], timeout_s)[0]:
            return False
        os.eventfd_read(self.call_fd)
        return True

    def broken(self, timeout_s=10):
        """True when the device rang the err eventfd in time."""
        return bool(select.select([self.err_fd], [], [], timeout_s)[0])

    def wait_used(self, timeout_s=10):
        """The next used element as (id, length). Raises TimeoutError."""
        while self.used_idx() == self.seen_used:
            if not self.wait_call(timeout_s) and self.used_idx() == self.seen_used:
                raise TimeoutError("the device used nothing")
        element = self.memory.unpack("<II", self.used + 4 + 8 * (self.seen_used % self.size))
        self.seen_used = (self.seen_used + 1) & 0xFFFF
        if self.event_idx:
            self.set_used_event(self.seen_used)
        return element
