"""An operator is told why requests fail: one line for many."""

import asyncio
import errno
import os

import numpy as np
import pytest

from kernels.region_table import COLUMNS
from tests.vvupipe.workers.pool_kit import until
from vvupipe.devices.block import device as device_module
from vvupipe.devices.block.device import BlockDevice
from vvupipe.devices.block.image import open_image
from vvupipe.devices.block.worker import BlockKernel
from vvupipe.errors import WorkerError

pytestmark = pytest.mark.timeout(60)


def test_failures_are_told_of_now_and_then(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(device_module, "_FAILURE_CHECK_S", 0.01)
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))

    async def play():
        device = BlockDevice(open_image(path, read_only=False, lock=False), [0], 1, 256, 50_000)
        await device.start()
        worker = device.pool.block.workers[0]
        worker["disk_errno"], worker["disk_errors"] = errno.ENOSPC, 3
        await until(lambda: caplog.messages)
        worker["disk_errors"] = 5
        await asyncio.sleep(0.2)
        await device.close()

    asyncio.run(play())
    assert caplog.messages == [f"{path}: 3 reads, writes or flushes of it failed: {os.strerror(errno.ENOSPC)}"]


def test_shrunk_image_that_a_worker_was_not_told_of(tmp_path, monkeypatch, caplog):
    """It is tried again, and nothing ends for want of it."""
    monkeypatch.setattr(device_module, "_SIZE_CHECK_S", 0.01)
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(8192))
    tried = []

    async def command(fields):
        tried.append(fields)
        if len(tried) == 1:
            raise WorkerError("it did not answer")

    async def play():
        device = BlockDevice(open_image(path, read_only=False, lock=False), [0], 1, 256, 50_000)
        monkeypatch.setattr(device.pool, "device_command", command)
        await device.start()
        os.truncate(path, 4096)
        await until(lambda: len(tried) == 2)
        await until(device._watcher.done)
        await device.close()

    asyncio.run(play())
    assert not [record for record in caplog.records if record.exc_info]


def test_memory_that_the_kernel_refused_slows_nobody_down_later():
    """The next front-end's memory is tried anew."""
    kernel = BlockKernel()
    kernel._registers = False
    kernel._helper_disks = [kernel._disk.copy()]
    for disk in (kernel._disk, *kernel._helper_disks):
        disk["bounces"] = 1
    kernel.use_memory(np.zeros((0, COLUMNS), np.uint64))
    assert not any(disk["bounces"][0] for disk in (kernel._disk, *kernel._helper_disks))
