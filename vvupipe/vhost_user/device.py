"""What the vhost-user back-end asks of the device that it serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from vvupipe.workers.pool import WorkerPool


class Device(Protocol):
    """A device type behind vhost-user; one instance serves one front-end after the other."""

    #: virtio feature bits that the device offers, ring features included
    features: int
    #: vrings it can serve
    num_queues: int
    #: largest vring that it accepts
    queue_size_max: int
    #: the workers that serve its vrings
    pool: WorkerPool
    #: called when the configuration space has changed by itself; whoever serves the device sets it
    on_config_change: Callable[[], None]

    def config_space(self) -> bytes:
        """The device's configuration space as it is now; reads beyond it give zeros."""

    async def set_config(self, offset: int, data: bytes, features: int, *, migration: bool) -> None:
        """A write of the driver (or, with `migration`, of the front-end) to the configuration space.

        Raises: ProtocolError when those bytes cannot be written, OSError when what they ask for failed.
        """

    def write_through(self, features: int) -> bool:
        """Whether, with these negotiated features, nothing may stay in a cache when a request completes."""

    def reset(self) -> None:
        """Back to the initial state; no vring runs."""

    def save_state(self) -> bytes:
        """What another back-end of the same disk must know to go on; no vring runs."""

    def load_state(self, state: bytes) -> None:
        """Take over what another back-end saved. Raises: ProtocolError when it is not such a state."""
