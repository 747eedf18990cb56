"""A kernel's ring and a model's ring on equal copies of guest memory, compared byte by byte after every step."""

import contextlib
import os
import struct

import numpy as np

from kernels import control_block as cb
from kernels import status, vring
from kernels.inflight_layout import PACKED_HEAD, PACKED_STATE, part_bytes
from kernels.request_record import SEGMENTS_MAX
from kernels.ring_record import RING
from tests.kernels.echo_device import KILLED, chain_buffers, echo, model_echo
from tests.kernels.interpreted import Fields
from tests.model.guest_memory import GuestMemory, Missing
from tests.model.packed_ring import PackedDevice
from tests.model.ring import Place
from tests.model.split_ring import SplitDevice

GUARD_BYTES = 64
UVA = 0x7000_0000_0000  # a front-end's address is UVA + the guest-physical one
RING_GPA = 0x10_0000
#: Buffers: two pieces that lie together in the guest only, one by itself, one at the very beginning.
BUFFER_LAYOUT = [(0x400_0000, 0x4000), (0x400_4000, 0x2000), (0x800_0000, 0x8000), (0, 0x1000)]
LOG_BYTES = (0x800_8000 >> 12) // 8 + 1

_ONE = np.ones(1, np.uint64)
ONE = np.uint64(_ONE.ctypes.data)
_SEGMENTS = np.zeros((2 * SEGMENTS_MAX, 2), np.uint64)
_COPIED = np.zeros((32768, 2), np.uint64)
_CHAINS, _SEEN = chain_buffers(32768, 1 << 19)


