"""The MSI-X interrupts of a function as its vfio-user server keeps them: an eventfd for each vector."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from vvupipe.memory.doorbell import Doorbell


class Interrupts:
    """`count` vectors. `changed` is called after the client gave or took eventfds."""

    def __init__(self, count: int, changed: Callable[[], None]) -> None:
        self.count = count
        self._changed = changed
        self._doorbells: dict[int, Doorbell] = {}
        self._masked: set[int] = set()
        self._pending: set[int] = set()

    def assign(self, start: int, fds: Sequence[int]) -> None:
        """Vector start + k signals fds[k], which we own from here on."""
        for vector, fd in enumerate(fds, start):
            os.set_blocking(fd, False)
            old = self._doorbells.pop(vector, None)
            if old:
                old.close()
            self._doorbells[vector] = Doorbell(fd)
        self._changed()

    def withdraw(self, start: int, count: int) -> None:
        """These vectors signal nothing any more."""
        for vector in range(start, start + count):
            doorbell = self._doorbells.pop(vector, None)
            if doorbell:
                doorbell.close()
        self._changed()

    def clear(self) -> None:
        """Forget every eventfd and mask."""
        self._masked.clear()
        self._pending.clear()
        self.withdraw(0, self.count)

    def mask(self, start: int, count: int) -> None:
        """Hold these vectors back."""
        self._masked.update(range(start, start + count))
        self._changed()

    def unmask(self, start: int, count: int) -> None:
        """Let these vectors through, and what they held back."""
        for vector in range(start, start + count):
            self._masked.discard(vector)
            if vector in self._pending:
                self._pending.discard(vector)
                self.trigger(vector)
        self._changed()

    def eventfd(self, vector: int) -> int | None:
        """The eventfd of a vector that may fire now; it stays ours and lives until `changed` is called."""
        doorbell = self._doorbells.get(vector)
        return doorbell.fd if doorbell and vector not in self._masked else None

    def trigger(self, vector: int) -> None:
        """Raise a vector; one that is masked is remembered, one that nobody listens to is lost, as in hardware."""
        if vector in self._masked:
            self._pending.add(vector)
            return
        doorbell = self._doorbells.get(vector)
        if doorbell:
            doorbell.ring()
