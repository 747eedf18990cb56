"""The block device that the vhost-user back-end serves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from kernels import virtio_layout as layout
from vvupipe.devices.block import config_space
from vvupipe.devices.block.image import Image
from vvupipe.units import human_bytes
from vvupipe.workers.pool import DeviceWorker, WorkerPool

log = logging.getLogger(__name__)

_HEADER_AND_STATUS = 2  # descriptors of a request besides its data (virtio 1.2, 5.2.6)
_SIZE_CHECK_S = 1.0


class BlockDevice:
    """An image behind virtio-blk. Implements vvupipe.vhost_user.device.Device."""

    kind = "block"

    def __init__(self, image: Image, cpus: Sequence[int], num_queues: int, queue_size: int, spin_max_ns: int) -> None:
        self.image = image
        self.num_queues = num_queues
        self.queue_size_max = queue_size
        self.features = (
            layout.F_VERSION_1
            | layout.F_RING_INDIRECT_DESC
            | layout.F_RING_EVENT_IDX
            | layout.BLK_F_SEG_MAX
            | layout.BLK_F_BLK_SIZE
            | layout.BLK_F_FLUSH
            | layout.BLK_F_MQ
            | (layout.BLK_F_RO if image.read_only else 0)
        )
        fields = {"size_bytes": image.size_bytes, "read_only": image.read_only, "serial": image.serial}
        worker = DeviceWorker("vvupipe.devices.block.worker", fields, (image.fd,))
        self.pool = WorkerPool(worker, cpus, num_queues, spin_max_ns)
        self._watcher: asyncio.Task[None] | None = None

    def config_space(self) -> bytes:
        """The configuration space as it is now."""
        seg_max = max(1, self.queue_size_max - _HEADER_AND_STATUS)
        return config_space.pack(self.image.size_bytes, self.image.block_size_bytes, seg_max, self.num_queues)

    def write_through(self, features: int) -> bool:
        """A driver that cannot flush must find every completed write on the disk (virtio 1.2, 5.2.6.2)."""
        return not features & layout.BLK_F_FLUSH

    def describe(self) -> dict[str, str | int | bool]:
        """What is served, for a person (`text`) and for --json."""
        image = self.image
        kind = "read-only disk" if image.read_only else "disk"
        return {
            "text": f"{image.path} ({kind}, {human_bytes(image.size_bytes)}, serial {image.serial})",
            "file": str(image.path),
            "size_bytes": image.size_bytes,
            "block_size_bytes": image.block_size_bytes,
            "read_only": image.read_only,
            "serial": image.serial,
        }

    async def start(self) -> None:
        """Start serving: workers, and a look at the image's size now and then. Raises: WorkerError."""
        await self.pool.start()
        self._watcher = asyncio.create_task(self._watch_size())

    async def close(self) -> None:
        """End the workers and close the image."""
        if self._watcher:
            self._watcher.cancel()
        await self.pool.close()
        self.image.close()

    async def _watch_size(self) -> None:
        while True:
            await asyncio.sleep(_SIZE_CHECK_S)
            size_bytes = self.image.current_size_bytes()
            if size_bytes < self.image.size_bytes:
                log.error(
                    "%s shrank from %d to %d bytes: requests beyond its end fail from now on",
                    self.image.path,
                    self.image.size_bytes,
                    size_bytes,
                )
                # The end of a mapped file's last page reads as zeros; a system call tells the truth.
                await self.pool.device_command({"name": "unmap"})
                return
