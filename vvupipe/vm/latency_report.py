"""Latencies from a log-linear histogram (kernels.histogram): percentiles, and a picture of it in text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kernels.driver_layout import SUB_BITS
from vvupipe.units import human_ns

PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
_BAR_WIDTH = 40
_RARE = 1e-4
_EIGHTHS = " ▏▎▍▌▋▊▉"


def bucket_start(index: int) -> int:
    """The smallest duration in ns that falls into a bucket."""
    if index < 1 << SUB_BITS:
        return index
    shift = (index >> SUB_BITS) - 1
    return int(((index & ((1 << SUB_BITS) - 1)) | (1 << SUB_BITS)) << shift)


@dataclass(frozen=True, slots=True)
class Latency:
    """The distribution of latencies of one kind of request."""

    counts: Sequence[int]  #: for each bucket
    sum_ns: int
    min_ns: int
    max_ns: int

    @property
    def total(self) -> int:
        """Requests counted."""
        return sum(self.counts)

    @property
    def mean_ns(self) -> float:
        """Mean; 0 without requests."""
        return self.sum_ns / self.total if self.total else 0.0

    def percentile_ns(self, percent: float) -> int:
        """The latency that `percent` of the requests did not exceed, to the middle of a bucket (about 1.5 %)."""
        wanted = self.total * percent / 100
        seen = 0
        for index, count in enumerate(self.counts):
            seen += count
            if count and seen >= wanted:
                middle = (bucket_start(index) + bucket_start(index + 1) - 1) // 2
                return max(self.min_ns, min(middle, self.max_ns))
        return 0

    def as_dict(self) -> dict[str, float]:
        """For --json: nanoseconds."""
        names = {f"p{percent:g}": self.percentile_ns(percent) for percent in PERCENTILES}
        return {"mean": round(self.mean_ns, 1), "min": self.min_ns, "max": self.max_ns, **names}

    def rows(self) -> list[tuple[int, int]]:
        """(start in ns, count) of the octaves, lowest first; rare ones (0.01 %) at the ends are joined."""
        octaves: dict[int, int] = {}
        for index, count in enumerate(self.counts):
            if count:
                start = 1 << max(0, bucket_start(index).bit_length() - 1)
                octaves[start] = octaves.get(start, 0) + count
        if not octaves:
            return []
        start, rows = min(octaves), []
        while start <= max(octaves):
            rows.append((start, octaves.get(start, 0)))
            start *= 2
        rare = self.total * _RARE
        # Rare rows join each other, never a common one: its bar would then stand at the wrong place.
        while len(rows) > 1 and max(rows[0][1], rows[1][1]) < rare:
            rows[:2] = [(rows[0][0], rows[0][1] + rows[1][1])]
        while len(rows) > 1 and max(rows[-1][1], rows[-2][1]) < rare:
            rows[-2:] = [(rows[-2][0], rows[-2][1] + rows[-1][1])]
        return rows

    def picture(self) -> list[str]:
        """One line for each row: from where on, its share, a bar."""
        rows = self.rows()
        most = max((count for _, count in rows), default=0)
        lines = []
        for start, count in rows:
            share = 100 * count / self.total
            percent = "" if not count else "<0.01 %" if share < 0.005 else f"{share:.2f} %"
            lines.append(f"from {human_ns(start):>8}  {percent:>8}  {_bar(count / most)}".rstrip())
        return lines


def _bar(share: float) -> str:
    eighths = round(share * _BAR_WIDTH * 8)
    return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()
