"""What a batch of requests reads and writes in guest memory: whether its outcome depends on an order.

Virtio promises none between requests that are under way, nor when a used element is seen (1.2, 2.7.8, 2.8.6).
"""

#: Instead of a request: what the device reads and writes of the ring at any time.
RING = -1


class Footprint:
    """The bytes that the requests of one batch read and write."""

    def __init__(self, place, packed):
        self._spans = []
        self._request = RING
        entries, used = place.size, 4 if packed else 6 + 8 * place.size
        self.read(place.piece, place.desc, 16 * entries)
        self.read(place.piece, place.avail, 4 if packed else 6 + 2 * entries)
        self.write(place.piece, place.used, used)
        if packed:
            self.write(place.piece, place.desc, 16 * entries)
        self._request = 0

    def next_request(self):
        self._request += 1

    def read(self, piece, offset, length):
        self._add(piece, offset, length, False)

    def write(self, piece, offset, length):
        self._add(piece, offset, length, True)

    def _add(self, piece, offset, length, written):
        if piece >= 0 and length:
            self._spans.append((piece, offset, offset + length, self._request, written))

    def depends_on_order(self):
        """Whether one request, or the ring, writes what another one reads or writes."""
        live = []
        for span in sorted(self._spans):
            piece, start, _, request, written = span
            live = [other for other in live if other[0] == piece and other[2] > start]
            if any(other[3] != request and (written or other[4]) for other in live):
                return True
            live.append(span)
        return False
