"""All that a worker needs to know to serve a vring, and what it tells of its start."""

from __future__ import annotations

import os
from dataclasses import dataclass

from vvupipe.memory.doorbell import Doorbell
from vvupipe.workers import commands


@dataclass(slots=True)
class VringSetup:
    """A vring as the front-end described it. The holder owns the eventfds.

    desc, avail, used: front-end user addresses, driver addresses with an IOTLB. base: where to start when neither the
    ring nor an inflight region tells. kick_fd: -1 when the ring is to be polled. inflight_fd: the file of the inflight
    region (-1: none), in which this vring's part has `inflight_bytes` from `inflight_offset` on. own_inflight: that is
    the pool's, and not the front-end's.
    """

    index: int
    size: int
    desc_uva: int
    avail_uva: int
    used_uva: int
    event_idx: bool
    indirect: bool
    write_through: bool
    packed: bool = False
    in_order: bool = False
    iotlb: bool = False
    base: int = 0
    log_used: bool = False
    log_gpa: int = 0
    inflight_offset: int = 0
    inflight_bytes: int = 0
    inflight_fd: int = -1
    own_inflight: bool = False
    kick_fd: int = -1
    call: Doorbell | None = None
    err: Doorbell | None = None

    def start_command(self, *, makes_way: bool = False) -> tuple[commands.Fields, list[int]]:
        """The command that starts it, and the files that go with that, which stay the holder's.

        makes_way: a worker whose guest memory has lost pages may end instead (commands.MEMORY_LOST).
        """
        fds = [self.kick_fd] if self.kick_fd >= 0 else []
        fds += [doorbell.fd for doorbell in (self.call, self.err) if doorbell]
        fds += [self.inflight_fd] if self.inflight_fd >= 0 else []
        fields = {
            "op": "start",
            "makes_way": makes_way,
            "kick_fd": self.kick_fd >= 0,
            "call_fd": self.call is not None,
            "err_fd": self.err is not None,
            "index": self.index,
            "size": self.size,
            "desc_uva": self.desc_uva,
            "avail_uva": self.avail_uva,
            "used_uva": self.used_uva,
            "event_idx": int(self.event_idx),
            "indirect": int(self.indirect),
            "write_through": int(self.write_through),
            "packed": int(self.packed),
            "in_order": int(self.in_order),
            "iotlb": int(self.iotlb),
            "base": self.base,
            "log_used": int(self.log_used),
            "log_gpa": self.log_gpa,
            "inflight_offset": self.inflight_offset,
            "inflight_bytes": self.inflight_bytes,
        }
        return fields, fds

    def close(self) -> None:
        """Close the eventfds and the inflight region's file."""
        for name in ("kick_fd", "inflight_fd"):
            if getattr(self, name) >= 0:
                os.close(getattr(self, name))
                setattr(self, name, -1)
        for doorbell in (self.call, self.err):
            if doorbell:
                doorbell.close()
        self.call = self.err = None


@dataclass(frozen=True, slots=True)
class StartedVring:
    """Where a vring started. again: requests of a former back-end that are done again; waits: for a translation."""

    last_avail_idx: int
    again: int
    waits: bool
