"""A vring as the session knows it: what the front-end told of it, and whether it is being served."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vvupipe.memory.doorbell import Doorbell


@dataclass(slots=True)
class Vring:
    """State of one vring of a session ("Ring states" in docs/interop/vhost-user.rst)."""

    index: int
    size: int = 0
    addresses: tuple[int, int, int] | None = None  #: descriptor, available and used user addresses
    last_avail_idx: int = 0
    enabled: bool = False
    kicked: bool = False  #: SET_VRING_KICK came since the last stop, with an fd or without (polling)
    kick_fd: int = -1
    call: Doorbell | None = None
    err: Doorbell | None = None
    running: bool = False  #: the pool serves it

    @property
    def complete(self) -> bool:
        """Whether enough is known to serve it."""
        return self.enabled and self.kicked and self.size > 0 and self.addresses is not None

    def set_kick(self, fd: int | None) -> None:
        """A new kick; None polls."""
        self.drop_kick()
        self.kick_fd = -1 if fd is None else fd
        self.kicked = True

    def drop_kick(self) -> None:
        """Forget the kick: the ring starts again at the next one."""
        if self.kick_fd >= 0:
            os.close(self.kick_fd)
        self.kick_fd = -1
        self.kicked = False

    def set_doorbell(self, which: str, doorbell: Doorbell | None) -> None:
        """A new `call` or `err` doorbell."""
        old: Doorbell | None = getattr(self, which)
        if old:
            old.close()
        setattr(self, which, doorbell)

    def close(self) -> None:
        """Close every eventfd."""
        self.drop_kick()
        self.set_doorbell("call", None)
        self.set_doorbell("err", None)
