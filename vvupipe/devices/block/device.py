"""The block device that the vhost-user back-end serves."""

from __future__ import annotations

import asyncio
import enum
import json
import logging
import os
import stat
from collections.abc import Callable, Sequence

from kernels import virtio_layout as layout
from kernels.blk_disk import SEGMENTS_EACH
from kernels.virtio_layout import RANGE_SECTORS_MAX, RANGES_MAX
from vvupipe.devices.block.config_space import WRITEBACK_OFFSET, ConfigSpace
from vvupipe.devices.block.engine import Engine, EngineChoice, choose, engine_fields
from vvupipe.devices.block.image import Image
from vvupipe.errors import ProtocolError, WorkerError
from vvupipe.units import human_bytes
from vvupipe.workers.pool import DeviceWorker, WorkerPool

log = logging.getLogger(__name__)

_HEADER_AND_STATUS = 2  # descriptors of a request besides its data (virtio 1.2, 5.2.6)
_SIZE_CHECK_S = 1.0
_FAILURE_CHECK_S = 0.5
_FAILURES_EVERY_S = 10.0  # as long as they go on
_STATE_VERSION = 1


class CacheMode(enum.StrEnum):
    """What a completed write means while the driver says nothing else."""

    WRITEBACK = "writeback"  #: it may be in the host's page cache until a flush
    WRITETHROUGH = "writethrough"  #: it is on the disk
    UNSAFE = "unsafe"  #: as writeback, and a flush does nothing


