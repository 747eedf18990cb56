"""The sibling VM as a real guest in stock QEMU, its console on the terminal.

Nothing of it has a name in the file system: the QMP monitor is one end of a socket pair that QEMU inherits, the RAM a
memfd. So nothing can be left behind, however we end; the kernel kills QEMU when this process is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Iterator

from vvupipe.errors import UserError
from vvupipe.vm.qemu_backend import wait_for_backend
from vvupipe.vm.qemu_binary import QemuBinary, find_qemu
from vvupipe.vm.qemu_command import QemuSiblingOptions, VhostUserDisk, check_options, qemu_command
from vvupipe.vm.qemu_monitor import QemuMonitor
from vvupipe.vm.qemu_process import start_process, terminal_kept

__all__ = ["QemuSiblingOptions", "VhostUserDisk", "run_qemu_sibling"]

_log = logging.getLogger(__name__)

_QUIT_S = 5.0  # how long QEMU may take to quit before it is killed
_SILENCE_S = 3.0  # a back-end that has not answered by then is worth a line
_ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run_qemu_sibling(options: QemuSiblingOptions, *, say: Callable[[str], None] = _say) -> int:
    """Run the VM to its end; 0 when the guest powered off, else 1 (also after SIGINT, SIGTERM, SIGHUP).

    `say` gets the few lines that are for the user. Must run in the main thread (signals, parent-death signal).
    Raises: UserError when QEMU, kernel or initrd cannot be used, or no back-end came within `options.timeout_s`.
    """
    check_options(options)
    binary = find_qemu(options.qemu)
    stay = asyncio.create_task(_stay(options, binary, say))
    with _signals_cancel(stay):
        try:
            return await stay
        except asyncio.CancelledError:
            # Ours by a signal, unless somebody cancelled this very task, who must see it.
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                raise
            return 1


@contextlib.contextmanager
def _signals_cancel(task: asyncio.Task[int]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in _ENDING_SIGNALS:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in _ENDING_SIGNALS:
            loop.remove_signal_handler(number)


async def _stay(options: QemuSiblingOptions, binary: QemuBinary, say: Callable[[str], None]) -> int:
    """One VM from the wait for its back-ends to QEMU's end."""
    deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
    for disk in options.vhost_user_blk:
        await wait_for_backend(disk.socket_path, _remaining(deadline), say)
    on_terminal = os.isatty(0)
    ours, theirs = socket.socketpair()
    monitor = QemuMonitor(ours)
    with ours, theirs, terminal_kept():
        command = qemu_command(options, binary, theirs.fileno(), on_terminal=on_terminal)
        if on_terminal:
            say("the guest's console is this terminal; Ctrl-A X ends the VM")
        process = await start_process(command, [theirs.fileno()])
        theirs.close()
        following = asyncio.create_task(monitor.follow())
        try:
            await _run_started(options, process, monitor, deadline, say)
        finally:
            await _end(process, monitor)
            following.cancel()
    return _verdict(process, monitor, say)


def _remaining(deadline: float | None) -> float | None:
    return None if deadline is None else max(0.0, deadline - time.monotonic())


async def _run_started(
    options: QemuSiblingOptions,
    process: Process,
    monitor: QemuMonitor,
    deadline: float | None,
    say: Callable[[str], None],
) -> None:
    """Let the VM run and wait for QEMU's end.

    Raises: UserError when a back-end accepted the connection but says nothing until the deadline.
    """
    starting = asyncio.create_task(monitor.start())
    places = ", ".join(str(disk.socket_path) for disk in options.vhost_user_blk)
    try:
        await asyncio.wait({starting}, timeout=_SILENCE_S if places else None)
        if not starting.done():
            say(f"waiting for an answer of the back-end at {places}")
            await asyncio.wait({starting}, timeout=_remaining(deadline))
        if not starting.done():
            raise UserError(f"the back-end at {places} did not answer within {options.timeout_s:g} s: is it stuck?")
    finally:
        if not starting.done():
            starting.cancel()
            await asyncio.wait({starting})
    await process.wait()


async def _end(process: Process, monitor: QemuMonitor) -> None:
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
    await monitor.close()


def _verdict(process: Process, monitor: QemuMonitor, say: Callable[[str], None]) -> int:
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
