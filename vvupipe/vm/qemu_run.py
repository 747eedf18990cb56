"""Running one QEMU to its end: signals, the monitor's session, the verdict."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from asyncio.subprocess import Process
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from vvupipe.ending_signals import ending_signals
from vvupipe.vm.qemu_monitor import QemuMonitor

_log = logging.getLogger(__name__)

_SIGNALS_HEEDED = 2
_QUIT_S = 5.0  # how long QEMU may take to quit before it is killed


async def until_signal(stay: Coroutine[Any, Any, int]) -> int:
    """The result of `stay`, which is cancelled by SIGINT, SIGTERM and SIGHUP: 1 then. Runs in the main thread."""
    task = asyncio.create_task(stay)
    with _signals_cancel(task):
        try:
            return await task
        except asyncio.CancelledError:
            # Ours by a signal, unless somebody cancelled this very task, who must see it.
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return 1


@contextlib.contextmanager
def _signals_cancel(task: asyncio.Task[int]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    numbers = ending_signals()
    heard = 0

    def on_signal() -> None:
        nonlocal heard
        heard += 1
        # The first has QEMU quit, the second has it killed; a third would only keep us from tidying up.
        if heard <= _SIGNALS_HEEDED:
            task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


async def end_qemu(process: Process, monitor: QemuMonitor) -> None:
    """See QEMU ended in every case and the monitor's last words read."""
    if process.returncode is None:
        try:
            async with asyncio.timeout(_QUIT_S):
                if not monitor.started:
                    process.kill()  # no guest ran yet, and QEMU hears nothing while it waits for a back-end
                await monitor.quit()
                await process.wait()
        except TimeoutError:
            _log.warning("QEMU did not quit within %g s: killed", _QUIT_S)
            process.kill()
            await process.wait()
        except asyncio.CancelledError:
            # A second signal: at once, then.
            if process.returncode is None:
                process.kill()
                await process.wait()
            await monitor.close()
            raise
    closing = asyncio.create_task(monitor.close())
    try:
        await asyncio.shield(closing)
    except asyncio.CancelledError:
        await closing  # QEMU has ended: that takes no time, and half a session would complain
        raise


def verdict(process: Process, monitor: QemuMonitor, say: Callable[[str], None]) -> int:
    """The exit status, and a line for an end that is not the guest's own wish."""
    if monitor.panicked:
        say("the guest's kernel panicked")
    elif monitor.shutdown_reason == "guest-reset":
        say("the guest asked for a reset: the VM has ended")
    elif process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"status {process.returncode}"
        say(f"QEMU ended with {how}")
    powered_off = monitor.shutdown_reason == "guest-shutdown" and not monitor.panicked
    return 0 if powered_off and process.returncode == 0 else 1
