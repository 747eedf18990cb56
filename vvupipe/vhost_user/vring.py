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
    flags: int = 0  #: of SET_VRING_ADDR
    log_gpa: int = 0
    last_avail_idx: int | None = None  #: None: never told, so the start of the ring
    stopped_at: int | None = None  #: what GET_VRING_BASE would have told before the last reset
    enabled: bool = False
    kicked: bool = False  #: SET_VRING_KICK came since the last stop, with an fd or without (polling)
    kick_fd: int = -1
    call: Doorbell | None = None
    call_set: bool = False  #: SET_VRING_CALL came, with an fd or without
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

    def reset(self) -> None:
        """As at the start of a session, but for the eventfds and `stopped_at`."""
        self.drop_kick()
        self.size = self.flags = self.log_gpa = 0
        self.addresses = self.last_avail_idx = None
        self.enabled = False

    def close(self) -> None:
        """Close every eventfd."""
        self.drop_kick()
        self.set_doorbell("call", None)
        self.set_doorbell("err", None)
