"""The device's side of a split virtqueue (virtio 1.2, 2.7), with inflight tracking (vhost-user.rst)."""

import struct

from tests.model.chain import walk_split
from tests.model.guest_memory import Broken
from tests.model.ring import Chain, DeviceRing

NO_INTERRUPT = NO_NOTIFY = 1
HEAD = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
STATE = struct.Struct("<B5xHQ")  # inflight, next, counter


class SplitDevice(DeviceRing):
    """Indices run freely modulo 65536."""

    packed = False

    def __init__(self, memory, place, inflight=None, base=0):
        super().__init__(memory, place, inflight)
        self.last_avail_idx = self.used_idx = self.decided_idx = base
        self.batch = []  # heads given back and not published

    def _get(self, offset):
        return struct.unpack_from("<H", self.memory.pieces[self.place.piece], offset)[0]

    def _put(self, offset, value):
        struct.pack_into("<H", self.memory.pieces[self.place.piece], offset, value)

    def available(self):
        """How many chains wait. Raises: Broken."""
        if self.again:
            return len(self.again)
        count = (self._get(self.place.avail + 2) - self.last_avail_idx) & 0xFFFF
        if count > self.place.size:
            raise Broken("AVAIL_IDX")
        return count

    def look(self):
        """The next chain, which stays where it is. Raises: Broken, Missing."""
        place = self.place
        head = self.again[0] if self.again else self._get(place.avail + 4 + 2 * (self.last_avail_idx % place.size))
        if head >= place.size:
            raise Broken("HEAD_INDEX")
        return Chain(head, walk_split(self.memory, (place.piece, place.desc), place.size, head, place.indirect))

    def take(self, chain):
        if self.again:
            self.again.pop(0)
            return
        if self.inflight is not None:
            following = STATE.unpack_from(self.inflight, 16 + 16 * chain.head)[1]
            STATE.pack_into(self.inflight, 16 + 16 * chain.head, 1, following, self.counter)
            self.counter += 1
        self.last_avail_idx = (self.last_avail_idx + 1) & 0xFFFF

    def give_back(self, chain, written):
        """A used element; with inflight tracking it is linked to the batch."""
        slot = self.used_idx % self.place.size
        self.memory.pack("<II", self.place.piece, self.place.used + 4 + 8 * slot, chain.head, written & 0xFFFFFFFF)
        self.mark_used(4 + 8 * slot, 8)
        self.used_idx = (self.used_idx + 1) & 0xFFFF
        self.batch.append(chain.head)
        if self.inflight is None:
            return
        _, _, _, last, _ = HEAD.unpack_from(self.inflight)
        inflight, _, counter = STATE.unpack_from(self.inflight, 16 + 16 * chain.head)
        STATE.pack_into(self.inflight, 16 + 16 * chain.head, inflight, last, counter)
        struct.pack_into("<H", self.inflight, 12, chain.head)

    def publish(self):
        self._put(self.place.used + 2, self.used_idx)
        if self.inflight is not None:
            # By the links, as who takes over does: a driver that has one head twice in a batch breaks them.
            _, _, _, head, _ = HEAD.unpack_from(self.inflight)
            for _ in self.batch:
                self.inflight[16 + 16 * head] = 0
                head = STATE.unpack_from(self.inflight, 16 + 16 * head)[1]
            struct.pack_into("<H", self.inflight, 14, self.used_idx)
        self.batch = []
        self.mark_used(2, 2)

    def used_since(self):
        return self.used_idx != self.decided_idx

    def call_wanted(self):
        place = self.place
        if not place.event_idx:
            return not self._get(place.avail) & NO_INTERRUPT
        if self.must_call:
            return True
        event = self._get(place.avail + 4 + 2 * place.size)
        return (event - self.decided_idx) & 0xFFFF < (self.used_idx - self.decided_idx) & 0xFFFF

    def forget_used(self):
        self.decided_idx = self.used_idx

    def want_kicks(self):
        """Returns whether there is work already."""
        place = self.place
        if place.event_idx:
            self._put(place.used + 4 + 8 * place.size, self.last_avail_idx)
            self.mark_used(4 + 8 * place.size, 2)
        else:
            self._put(place.used, 0)
            self.mark_used(0, 2)
        return self._get(place.avail + 2) != self.last_avail_idx or bool(self.again)

    def refuse_kicks(self):
        if not self.place.event_idx:
            self._put(self.place.used, NO_NOTIFY)
            self.mark_used(0, 2)

    def resume(self, base):
        """Go on where a former device ended: the used ring tells how many are used, the inflight region which not."""
        size = self.place.size
        self.used_idx = self.decided_idx = self._get(self.place.used + 2)
        heads = []
        if self.inflight is not None:
            features, version, _, batch_head, used_idx = HEAD.unpack_from(self.inflight)
            if version == 0:
                HEAD.pack_into(self.inflight, 0, features, 1, size, batch_head, self.used_idx)
            else:
                for _ in range((self.used_idx - used_idx) & 0xFFFF):
                    self.inflight[16 + 16 * batch_head] = 0
                    batch_head = STATE.unpack_from(self.inflight, 16 + 16 * batch_head)[1]
                struct.pack_into("<H", self.inflight, 14, self.used_idx)
            states = [(STATE.unpack_from(self.inflight, 16 + 16 * head), head) for head in range(size)]
            heads = sorted((counter, head) for (inflight, _, counter), head in states if inflight)
        self.again = [head for _, head in heads]
        self.counter = heads[-1][0] + 1 if heads else 0
        self.last_avail_idx = (self.used_idx + len(heads)) & 0xFFFF
