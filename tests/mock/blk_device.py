"""The device's side of a virtio-blk split ring in plain Python (virtio 1.2, 2.7 and 5.2.6), able to lie on purpose."""

import struct

F_NEXT, F_WRITE, F_INDIRECT = 1, 2, 4
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPP = 0, 1, 2


class BlkDevice:
    """Serves one ring from `ram` (a writable buffer, guest-physical 0 first). Addresses are guest-physical.

    Hooks: `status(kind, sector)` gives the status byte, or None to write none; `used(head, written)` gives the used
    elements to write; `jump` is added to used.idx; `delivers` False: data that was read is not written to memory.
    `choose(taken)` gives the heads to complete now, in which order; the others stay in `taken`. `inflight`: a
    SplitRegion that is kept, and says where to go on; what it says was under way is done first.
    `serial`: what GET_ID tells.
    """

    def __init__(self, ram, image, desc, avail, used, size, event_idx=False, start=0, inflight=None):
        self.ram, self.image, self.size = ram, image, size
        # One store for each index: struct.pack_into zeroes a field before it fills it, which the driver would see.
        self._words = memoryview(ram).cast("H")
        self.desc, self.avail, self.used_ring, self.event_idx = desc, avail, used, event_idx
        self.last_avail = self.used_idx = start
        self.status = lambda kind, sector: OK
        self.used = lambda head, written: [(head, written)]
        self.jump = 0
        self.delivers = True
        self.serial = b"mock-disk"
        self.choose = list
        self.taken = []
        self.log = []
        self.inflight = inflight
        if inflight:
            self.used_idx = self._words[(self.used_ring + 2) // 2]
            self.taken = inflight.resume(size, self.used_idx)
            self.last_avail = (self.used_idx + len(self.taken)) & 0xFFFF

    def _get(self, layout, gpa):
        values = struct.unpack_from(layout, self.ram, gpa)
        return values[0] if len(values) == 1 else values

    def _put(self, layout, gpa, *values):
        self.ram[gpa : gpa + struct.calcsize(layout)] = struct.pack(layout, *values)

    def take(self):
        """Take every chain that is available into `taken`; returns how many there were."""
        idx = self._words[(self.avail + 2) // 2]
        count = 0
        while self.last_avail != idx:
            head = self._get("<H", self.avail + 4 + 2 * (self.last_avail % self.size))
            if self.inflight:
                self.inflight.note_taken(head)
            self.taken.append(head)
            self.last_avail = (self.last_avail + 1) & 0xFFFF
            count += 1
        if self.event_idx:
            self._words[(self.used_ring + 4 + 8 * self.size) // 2] = self.last_avail
        return count

    def _chain(self, head):
        table, index, chain = self.desc, head, []
        while True:
            gpa, length, flags, following = self._get("<QIHH", table + 16 * index)
            if flags & F_INDIRECT:
                assert table == self.desc
                assert not chain
                assert length % 16 == 0
                table, index = gpa, 0
                continue
            chain.append((gpa, length, bool(flags & F_WRITE)))
            assert len(chain) <= self.size
            if not flags & F_NEXT:
                return chain
            index = following

    def complete(self, head):
        """Do the request at `head` and write its used elements; `publish` shows them."""
        chain = self._chain(head)
        (header, header_bytes, header_writable), *data, (status_gpa, status_bytes, status_writable) = chain
        assert (header_bytes, header_writable, status_bytes, status_writable) == (16, False, 1, True)
        kind, _, sector = self._get("<IIQ", header)
        assert self.ram[status_gpa] == 0xFF, "the driver must not find an old status"
        code = self.status(kind, sector)
        self.log.append((kind, sector, sum(part[1] for part in data)))
        written = 1
        offset = sector * 512
        for gpa, length, writable in data if code == OK else ():
            assert writable == (kind != OUT)
            if kind == OUT:
                self.image[offset : offset + length] = self.ram[gpa : gpa + length]
            else:
                content = self.serial.ljust(20, b"\0") if kind == GET_ID else self.image[offset : offset + length]
                if self.delivers:
                    self.ram[gpa : gpa + length] = content
                written += length
            offset += length
        if code is not None:
            self.ram[status_gpa] = code
        for element in self.used(head, written):
            self._put("<II", self.used_ring + 4 + 8 * (self.used_idx % self.size), *element)
            self.used_idx = (self.used_idx + 1) & 0xFFFF

    def publish(self):
        self._words[(self.used_ring + 2) // 2] = (self.used_idx + self.jump) & 0xFFFF

    def serve(self):
        """Take and complete all there is; returns how many. Looks again after avail_event was written (2.7.10)."""
        total = 0
        while self.take() or (total == 0 and self.taken):
            batch = self.choose(self.taken)
            for head in batch:
                self.complete(head)
                self.taken.remove(head)
            if self.inflight:
                self.inflight.note_used(batch)
            self.publish()
            if self.inflight:
                self.inflight.note_published(batch, self.used_idx)
            if not batch:
                break
            total += len(batch)
        return total
