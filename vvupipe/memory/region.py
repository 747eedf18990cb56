"""A region of a front-end's memory, as a transport hands it out."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(slots=True)
class MemoryRegion:
    """`size_bytes` of the front-end's RAM from `gpa` on, mappable from `fd` at `fd_offset`.

    gpa: guest-physical address. uva: the front-end's own address of it. The holder owns `fd`.
    """

    gpa: int
    size_bytes: int
    uva: int
    fd: int
    fd_offset: int

    def close(self) -> None:
        """Close the fd; mappings made from it stay."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def close_regions(regions: list[MemoryRegion]) -> None:
    """Close the fds of `regions` and forget them."""
    while regions:
        regions.pop().close()
