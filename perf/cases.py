"""What is measured: where the image lies, and what the front-end does with it."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

DEPTHS = (1, 8, 32, 128)
QUEUES = (2, 4)  # one queue is the case of the same depth without a number
Item = TypeVar("Item")
_SLEEPS_US, _POLLS_US, _SPINS_US = 0, 1_000_000, 200


@dataclass(frozen=True)
class Place:
    """Where an image lies and how it is opened."""

    name: str
    folder: Path
    direct: bool

    @property
    def title(self) -> str:
        """For reports."""
        return {"page-cache": "page cache (ext4)", "tmpfs": "tmpfs", "direct": "O_DIRECT on ext4"}[self.name]


@dataclass(frozen=True)
class Case:
    """One workload of the embedded sibling. block_bytes: of a request; depth: for each of `queues`."""

    place: str
    workload: str
    block_bytes: int
    depth: int
    queues: int = 1
    sleeps: bool = False  #: the front-end sleeps on its call eventfd at once instead of looking for answers

    @property
    def work(self) -> str:
        """Name without the place: 4k-randread-d32, 4k-randread-d1-sleeping, 4k-randread-d32-q4."""
        extra = ("-sleeping" if self.sleeps else "") + (f"-q{self.queues}" if self.queues > 1 else "")
        return f"{self.block_bytes >> 10}k-{self.workload}-d{self.depth}{extra}"

    @property
    def name(self) -> str:
        """PLACE/WORK."""
        return f"{self.place}/{self.work}"

    @property
    def spin_us(self) -> int:
        """How long the front-end looks for an answer before it sleeps."""
        if self.sleeps:
            return _SLEEPS_US
        return _POLLS_US if self.depth == 1 else _SPINS_US


def places(disk_folder: Path, tmpfs: Path = Path("/dev/shm")) -> list[Place]:
    """The three places of an image."""
    return [
        Place("page-cache", disk_folder, direct=False),
        Place("tmpfs", tmpfs, direct=False),
        Place("direct", disk_folder, direct=True),
    ]


def matrix(place: str) -> list[Case]:
    """Every case at a place."""
    small = [
        Case(place, workload, 4096, depth)
        for workload in ("randread", "randwrite", "randrw")
        for depth in DEPTHS
    ]  # fmt: skip
    sleeping = [Case(place, workload, 4096, 1, sleeps=True) for workload in ("randread", "randwrite")]
    large = [Case(place, workload, 128 << 10, 32) for workload in ("read", "write")]
    queues = [Case(place, "randread", 4096, 32, queues=number) for number in QUEUES]
    return [*small, *sleeping, *large, *queues]


def quick(place: str) -> list[Case]:
    """The cases that the targets speak of."""
    return [
        Case(place, "randread", 4096, 32),
        Case(place, "randread", 4096, 1),
        Case(place, "randread", 4096, 1, sleeps=True),
        Case(place, "randwrite", 4096, 32),
        Case(place, "read", 128 << 10, 32),
        Case(place, "write", 128 << 10, 32),
    ]


def chosen(place: str, patterns: Sequence[str], *, quickly: bool) -> list[Case]:
    """Those of a place that were asked for: of `matrix`, or of `quick`."""
    return select(quick(place) if quickly else matrix(place), patterns)


def select(cases: Sequence[Case], patterns: Sequence[str]) -> list[Case]:
    """Those whose name, or name without the place, is matched by a shell pattern; all without patterns."""
    if not patterns:
        return list(cases)
    return [
        case
        for case in cases
        if any(fnmatch.fnmatch(case.name, pattern) or fnmatch.fnmatch(case.work, pattern) for pattern in patterns)
    ]


def rotated(items: Sequence[Item], by: int) -> list[Item]:
    """The same in another order, so that no back-end always follows the same one."""
    start = by % len(items) if items else 0
    return [*items[start:], *items[:start]]


def fill(image: Path, size_bytes: int) -> None:
    """Random data, so that no page is a hole, on the disk and left in the page cache."""
    with image.open("wb") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
