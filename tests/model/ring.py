"""What both layouts of a virtqueue share, from the device's side."""

import dataclasses


@dataclasses.dataclass
class Place:
    """Where a ring lies: `piece` of the guest memory and the offsets of its three parts in it, and what was negotiated.

    log_gpa: where writes to the used ring are logged; None: they are not.
    """

    piece: int
    desc: int
    avail: int
    used: int
    size: int
    event_idx: bool = False
    indirect: bool = True
    log_gpa: int | None = None


@dataclasses.dataclass
class Chain:
    """A chain in the device's hands. head: descriptor (split) or entry of the inflight region (packed)."""

    head: int
    buffers: object
    descriptors: list = dataclasses.field(default_factory=list)


class DeviceRing:
    """One virtqueue of a device that serves its chains in order.

    inflight: bytearray of the ring's part of an inflight region (docs/interop/vhost-user.rst), or None.
    """

    def __init__(self, memory, place, inflight=None):
        self.memory, self.place, self.inflight = memory, place, inflight
        self.again = []  # chains that a former device took and did not finish, oldest first
        self.counter = 0
        self.calls = 0
        self.must_call = False  # what was decided last is not known: the device started again

    def mark_used(self, offset, length):
        if self.place.log_gpa is not None:
            self.memory.mark_physical(self.place.log_gpa + offset, length)

    def call_if_wanted(self):
        """2.7.7, 2.7.10, 2.8.14: decide about everything used since the last decision."""
        if not self.must_call and not self.used_since():
            return False
        wanted = self.call_wanted()
        self.forget_used()
        self.must_call = False
        self.calls += wanted
        return wanted
