"""What a virtio block device does with a request (virtio 1.2, 5.2.6), on an image that is a bytearray."""

import struct

from tests.model.guest_memory import Broken, Segment

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES = 0, 1, 4, 8, 11, 13
OK, IOERR, UNSUPP = 0, 1, 2
SECTOR = 512
RANGES_MAX = 256
SERIAL_BYTES = 20


class Failed(Exception):
    """The request ends with this status (args[0])."""


class BlockModel:
    """Serves a model ring. serial: 20 bytes. can_discard, can_write_zeroes: what was offered.

    footprint: Footprint that notes what requests read and write.
    """

    def __init__(self, image, serial, *, read_only=False, can_discard=True, can_write_zeroes=True):
        self.image, self.serial, self.read_only = image, serial, read_only
        self.can_discard, self.can_write_zeroes = can_discard, can_write_zeroes
        self.statuses = {OK: 0, IOERR: 0, UNSUPP: 0}
        self.footprint = None

    def serve_one(self, ring):
        """Look at the next chain, do what it says, give it back. Raises: Broken, Missing."""
        memory = ring.memory
        chain = ring.look()
        segments, readable = chain.buffers.segments, chain.buffers.readable
        writable = segments[readable:]
        if self.footprint is not None:
            self._note(chain.buffers)
        if not writable or writable[-1].piece < 0:
            raise Broken("NO_STATUS")
        ring.take(chain)
        *writable, last = writable
        status_at = last.offset + last.length - 1
        if last.length > 1:
            writable.append(last._replace(length=last.length - 1))
        written = 0
        try:
            if not chain.buffers.clean:
                raise Failed(IOERR)
            sent = b"".join(bytes(memory.pieces[s.piece][s.offset : s.offset + s.length]) for s in segments[:readable])
            written = self.perform(memory, sent, writable)
            status = OK
        except Failed as failed:
            status = failed.args[0]
        self.statuses[status] += 1
        memory.pieces[last.piece][status_at] = status
        for segment in segments[readable:]:
            memory.mark(*segment)
        ring.give_back(chain, written + 1)

    def _note(self, buffers):
        self.footprint.next_request()
        for span in (*buffers.tables, *buffers.segments[: buffers.readable]):
            self.footprint.read(*span)
        for span in buffers.segments[buffers.readable :]:
            self.footprint.write(*span)

    def perform(self, memory, sent, writable):
        """Returns the bytes written into guest memory. Raises: Failed."""
        if len(sent) < 16:
            raise Failed(IOERR)
        kind, sector = struct.unpack_from("<IxxxxQ", sent)
        data = sent[16:]
        if kind == IN:
            return self._read(memory, writable, sector)
        if kind == OUT:
            self._check(sector, len(data))
            if self.read_only:
                raise Failed(IOERR)
            self.image[sector * SECTOR : sector * SECTOR + len(data)] = data
        elif kind == GET_ID:
            return put(memory, writable, self.serial)
        elif kind == DISCARD and self.can_discard:
            self._ranges(data, 0)
        elif kind == WRITE_ZEROES and self.can_write_zeroes:
            self._ranges(data, 1)
        elif kind != FLUSH:
            raise Failed(UNSUPP)
        return 0

    def _check(self, sector, length):
        if length % SECTOR or sector + length // SECTOR > len(self.image) // SECTOR:
            raise Failed(IOERR)

    def _read(self, memory, writable, sector):
        length = sum(segment.length for segment in writable)
        self._check(sector, length)
        return put(memory, writable, bytes(self.image[sector * SECTOR : sector * SECTOR + length]))

    def _ranges(self, data, flags_known):
        """Each range in turn; a bad one ends the request, those before it are done."""
        if not data or len(data) % 16 or len(data) // 16 > RANGES_MAX:
            raise Failed(IOERR)
        for sector, sectors, flags in struct.iter_unpack("<QII", data):
            if flags & ~flags_known:
                raise Failed(UNSUPP)
            self._check(sector, sectors * SECTOR)
            self.image[sector * SECTOR : (sector + sectors) * SECTOR] = bytes(sectors * SECTOR)


def put(memory, writable, data):
    """Write `data` into the segments, as far as they reach. Returns how much that was."""
    written = 0
    for piece, offset, length in map(Segment._make, writable):
        part = data[written : written + length]
        memory.pieces[piece][offset : offset + len(part)] = part
        written += len(part)
    return written
