"""Serving a device on a transport, front-end after front-end, until a signal says stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
from typing import Any, Protocol

from vvupipe.errors import TransportError, WorkerError
from vvupipe.events import EventPrinter
from vvupipe.units import human_bytes
from vvupipe.vhost_user.backend import serve
from vvupipe.vhost_user.device import Device
from vvupipe.vhost_user.transport import Transport
from vvupipe.workers import kernel_cache
from vvupipe.workers.control_block import VringCounters

log = logging.getLogger(__name__)

_SLOW_START_S = 2.0  # a start from the cache takes about half a second; what takes longer is worth a line


class ServedDevice(Device, Protocol):
    """A device with a life of its own."""

    def describe(self) -> dict[str, str | int | bool]:
        """What is served, for a person and for --json."""

    async def start(self) -> None:
        """Get ready to serve. Raises: WorkerError."""

    async def resize(self) -> int | None:
        """Take the size that what is served has now. The new size in bytes; None: nothing changed.

        Raises: WorkerError.
        """

    async def close(self) -> None:
        """Let go of everything."""


async def run(device: ServedDevice, transport: Transport, events: EventPrinter) -> int:
    """Serve until SIGINT or SIGTERM. Returns the exit status.

    Raises: WorkerError when workers keep dying, TransportError when the carrier is gone for good.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    resizing: set[asyncio.Task[None]] = set()

    def resize() -> None:
        task = asyncio.create_task(_resize(device, events))
        resizing.add(task)
        task.add_done_callback(resizing.discard)

    loop.add_signal_handler(signal.SIGUSR1, resize)
    serving: asyncio.Task[None] | None = None
    try:
        notice = loop.call_later(_SLOW_START_S, _say_starting)
        await device.start()
        notice.cancel()
        _announce(device, transport, events)
        serving = asyncio.create_task(_serve_all(device, transport, events))
        stopping = asyncio.create_task(stop.wait())
        waited: list[asyncio.Future[Any]] = [serving, stopping, device.pool.failed]
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if device.pool.failed.done():
            raise device.pool.failed.result()
        if serving.done():
            serving.result()
    finally:
        if serving:
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError, TransportError):
                await serving
        transport.close()
        await device.close()
    events.emit("stopped", "stopped", vrings=_counters(device))
    return 0


async def _resize(device: ServedDevice, events: EventPrinter) -> None:
    """SIGUSR1: what is served has another size."""
    try:
        size_bytes = await device.resize()
    except (WorkerError, OSError) as error:
        log.error("it cannot be resized: %s", error)
        return
    if size_bytes is None:
        events.emit("resized", "the size has not changed", changed=False)
    else:
        events.emit("resized", f"it has {human_bytes(size_bytes)} now", changed=True, size_bytes=size_bytes)


def _say_starting() -> None:
    warm = kernel_cache.is_warm()
    line = "loading the kernels" if warm else "compiling the kernels, which is needed once"
    print(line, file=sys.stderr, flush=True)


async def _serve_all(device: ServedDevice, transport: Transport, events: EventPrinter) -> None:
    while True:
        connection = await transport.accept()
        events.emit("connected", "front-end connected")
        before = _totals(device)
        try:
            await serve(connection, device)
        finally:
            after = _totals(device)
            done = VringCounters(
                *(getattr(after, name) - getattr(before, name) for name in VringCounters.__dataclass_fields__)
            )
            events.emit(
                "disconnected",
                f"front-end left: {done.requests} requests, {human_bytes(done.read_bytes)} read, "
                f"{human_bytes(done.written_bytes)} written, {done.flushes} flushes, {done.errors} errors",
                **done.as_dict(),
            )


def _announce(device: ServedDevice, transport: Transport, events: EventPrinter) -> None:
    described = device.describe()
    pool = device.pool
    events.emit(
        "ready",
        f"serving {described['text']} on {transport.describe()}; "
        f"up to {pool.num_workers} workers on CPUs {','.join(map(str, pool.cpus))}, {pool.num_vrings} queues",
        pid=os.getpid(),
        transport=transport.describe(),
        cpus=pool.cpus,
        num_queues=pool.num_vrings,
        workers=pool.pids(),
        **{name: value for name, value in described.items() if name != "text"},
    )


def _counters(device: ServedDevice) -> dict[str, dict[str, int]]:
    used = ((index, device.pool.block.counters(index)) for index in range(device.pool.num_vrings))
    return {str(index): counters.as_dict() for index, counters in used if counters.requests}


def _totals(device: ServedDevice) -> VringCounters:
    each = [device.pool.block.counters(index) for index in range(device.pool.num_vrings)]
    return VringCounters(
        *(sum(getattr(counters, name) for counters in each) for name in VringCounters.__dataclass_fields__)
    )
