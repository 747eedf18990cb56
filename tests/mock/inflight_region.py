"""A split vring's part of an inflight region (docs/interop/vhost-user.rst, "Inflight I/O tracking"), by struct."""

import struct

HEAD = struct.Struct("<QHHHH")  # features, version, desc_num, last_batch_head, used_idx
STATE = struct.Struct("<B5xHQ")  # inflight, next, counter
ALIGN = 64


def part_bytes(queue_size):
    return -(-(HEAD.size + STATE.size * queue_size) // ALIGN) * ALIGN


class SplitRegion:
    """The part at `start` of a writable buffer."""

    def __init__(self, buffer, start=0):
        self._buffer, self._start = buffer, start
        self._counter = 0

    def head(self):
        """(features, version, desc_num, last_batch_head, used_idx)."""
        return HEAD.unpack_from(self._buffer, self._start)

    def _set_head(self, desc_num, last_batch_head, used_idx):
        HEAD.pack_into(self._buffer, self._start, 0, 1, desc_num, last_batch_head, used_idx)

    def _state(self, index):
        return STATE.unpack_from(self._buffer, self._start + HEAD.size + STATE.size * index)

    def _set_state(self, index, *values):
        STATE.pack_into(self._buffer, self._start + HEAD.size + STATE.size * index, *values)

    def inflight(self):
        """Heads that are under way, as they were taken."""
        states = [(self._state(index), index) for index in range(self.head()[2])]
        return [index for state, index in sorted(states, key=lambda item: item[0][2]) if state[0]]

    def resume(self, size, used_idx):
        """The heads that a former back-end left, in their order."""
        _, version, desc_num, batch_head, known_idx = self.head()
        if version == 0:
            self._set_head(size, 0, used_idx)
            return []
        assert (version, desc_num) == (1, size)
        for _ in range((used_idx - known_idx) & 0xFFFF):
            _, following, counter = self._state(batch_head)
            self._set_state(batch_head, 0, following, counter)
            batch_head = following
        self._set_head(size, self.head()[3], used_idx)
        heads = self.inflight()
        self._counter = 1 + max((self._state(index)[2] for index in heads), default=-1)
        return heads

    def note_taken(self, index):
        self._set_state(index, 1, self._state(index)[1], self._counter)
        self._counter += 1

    def note_used(self, batch):
        _, _, size, last, used_idx = self.head()
        for index in batch:
            inflight, _, counter = self._state(index)
            self._set_state(index, inflight, last, counter)
            last = index
        self._set_head(size, last, used_idx)

    def note_published(self, batch, used_idx):
        for index in batch:
            self._set_state(index, 0, *self._state(index)[1:])
        _, _, size, last, _ = self.head()
        self._set_head(size, last, used_idx)