def ring_places(size, *, packed):
    """(offsets of descriptors, driver area and device area, bytes of all): the ring's piece, which starts with them."""
    desc_bytes = 16 * size
    avail_bytes, used_bytes = (4, 4) if packed else (6 + 2 * size, 6 + 8 * size)
    avail = desc_bytes
    used = -(-(avail + avail_bytes) // 4) * 4
    return 0, avail, used, -(-(used + used_bytes) // 4096) * 4096


class RingPair:
    """`memory` is the model's; a driver writes there, `sync` shows it to the kernel.

    rows: what an IOTLB says (guest_memory.Row), None without one.
    """

    def __init__(self, size, *, packed, event_idx, indirect=True, inflight=False, log=False, rows=None, base=None):
        desc, avail, used, room = ring_places(size, packed=packed)
        self.memory = GuestMemory([(RING_GPA, room), *BUFFER_LAYOUT], rows)
        self.place = Place(0, desc, avail, used, size, event_idx, indirect, RING_GPA + used if log else None)
        self.packed, self.base = packed, (0x8000 if packed else 0) if base is None else base
        if log:
            self.memory.log = bytearray(LOG_BYTES)
        self._lay_out()
        self._log = np.zeros(LOG_BYTES + GUARD_BYTES, np.uint8)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        bytes_inflight = part_bytes(size, packed=packed) if packed or inflight else 0
        self.model_inflight = bytearray(bytes_inflight) if bytes_inflight else None
        self.inflight_bytes = np.zeros(bytes_inflight // 8, np.uint64).view(np.uint8)
        self.tables()

    def close(self):
        os.close(self.call_fd)
        assert not self._log[LOG_BYTES:].any(), "wrote behind the dirty log"

    def _lay_out(self):
        """Both copies of all pieces in one buffer each, with guard bytes around every piece."""
        starts, end = [], GUARD_BYTES
        for piece in self.memory.pieces:
            starts.append(end)
            end += -(-len(piece) // 16) * 16 + GUARD_BYTES
        expected = bytearray(b"\xa5" * end)
        buffer = np.zeros(end + 16, np.uint8)
        skip = -buffer.ctypes.data % 16  # descriptors lie on 16 bytes
        self._kernel_bytes, self._model_bytes = buffer[skip : skip + end], np.frombuffer(expected, np.uint8)
        pieces = [
            memoryview(expected)[at : at + len(piece)] for at, piece in zip(starts, self.memory.pieces, strict=True)
        ]
        for piece in pieces:
            piece[:] = bytes(len(piece))
        self.memory.pieces = pieces
        self._addresses = [self._kernel_bytes.ctypes.data + at for at in starts]
        self._starts = starts

    def address(self, piece, offset):
        return self._addresses[piece] + offset if piece >= 0 else 0

    def kernel_piece(self, piece):
        """The kernel's copy of a piece."""
        start = self._starts[piece]
        return self._kernel_bytes[start : start + len(self.memory.pieces[piece])]

    def tables(self):
        """The kernel's region tables: the memory table, and what addresses of the driver mean."""
        self.table = np.array(
            sorted(
                (gpa, size, self.address(piece, 0), gpa + UVA, 3)
                for piece, (gpa, size) in enumerate(self.memory.layout)
            ),
            np.uint64,
        )
        self.regions = np.array(
            [
                (row.start, row.size, 0 if row.access & 4 else self.address(row.piece, row.offset), 0, row.access)
                for row in self.memory.rows
            ],
            np.uint64,
        ).reshape(-1, 5)

    def start(self, *, takes_over=False):
        """Start the ring on both sides, where `base` or its memory says. Returns the status of the kernel."""
        place = self.place
        self.rings = np.zeros(1, RING)
        self.record = np.zeros(1, cb.VRING)
        ring = self.rings[0]
        ring["record"] = self.record.ctypes.data
        ring["size"], ring["packed"], ring["iotlb"] = place.size, self.packed, 0
        ring["event_idx"], ring["indirect"] = place.event_idx, place.indirect
        ring["kick_fd"] = ring["err_fd"] = ring["log_fd"] = -1
        ring["call_fd"], ring["state"] = self.call_fd, cb.VRING_RUNNING
        ring["signalled_valid"] = not takes_over
        if len(self.inflight_bytes):
            ring["inflight"] = self.inflight_bytes.ctypes.data
        if self.memory.log is not None:
            ring["log_address"], ring["log_bytes"] = self._log.ctypes.data, LOG_BYTES
            ring["log_gpa"], ring["log_used"] = place.log_gpa, 1
        parts = (np.uint64(UVA + RING_GPA + part) for part in (place.desc, place.avail, place.used))
        assert vring.place_ring(ring, self.table, self.regions, *parts) == status.OK
        ring["iotlb"] = self.memory.iotlb
        self.sync()
        heads, counters = np.zeros(place.size, np.int64), np.zeros(place.size, np.uint64)
        code, count = vring.resume(ring, np.uint16(self.base), heads, counters)
        if code != status.OK:
            return code
        self._again = heads[:count][np.argsort(counters[:count], kind="stable")]
        ring["resubmit"] = self._again.ctypes.data
        kind = PackedDevice if self.packed else SplitDevice
        self.model = kind(self.memory, place, self.model_inflight, self.base)
        self.model.resume(self.base)
        self.model.must_call = takes_over
        self.model.calls = 0
        mine = [chain[0] for chain in self.model.again] if self.packed else self.model.again
        assert self._again.tolist() == mine, "what is done again"
        self.compare()
        return code

    def sync(self):
        """Show the kernel what the driver wrote."""
        self._kernel_bytes[:] = self._model_bytes

    def adopt(self):
        """Take the kernel's memory over into the model's, after a device of which there is no model did something."""
        self.check_guards()
        self._model_bytes[:] = self._kernel_bytes
        if self.model_inflight is not None:
            self.model_inflight[:] = self.inflight_bytes.tobytes()

    def model_inflight_word(self, offset):
        """(le16) of the model's inflight region."""
        return struct.unpack_from("<H", self.model_inflight, offset)

    def take_over_region(self):
        """The kernel gets the model's inflight region, as from a back-end of another make."""
        self.inflight_bytes[:] = np.frombuffer(self.model_inflight, np.uint8)

    def check_guards(self):
        """Nothing was written around the pieces of guest memory."""
        outside = np.ones(len(self._kernel_bytes), bool)
        for at, piece in zip(self._starts, self.memory.pieces, strict=True):
            outside[at : at + len(piece)] = False
        assert (self._kernel_bytes[outside] == 0xA5).all(), "wrote around guest memory"

    @property
    def ring_record(self):
        """The ring with attributes, for kernels that are interpreted."""
        return Fields(self.rings[0])

    def die_while_resuming(self, code, death):
        """Resume the ring by `code` (kernels.vring), which may raise `death`; the model gets what is left."""
        heads, counters = np.zeros(self.place.size, np.int64), np.zeros(self.place.size, np.uint64)
        with contextlib.suppress(death):
            code.resume(self.ring_record, np.uint16(self.base), heads, counters)
        self.adopt()

    def compare(self, *, one_by_one=True):
        """Everything that either side may have written, and what lies around it.

        one_by_one: chains were taken and given back in turn. If not, the entries that they had in a packed ring's
        inflight region are the kernel's choice; all must be free by now.
        """
        if not np.array_equal(self._kernel_bytes, self._model_bytes):
            where = np.flatnonzero(self._kernel_bytes != self._model_bytes)
            mine, expected = (side[where][:16].tobytes().hex() for side in (self._kernel_bytes, self._model_bytes))
            raise AssertionError(
                f"{len(where)} bytes differ, from {where[0]:#x} on (pieces start at {self._starts}, {self.place}):"
                f" kernel {mine}, model {expected}"
            )
        if self.memory.log is not None:
            assert self._log[:LOG_BYTES].tobytes() == self.memory.log, "dirty log"
        if self.model_inflight is not None and self.packed and not one_by_one:
            self._check_all_free()
        elif self.model_inflight is not None:
            assert self.inflight_bytes.tobytes() == self.model_inflight, "inflight region"
        ring = self.rings[0]
        assert (ring["last_avail_idx"], ring["used_idx"]) == (self.model.last_avail_idx, self.model.used_idx)
        assert int(ring["calls"]) == self.model.calls, "calls"
        assert ring["resubmit_count"] - ring["resubmit_next"] == len(self.model.again)

    def echo(self, limit, group=1, ends_at=-1):
        """Serve up to `limit` chains on both sides. Returns (chains served or looked at, outcome of the model)."""
        looked, code, rows = echo(
            self.rings[0], self.regions, self.table, _SEGMENTS, _COPIED, ONE, limit, group, ends_at, _CHAINS, _SEEN
        )
        chains, outcome = model_echo(self.model, limit, group, ends_at)
        expected = [
            (chain.head or 0, chain.buffers.readable, len(chain.buffers.segments), chain.buffers.clean)
            for chain in chains
        ]
        mine = _CHAINS[:looked]
        assert looked == len(chains), (code, outcome, looked, len(chains))
        if expected:
            wanted = np.array(expected, np.int64)
            columns = slice(1 if self.packed else 0, None)  # a packed chain has a head once it is taken
            assert np.array_equal(mine[:, columns], wanted[:, columns])
        segments = [
            (self.address(piece, offset), length)
            for chain in chains
            for piece, offset, length in chain.buffers.segments
        ]
        assert rows == len(segments)
        if segments:
            assert np.array_equal(_SEEN[:rows], np.array(segments, np.uint64)), "segments"
        if isinstance(outcome, Missing):
            assert code == status.MISS
            assert (int(self.record["miss_iova"][0]), int(self.record["miss_access"][0])) == outcome.args
        elif isinstance(outcome, str):
            assert code == getattr(status, f"ERR_{outcome}"), (code, outcome)
        else:
            assert code == (KILLED if outcome == KILLED else status.OK), (code, outcome)
        self.compare()
        return len(chains), outcome

    def echo_with_change(self, overwrite):
        """Serve one chain whose descriptors become `overwrite`, every one in the ring and in tables, after the look."""
        one, ring = ONE, self.rings[0]
        answer = vring.look_at_next(ring, self.regions, _SEGMENTS, _COPIED)
        chain = self.model.look()
        assert answer[0] == status.OK
        for piece, offset, room in ((0, self.place.desc, 16 * self.place.size), (3, 0, 0x8000)):
            changed = overwrite * (room // 16)
            self.memory.pieces[piece][offset : offset + room] = changed
        if not self.packed:
            self.memory.pieces[0][self.place.avail + 4 : self.place.avail + 4 + 2 * self.place.size] = (
                overwrite[:2] * self.place.size
            )
        self.sync()
        assert vring.take(ring, answer[1], _COPIED, 0) == status.OK
        self.model.take(chain)
        vring.give_back(ring, self.table, answer[1], np.uint64(7))
        self.model.give_back(chain, 7)
        vring.publish(ring, one)
        self.model.publish()
        self.compare()

    def _check_all_free(self):
        """No entry of a packed ring's inflight region is in use, every one is in the list of free ones, once."""
        head = self.inflight_bytes[: PACKED_HEAD.itemsize].view(PACKED_HEAD)[0]
        end = PACKED_HEAD.itemsize + self.place.size * PACKED_STATE.itemsize
        states = self.inflight_bytes[PACKED_HEAD.itemsize : end].view(PACKED_STATE)
        assert not states["inflight"].any()
        assert head["free_head"] == head["old_free_head"]
        for field in ("used_idx", "used_wrap_counter"):
            at = PACKED_HEAD.fields[field][1]
            assert head[field] == head[f"old_{field}"] == self.model_inflight[at], field
        free, at = [], int(head["free_head"])
        while len(free) < self.place.size:
            free.append(at)
            at = int(states[at]["next"])
        assert sorted(free) == list(range(self.place.size))

    def called(self):
        """Whether the driver was called since the last time it was asked for; both sides agree on how often."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def want_kicks(self):
        answer = bool(vring.want_kicks(self.rings[0]))
        assert answer == self.model.want_kicks()
        self.compare()
        return answer

    def refuse_kicks(self):
        vring.refuse_kicks(self.rings[0])
        self.model.refuse_kicks()
        self.compare()
