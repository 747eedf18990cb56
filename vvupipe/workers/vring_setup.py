"""All that a worker needs to know to serve a vring."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vvupipe.memory.doorbell import Doorbell


@dataclass(slots=True)
class VringSetup:
    """A vring as the front-end described it. The holder owns the eventfds.

    kick_fd: -1 when the ring is to be polled.
    """

    index: int
    size: int
    desc_uva: int
    avail_uva: int
    used_uva: int
    event_idx: bool
    indirect: bool
    write_through: bool
    kick_fd: int = -1
    call: Doorbell | None = None
    err: Doorbell | None = None

    def fields(self) -> dict[str, int]:
        """The numbers, for a command."""
        return {
            "index": self.index,
            "size": self.size,
            "desc_uva": self.desc_uva,
            "avail_uva": self.avail_uva,
            "used_uva": self.used_uva,
            "event_idx": int(self.event_idx),
            "indirect": int(self.indirect),
            "write_through": int(self.write_through),
        }

    def duplicate(self) -> VringSetup:
        """A copy with eventfds of its own."""
        return VringSetup(
            self.index,
            self.size,
            self.desc_uva,
            self.avail_uva,
            self.used_uva,
            self.event_idx,
            self.indirect,
            self.write_through,
            os.dup(self.kick_fd) if self.kick_fd >= 0 else -1,
            Doorbell(os.dup(self.call.fd)) if self.call else None,
            Doorbell(os.dup(self.err.fd)) if self.err else None,
        )

    def close(self) -> None:
        """Close the eventfds."""
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
            self.kick_fd = -1
        for doorbell in (self.call, self.err):
            if doorbell:
                doorbell.close()
        self.call = self.err = None
