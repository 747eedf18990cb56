"""What the vhost-user back-end asks of the device that it serves."""

from __future__ import annotations

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

    def config_space(self) -> bytes:
        """The device's configuration space as it is now; reads beyond it give zeros."""

    def write_through(self, features: int) -> bool:
        """Whether, with these negotiated features, nothing may stay in a cache when a request completes."""
