"""The translations that a front-end gave (docs/interop/vhost-user.rst, "IOMMU support")."""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass

#: Entries kept; the oldest beyond that are forgotten, and asked for again when they are needed.
ENTRIES_MAX = 16384


@dataclass(frozen=True, slots=True)
class Translation:
    """`size_bytes` from driver address `iova` on are at user address `uva`; access: kernels.virtio_layout.ACCESS_*."""

    iova: int
    size_bytes: int
    uva: int
    access: int

    @property
    def end(self) -> int:
        """The first address behind it."""
        return self.iova + self.size_bytes


class Iotlb:
    """Translations by driver address; none overlaps another."""

    def __init__(self) -> None:
        self._entries: dict[int, Translation] = {}  # by iova, oldest first
        self._starts: list[int] = []

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Translation]:
        """In the order of their addresses."""
        return (self._entries[start] for start in self._starts)

    def update(self, entry: Translation) -> None:
        """Add a translation; what was known of its range before is forgotten."""
        self.invalidate(entry.iova, entry.size_bytes)
        self._add(entry)
        while len(self._entries) > ENTRIES_MAX:
            self._remove(next(iter(self._entries)))

    def invalidate(self, iova: int, size_bytes: int) -> None:
        """Forget a range; entries that reach out of it keep their rest."""
        end = iova + size_bytes
        first = max(0, bisect.bisect_right(self._starts, iova) - 1)
        last = bisect.bisect_left(self._starts, end)
        for start in self._starts[first:last]:
            entry = self._entries[start]
            if entry.end <= iova:
                continue
            self._remove(start)
            if entry.iova < iova:
                self._add(Translation(entry.iova, iova - entry.iova, entry.uva, entry.access))
            if entry.end > end:
                self._add(Translation(end, entry.end - end, entry.uva + end - entry.iova, entry.access))

    def replaces(self, new: Translation) -> bool:
        """Whether an update would lead an address elsewhere than until now, or with less access."""
        first = max(0, bisect.bisect_right(self._starts, new.iova) - 1)
        last = bisect.bisect_left(self._starts, new.end)
        before = [self._entries[start] for start in self._starts[first:last]]
        return any(
            entry.end > new.iova and (entry.uva - entry.iova != new.uva - new.iova or entry.access & ~new.access)
            for entry in before
        )

    def find(self, iova: int) -> Translation | None:
        """The translation of one address."""
        place = bisect.bisect_right(self._starts, iova) - 1
        if place < 0:
            return None
        entry = self._entries[self._starts[place]]
        return entry if iova < entry.end else None

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._starts.clear()

    def _add(self, entry: Translation) -> None:
        self._entries[entry.iova] = entry
        bisect.insort(self._starts, entry.iova)

    def _remove(self, start: int) -> None:
        del self._entries[start]
        del self._starts[bisect.bisect_left(self._starts, start)]
