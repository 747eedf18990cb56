"""What the user asks of a QEMU sibling, and the command line that does it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.vm.qemu_binary import QemuBinary
from vvupipe.vm.qemu_machine import (
    HugeRam,
    MachineOptions,
    check_machine,
    check_socket_length,
    machine_arguments,
    memory_argument,
    storage_arguments,
    value,
)

_QUEUE_SIZE_MAX = 1024  # QEMU's VIRTQUEUE_MAX_SIZE
_RECONNECT_MS_SINCE = (9, 2)  # the version in which `reconnect` (seconds) became `reconnect-ms`


@dataclass(frozen=True, slots=True)
class VhostUserDisk:
    """A virtio-blk disk whose back-end listens on `socket_path`.

    num_queues: None leaves it to QEMU, which takes one for each vCPU. queue_size: descriptors of a ring, a power
    of two. bootindex: the firmware boots from the lowest; None leaves the disk out of its order. properties: further
    KEY=VALUE of QEMU's vhost-user-blk-pci, such as packed=on.
    """

    socket_path: Path
    num_queues: int | None = None
    queue_size: int | None = None
    bootindex: int | None = None
    properties: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSiblingOptions(MachineOptions):
    """A sibling VM. timeout_s: how long to wait for the back-ends, None for ever.

    iommu: give it one (Intel's), which its disks use.
    """

    vhost_user_blk: tuple[VhostUserDisk, ...]
    name: str = "sibling"
    timeout_s: float | None = None
    iommu: bool = False


def check_options(options: QemuSiblingOptions) -> None:
    """Raises: UserError for what QEMU could not start with."""
    check_machine(options)
    named = {os.path.realpath(disk.socket_path) for disk in options.vhost_user_blk}
    if len(named) < len(options.vhost_user_blk):
        raise UserError("one socket is given for two disks: a back-end serves one at a time, give each its own")
    for disk in options.vhost_user_blk:
        check_socket_length(disk.socket_path)
        size = disk.queue_size
        if size is not None and (not 2 <= size <= _QUEUE_SIZE_MAX or size & (size - 1)):
            raise UserError(f"--queue-size {size}: use a power of two from 2 to {_QUEUE_SIZE_MAX}")


def qemu_command(
    options: QemuSiblingOptions,
    binary: QemuBinary,
    monitor_fd: int,
    *,
    on_terminal: bool,
    memory_path: Path | None = None,
    huge: HugeRam | None = None,
) -> list[str]:
    """The command line (see machine_arguments).

    memory_path: the file whose first bytes are the RAM; None: memory of QEMU's own, shared with the back-ends.
    huge: the RAM, instead of either.
    """
    if memory_path is None:
        # vhost-user: the back-end maps the guest's memory, so that it must be shared. Unsealed, so that a proxy can
        # round the file up to the size of a BAR.
        memory = memory_argument(options, huge, ",seal=off")
    else:
        memory = f"memory-backend-file,id=ram,mem-path={value(memory_path)},size={options.mem_mib}M,share=on"
    command = machine_arguments(options, binary, monitor_fd, memory=memory, on_terminal=on_terminal)
    reconnect = "reconnect-ms=1000" if binary.version[:2] >= _RECONNECT_MS_SINCE else "reconnect=1"
    if options.iommu:
        command += ["-device", "intel-iommu,intremap=off,device-iotlb=on"]
    for index, disk in enumerate(options.vhost_user_blk):
        command += ["-chardev", f"socket,id=disk{index},path={value(disk.socket_path)},{reconnect}"]
        device = f"vhost-user-blk-pci,chardev=disk{index}"
        for key, number in (
            ("num-queues", disk.num_queues),
            ("queue-size", disk.queue_size),
            ("bootindex", disk.bootindex),
        ):
            if number is not None:
                device += f",{key}={number}"
        if options.iommu:
            # A guest invalidates a device's translations only where it has ATS, which takes a PCI Express port.
            command += ["-device", f"pcie-root-port,id=disk-port{index},chassis={index + 1}"]
            device += f",bus=disk-port{index},disable-legacy=on,iommu_platform=on,ats=on"
        device += "".join(f",{each}" for each in disk.properties)
        command += ["-device", device]
    return command + storage_arguments(options)
