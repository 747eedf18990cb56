"""Tells of a back-end that hangs up on QEMU again and again: the guest only sees a disk that does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from vvupipe.errors import TransportError
from vvupipe.vm.qemu_backend import is_listening
from vvupipe.vm.qemu_command import VhostUserDisk
from vvupipe.vm.qemu_monitor import QemuMonitor

_LOOK_S = 1.0
_LOOKS_MAX = 5  # QEMU reconnects each second: a back-end that is back, or another front-end's, is connected by then
_DISCONNECTED = "disconnected:"  # chardev/char-socket.c, how the name of such a character device begins


async def watch_disks(monitor: QemuMonitor, disks: Sequence[VhostUserDisk], say: Callable[[str], None]) -> None:
    """Say so once for each disk whose back-end listens and with which QEMU has no connection, until cancelled."""
    looks = [0] * len(disks)
    while True:
        await asyncio.sleep(_LOOK_S)
        try:
            found = await monitor.execute("query-chardev")
        except TransportError:
            return  # QEMU has ended, which others notice
        names = {device["label"]: str(device["filename"]) for device in found}
        for index, disk in enumerate(disks):
            apart = names.get(f"disk{index}", "").startswith(_DISCONNECTED) and is_listening(disk.socket_path)
            looks[index] = looks[index] + 1 if apart else 0
            if looks[index] == _LOOKS_MAX:
                say(_hangs_up(disk))


def _hangs_up(disk: VhostUserDisk) -> str:
    smaller = f": if its vrings are smaller than {disk.queue_size} entries, use --queue-size" if disk.queue_size else ""
    return f"the back-end at {disk.socket_path} hangs up on this VM again and again, see what it says{smaller}"
