"""The sibling VM as a real guest in stock QEMU, its console on the terminal.

Nothing of it has a name in the file system: the QMP monitor is one end of a socket pair that QEMU inherits, the RAM a
memfd. So nothing can be left behind, however we end; the kernel kills QEMU when this process is gone.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Callable

from vvupipe.errors import UserError
from vvupipe.vm.qemu_backend import wait_for_backend
from vvupipe.vm.qemu_binary import QemuBinary, find_qemu
from vvupipe.vm.qemu_command import QemuSiblingOptions, VhostUserDisk, check_options, qemu_command
from vvupipe.vm.qemu_disk_watch import watch_disks
from vvupipe.vm.qemu_machine import HugeRam, huge_ram, remove_console
from vvupipe.vm.qemu_monitor import QemuMonitor
from vvupipe.vm.qemu_process import start_process, terminal_kept
from vvupipe.vm.qemu_run import end_qemu, until_signal, verdict
from vvupipe.vm.sibling_memory import pool_of_proxy

__all__ = ["QemuSiblingOptions", "VhostUserDisk", "run_qemu_sibling"]

_SILENCE_S = 3.0  # a back-end that has not answered by then is worth a line


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


async def run_qemu_sibling(options: QemuSiblingOptions, *, say: Callable[[str], None] = _say) -> int:
    """Run the VM to its end; 0 when the guest powered off, else 1 (also after SIGINT, SIGTERM, SIGHUP).

    `say` gets the few lines that are for the user. Must run in the main thread (signals, parent-death signal).
    Raises: UserError when QEMU, kernel or initrd cannot be used, or no back-end came within `options.timeout_s`.
    """
    check_options(options)
    binary = find_qemu(options.qemu)
    with huge_ram(options) as huge:
        return await until_signal(_stay(options, binary, huge, say))


async def _stay(
    options: QemuSiblingOptions, binary: QemuBinary, huge: HugeRam | None, say: Callable[[str], None]
) -> int:
    """One VM from the wait for its back-ends to QEMU's end."""
    deadline = None if options.timeout_s is None else time.monotonic() + options.timeout_s
    for disk in options.vhost_user_blk:
        await wait_for_backend(disk.socket_path, _remaining(deadline), say)
    on_terminal = os.isatty(0) and options.serial.kind == "stdout"
    ours, theirs = socket.socketpair()
    monitor = QemuMonitor(ours)
    # A device VM's pool is POSIX shared memory, which has no huge pages.
    sockets = [] if huge else [disk.socket_path for disk in options.vhost_user_blk]
    with ours, theirs, terminal_kept(), pool_of_proxy(sockets, options.mem_mib << 20) as memory_path:
        command = qemu_command(
            options, binary, theirs.fileno(), on_terminal=on_terminal, memory_path=memory_path, huge=huge
        )
        if huge:
            say(f"{options.mem_mib} MiB of RAM in {huge.pages}")
        if on_terminal:
            say("the guest's console is this terminal; Ctrl-A X ends the VM")
        process = await start_process(command, [theirs.fileno(), *([huge.fd] if huge else [])])
        theirs.close()
        following = asyncio.create_task(monitor.follow())
        try:
            await _run_started(options, process, monitor, deadline, say)
        finally:
            try:
                await end_qemu(process, monitor)
            finally:
                remove_console(options.serial)
            following.cancel()
    return verdict(process, monitor, say)


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
    watching = asyncio.create_task(watch_disks(monitor, options.vhost_user_blk, say))
    try:
        await process.wait()
    finally:
        watching.cancel()
        await asyncio.wait({watching})
