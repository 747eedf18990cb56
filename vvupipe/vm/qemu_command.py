"""What the user asks of a QEMU sibling, and the command line that does it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from vvupipe.errors import UserError
from vvupipe.vm.qemu_binary import Accelerator, QemuBinary, accelerator_arguments

_SUN_PATH_BYTES = 108  # sizeof sun_path, unix(7), with the final NUL
_RECONNECT_MS_SINCE = (9, 2)  # the version in which `reconnect` (seconds) became `reconnect-ms`
_MAX_COMMAND_LINE_BYTES = 2047  # COMMAND_LINE_SIZE of x86 Linux


@dataclass(frozen=True, slots=True)
class VhostUserDisk:
    """A virtio-blk disk whose back-end listens on `socket_path`.

    num_queues: None leaves it to QEMU, which takes one for each vCPU. queue_size: descriptors of a ring, a power
    of two. bootindex: the firmware boots from the lowest; None leaves the disk out of its order.
    """

    socket_path: Path
    num_queues: int | None = None
    queue_size: int | None = None
    bootindex: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QemuSiblingOptions:
    """A sibling VM. `params` are joined to the kernel's command line; without `kernel` the firmware boots a disk.

    timeout_s: how long to wait for the back-ends, None for ever. restart_on_reset: go on after a guest's reset
    instead of ending.
    """

    vhost_user_blk: tuple[VhostUserDisk, ...]
    kernel: Path | None = None
    initrd: Path | None = None
    params: tuple[str, ...] = ()
    mem_mib: int = 512
    cpus: int = 1
    name: str = "sibling"
    timeout_s: float | None = None
    qemu: str | None = None
    accel: Accelerator = "auto"
    restart_on_reset: bool = False


def check_options(options: QemuSiblingOptions) -> None:
    """Raises: UserError for what QEMU could not start with."""
    if options.kernel is None:
        if options.initrd is not None or options.params:
            raise UserError("an initrd and kernel parameters need a kernel: name one, such as /boot/vmlinuz-*")
    else:
        _check_readable("kernel", options.kernel, "the package linux-image-amd64 installs /boot/vmlinuz-*")
    if options.initrd is not None:
        _check_readable("initrd", options.initrd, "scripts/build_initramfs.py builds one")
    if options.mem_mib < 1 or options.cpus < 1:
        raise UserError("a VM needs at least 1 MiB of memory and 1 CPU")
    for disk in options.vhost_user_blk:
        if len(os.fsencode(disk.socket_path)) >= _SUN_PATH_BYTES:
            raise UserError(f"socket path {disk.socket_path} is too long: the limit is {_SUN_PATH_BYTES - 1} bytes")
    line = kernel_parameters(options.params)
    if len(line.encode()) > _MAX_COMMAND_LINE_BYTES:
        raise UserError(
            f"{len(line.encode())} bytes of kernel parameters: Linux takes no more than {_MAX_COMMAND_LINE_BYTES}"
        )


def _check_readable(what: str, path: Path, hint: str) -> None:
    try:
        with path.open("rb") as file:
            if not file.read(1):
                raise UserError(f"{what} {path} is empty: {hint}")
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror} ({hint})") from error


def kernel_parameters(params: tuple[str, ...]) -> str:
    """The kernel's command line: the user's words; unless they say otherwise, a serial console and an end at panics."""
    words = " ".join(params).split(" ")
    extra = [default for default in ("console=ttyS0", "panic=-1") if not _names(words, default.partition("=")[0])]
    return " ".join([*params, *extra])


def _names(words: list[str], key: str) -> bool:
    return any(word.startswith(f"{key}=") for word in words)


def _value(text: object) -> str:
    """`text` as a value in a QEMU option, where a comma must be doubled."""
    return str(text).replace(",", ",,")


def qemu_command(options: QemuSiblingOptions, binary: QemuBinary, monitor_fd: int, *, on_terminal: bool) -> list[str]:
    """The command line. The VM starts paused, with its QMP monitor on the inherited socket `monitor_fd`.

    on_terminal: standard input is a terminal, which the guest's console then shares with QEMU's own monitor.
    Raises: UserError when the accelerator cannot be had.
    """
    command = [binary.path, "-name", _value(options.name), "-nodefaults", "-no-user-config", "-display", "none", "-S"]
    command += accelerator_arguments(options.accel)
    # vhost-user: the back-end maps the guest's memory, so that it must be shared.
    command += ["-object", f"memory-backend-memfd,id=ram,size={options.mem_mib}M,share=on"]
    command += ["-machine", "q35,memory-backend=ram", "-m", f"{options.mem_mib}M", "-smp", str(options.cpus)]
    command += ["-device", "pvpanic"]
    command += ["-chardev", f"socket,id=qmp,fd={monitor_fd}", "-mon", "chardev=qmp,mode=control"]
    command += ["-chardev", f"stdio,id=console,signal=off,mux={'on' if on_terminal else 'off'}"]
    command += ["-serial", "chardev:console"]
    if on_terminal:
        command += ["-mon", "chardev=console,mode=readline"]
    if not options.restart_on_reset:
        command += ["-no-reboot"]
    reconnect = "reconnect-ms=1000" if binary.version[:2] >= _RECONNECT_MS_SINCE else "reconnect=1"
    for index, disk in enumerate(options.vhost_user_blk):
        command += ["-chardev", f"socket,id=disk{index},path={_value(disk.socket_path)},{reconnect}"]
        device = f"vhost-user-blk-pci,chardev=disk{index}"
        for key, number in (
            ("num-queues", disk.num_queues),
            ("queue-size", disk.queue_size),
            ("bootindex", disk.bootindex),
        ):
            if number is not None:
                device += f",{key}={number}"
        command += ["-device", device]
    if options.kernel is not None:
        command += ["-kernel", str(options.kernel), "-append", kernel_parameters(options.params)]
    if options.initrd is not None:
        command += ["-initrd", _value(options.initrd)]
    return command
