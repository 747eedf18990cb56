"""What vrings had under way when they stopped and could not be done: inflight regions of the pool's own."""

from __future__ import annotations

import os

from vvupipe.workers.vring_setup import VringSetup


class LeftUndone:
    """Keeps the region of a vring that stopped for its next start, if that goes on where it stopped."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[tuple[int, ...], int]] = {}  # vring -> (what must be the same, fd)

    def keep(self, setup: VringSetup, position: int) -> None:
        """The vring stopped at `position`; its region is ours from here on."""
        self.forget(setup.index)
        self._kept[setup.index] = _place(setup, position), setup.inflight_fd
        setup.inflight_fd = -1

    def take(self, setup: VringSetup) -> int:
        """The region of a vring that starts, which the caller owns; -1: none is kept, or that vring was another."""
        place, fd = self._kept.pop(setup.index, ((), -1))
        if fd >= 0 and place != _place(setup, setup.base):
            os.close(fd)
            return -1
        return fd

    def forget(self, index: int) -> None:
        """The vring begins anew."""
        _, fd = self._kept.pop(index, ((), -1))
        if fd >= 0:
            os.close(fd)

    def forget_all(self) -> None:
        """Nobody goes on with any vring."""
        for index in list(self._kept):
            self.forget(index)


def _place(setup: VringSetup, position: int) -> tuple[int, ...]:
    return (position, setup.size, setup.packed, setup.desc_uva, setup.avail_uva, setup.used_uva)