class BlockDevice:
    """An image behind virtio-blk. Implements vvupipe.vhost_user.device.Device."""

    kind = "block"

    def __init__(
        self,
        image: Image,
        cpus: Sequence[int],
        num_queues: int,
        queue_size: int,
        spin_max_ns: int,
        cache: CacheMode = CacheMode.WRITEBACK,
        *,
        sparse: bool = True,
        engine: EngineChoice | None = None,
    ) -> None:
        """sparse: offer discard and give blocks back when zeroes are written. engine: None takes the best there is."""
        self.image = image
        self.num_queues = num_queues
        self.queue_size_max = queue_size
        self.on_config_change: Callable[[], None] = lambda: None
        self._cache = cache
        self._engine = engine or choose(Engine.AUTO, image)
        self._writeback = cache != CacheMode.WRITETHROUGH
        self._unsynced = False  # the cache was turned off, and it is not known that what it had is on the disk
        self._discard = sparse and image.limits.discard
        self._unmap = sparse and image.limits.write_zeroes_unmap
        self._write_zeroes = not image.read_only
        self.features = (
            layout.F_VERSION_1
            | layout.F_RING_INDIRECT_DESC
            | layout.F_RING_EVENT_IDX
            | layout.F_RING_PACKED
            | layout.F_ACCESS_PLATFORM
            | layout.F_IN_ORDER
            | layout.F_ORDER_PLATFORM
            | layout.F_RING_RESET
            | layout.BLK_F_SEG_MAX
            | layout.BLK_F_BLK_SIZE
            | layout.BLK_F_FLUSH
            | layout.BLK_F_TOPOLOGY
            | layout.BLK_F_CONFIG_WCE
            | layout.BLK_F_MQ
            | (layout.BLK_F_RO if image.read_only else 0)
            | (layout.BLK_F_DISCARD if self._discard else 0)
            | (layout.BLK_F_WRITE_ZEROES if self._write_zeroes else 0)
        )
        fields = {
            "size_bytes": image.size_bytes,
            "read_only": image.read_only,
            "serial": image.serial,
            "direct": image.direct,
            "unsafe": cache == CacheMode.UNSAFE,
            "is_block": stat.S_ISBLK(os.fstat(image.fd).st_mode),
            "logical_bytes": image.limits.logical_block_bytes,
            "can_discard": self._discard,
            "can_write_zeroes": self._write_zeroes,
            "can_punch": self._unmap,
            "can_zero_range": image.limits.write_zeroes,
            **engine_fields(self._engine, image),
        }
        self._worker_fields = fields
        worker = DeviceWorker("vvupipe.devices.block.worker", fields, (image.fd,))
        self.pool = WorkerPool(worker, cpus, num_queues, spin_max_ns)
        self._watcher: asyncio.Task[None] | None = None
        self._failure_watcher: asyncio.Task[None] | None = None

    # Configuration.

    def config_space(self) -> bytes:
        """The configuration space as it is now."""
        image, limits = self.image, self.image.limits
        block = image.block_size_bytes
        return ConfigSpace(
            capacity_sectors=image.size_bytes // layout.SECTOR_BYTES,
            seg_max=max(1, min(self.queue_size_max, SEGMENTS_EACH) - _HEADER_AND_STATUS),
            blk_size_bytes=block,
            physical_block_exp=max(0, (limits.physical_block_bytes // block).bit_length() - 1),
            min_io_size=min(max(1, limits.min_io_bytes // block), 0xFFFF),
            opt_io_size=limits.opt_io_bytes // block,
            writeback=int(self._writeback),
            num_queues=self.num_queues,
            max_discard_sectors=RANGE_SECTORS_MAX if self._discard else 0,
            max_discard_seg=RANGES_MAX if self._discard else 0,
            discard_sector_alignment=limits.discard_granularity_bytes // layout.SECTOR_BYTES if self._discard else 0,
            max_write_zeroes_sectors=RANGE_SECTORS_MAX if self._write_zeroes else 0,
            max_write_zeroes_seg=RANGES_MAX if self._write_zeroes else 0,
            write_zeroes_may_unmap=int(self._write_zeroes and self._unmap),
        ).pack()

    async def set_config(self, offset: int, data: bytes, features: int, *, migration: bool) -> None:
        """`writeback` can be written where CONFIG_WCE was negotiated (virtio 1.2, 5.2.5.2), and by a migration.

        A migration brings the whole space: what is not writable must be as it is.
        Raises: ProtocolError; OSError when the cache is to be off and what is in it cannot be written.
        """
        space = self.config_space()
        if migration and offset <= WRITEBACK_OFFSET < offset + len(data):
            value = data[WRITEBACK_OFFSET - offset]
        elif offset == WRITEBACK_OFFSET and len(data) == 1 and features & layout.BLK_F_CONFIG_WCE:
            value = data[0]
        elif space[offset : offset + len(data)] == data:
            return
        else:
            raise ProtocolError(f"the {len(data)} configuration bytes at {offset} are read-only")
        if value > 1:
            raise ProtocolError(f"writeback {value} is neither 0 nor 1")
        await self._set_writeback(bool(value), features)

    async def _set_writeback(self, on: bool, features: int) -> None:
        if on == self._writeback and not self._unsynced:
            return
        self._writeback = on
        self._unsynced = not on and self._cache != CacheMode.UNSAFE and not self.image.read_only
        await self.pool.set_write_through(self.write_through(features))
        if self._unsynced:
            await self._sync()
            self._unsynced = False
        log.info("the write cache is %s", "on" if on else "off")

    async def _sync(self) -> None:
        """What completed before is on the disk as well when the driver hears that the cache is off. Raises: OSError."""
        try:
            await asyncio.get_running_loop().run_in_executor(None, os.fdatasync, self.image.fd)
        except OSError as error:
            # The cache stays off, so that the driver's next writes are safe, and the next attempt syncs again.
            reason = f"what the write cache had is not on the disk: {error.strerror}"
            raise OSError(error.errno, reason) from error

    def write_through(self, features: int) -> bool:
        """A driver that cannot flush must find every completed write on the disk (virtio 1.2, 5.2.5.2)."""
        if self._cache == CacheMode.UNSAFE:
            return False
        return not self._writeback or not features & (layout.BLK_F_FLUSH | layout.BLK_F_CONFIG_WCE)

    def reset(self) -> None:
        """The cache mode of the command line."""
        self._writeback = self._cache != CacheMode.WRITETHROUGH
        self._unsynced = False

    def save_state(self) -> bytes:
        """The cache mode is all that a driver can change."""
        state = {"vvupipe": _STATE_VERSION, "device": self.kind, "writeback": self._writeback}
        return json.dumps(state).encode()

    def load_state(self, state: bytes) -> None:
        """Raises: ProtocolError when it is not what `save_state` makes."""
        try:
            fields = json.loads(state)
            known = (fields["vvupipe"], fields["device"]) == (_STATE_VERSION, self.kind)
            writeback = fields["writeback"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ProtocolError(f"{len(state)} bytes that are no state of a block device") from error
        if not known or not isinstance(writeback, bool):
            raise ProtocolError("a state of another device or version")
        self._writeback = writeback

    def describe(self) -> dict[str, str | int | bool]:
        """What is served, for a person (`text`) and for --json."""
        image = self.image
        kind = "read-only disk" if image.read_only else "disk"
        how = f"engine {self._engine.engine.value}"
        return {
            "text": f"{image.path} ({kind}, {human_bytes(image.size_bytes)}, serial {image.serial}, {how})",
            "file": str(image.path),
            "size_bytes": image.size_bytes,
            "block_size_bytes": image.block_size_bytes,
            "read_only": image.read_only,
            "serial": image.serial,
            "cache": self._cache.value,
            "direct": image.direct,
            "discard": self._discard,
            "engine": self._engine.engine.value,
        }

    # Life.

    async def start(self) -> None:
        """Start serving: workers, and a look at the image's size now and then. Raises: WorkerError."""
        await self.pool.start()
        self._watcher = asyncio.create_task(self._watch_size())
        self._failure_watcher = asyncio.create_task(self._watch_failures())

    async def close(self) -> None:
        """End the workers and close the image."""
        for watcher in (self._watcher, self._failure_watcher):
            if watcher:
                watcher.cancel()
        await self.pool.close()
        self.image.close()

    async def resize(self) -> int | None:
        """Take the size that the image has now, and tell the front-end. The new size in bytes; None: nothing changed.

        Raises: WorkerError.
        """
        size_bytes = self.image.current_size_bytes()
        size_bytes -= size_bytes % self.image.block_size_bytes
        if size_bytes == self.image.size_bytes:
            return None
        if size_bytes == 0:
            raise WorkerError(f"{self.image.path} is empty: it keeps its former size")
        self.image.size_bytes = size_bytes
        self._worker_fields["size_bytes"] = size_bytes
        await self.pool.device_command({"name": "resize", "size_bytes": size_bytes})
        self.on_config_change()
        if self._watcher and self._watcher.done():
            self._watcher = asyncio.create_task(self._watch_size())
        return size_bytes

    async def _watch_failures(self) -> None:
        """Say why requests fail: the guest only hears that they do."""
        told = 0
        while True:
            await asyncio.sleep(_FAILURE_CHECK_S)
            records = self.pool.block.workers
            failures = int(records["disk_errors"].sum())
            if failures == told:
                continue
            why = os.strerror(int(records["disk_errno"].max()))
            log.error("%s: %d reads, writes or flushes of it failed: %s", self.image.path, failures - told, why)
            told = failures
            await asyncio.sleep(_FAILURES_EVERY_S)

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
                try:
                    await self.pool.device_command({"name": "unmap"})
                except WorkerError as error:
                    log.error("%s: its end may read as zeros: %s", self.image.path, error)
                    continue
                return
