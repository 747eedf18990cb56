"""What every VM in QEMU has, whatever it is for: CPUs, memory, kernel, console, disks, shared folders."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vvupipe.errors import UserError
from vvupipe.memory import huge_pages
from vvupipe.memory.huge_pages import HugePages
from vvupipe.vm.qemu_backend import is_listening
from vvupipe.vm.qemu_binary import Accelerator, QemuBinary, accelerator_arguments

_MAX_COMMAND_LINE_BYTES = 2047  # COMMAND_LINE_SIZE of x86 Linux
_SUN_PATH_BYTES = 108  # sizeof sun_path, unix(7), with the final NUL
_TAG_MAX_BYTES = 31  # hw/9pfs: MAX_TAG_LEN without its NUL

SerialKind = Literal["stdout", "sink", "file", "unix"]


@dataclass(frozen=True, slots=True)
class Serial:
    """Where the guest's console goes: our standard streams, nowhere, a file, or a UNIX socket that QEMU listens on."""

    kind: SerialKind = "stdout"
    path: Path | None = None


@dataclass(frozen=True, slots=True)
class BlockDisk:
    """A raw image on the host as a virtio-blk disk of QEMU's own."""

    path: Path
    read_only: bool = False


@dataclass(frozen=True, slots=True)
class SharedDir:
    """A folder of the host that the guest can mount: `mount -t 9p -o trans=virtio TAG /mnt`."""

    path: Path
    tag: str
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineOptions:
    """`params` are joined to the kernel's command line; without `kernel` the firmware boots a disk.

    restart_on_reset: go on after a guest's reset instead of ending. hugepages: the RAM is in huge pages.
    """

    kernel: Path | None = None
    initrd: Path | None = None
    params: tuple[str, ...] = ()
    mem_mib: int = 512
    cpus: int = 1
    name: str = "vm"
    qemu: str | None = None
    accel: Accelerator = "auto"
    restart_on_reset: bool = False
    serial: Serial = Serial()
    blocks: tuple[BlockDisk, ...] = ()
    shared_dirs: tuple[SharedDir, ...] = ()
    hugepages: bool = False


@dataclass(frozen=True, slots=True)
class HugeRam:
    """RAM in huge pages: an fd that QEMU must inherit."""

    fd: int
    pages: HugePages


@contextlib.contextmanager
def huge_ram(options: MachineOptions) -> Iterator[HugeRam | None]:
    """A VM's RAM in huge pages, None where they are not wanted. Raises: UserError when there are none."""
    if not options.hugepages:
        yield None
        return
    size_bytes = options.mem_mib << 20
    pages = huge_pages.choose(size_bytes)
    fd = huge_pages.create("vvupipe-guest", size_bytes, pages)
    try:
        yield HugeRam(fd, pages)
    finally:
        os.close(fd)


def memory_argument(options: MachineOptions, huge: HugeRam | None, properties: str = "") -> str:
    """The -object of a RAM that others can map; properties: further ",KEY=VALUE" of a memory-backend-memfd.

    QEMU asks for huge pages (MADV_HUGEPAGE) itself, but only a memory-backend-file can be told to align its mapping.
    """
    size = f"size={options.mem_mib}M,share=on"
    if huge is None:
        return f"memory-backend-memfd,id=ram{properties},{size}"
    return f"memory-backend-file,id=ram,mem-path=/proc/self/fd/{huge.fd},align={huge.pages.page_bytes >> 10}K,{size}"


def check_machine(options: MachineOptions) -> None:
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
    for disk in options.blocks:
        _check_readable("image", disk.path, "--block PATH[,ro=true]")
    for shared in options.shared_dirs:
        status = _status("--shared-dir", shared.path)
        if status is None or not stat.S_ISDIR(status.st_mode):
            raise UserError(f"--shared-dir {shared.path}: no such folder")
        if not shared.tag or len(shared.tag.encode()) > _TAG_MAX_BYTES:
            raise UserError(f"--shared-dir {shared.path}: a tag has 1 to {_TAG_MAX_BYTES} bytes")
    if options.serial.kind == "unix" and options.serial.path:
        _check_console(options.serial.path)
    line = kernel_parameters(options.params)
    if len(line.encode()) > _MAX_COMMAND_LINE_BYTES:
        raise UserError(
            f"{len(line.encode())} bytes of kernel parameters: Linux takes no more than {_MAX_COMMAND_LINE_BYTES}"
        )


def _check_console(path: Path) -> None:
    """Raises: UserError when QEMU could not listen there, or would take away what is in use."""
    check_socket_length(path)
    # A socket that nobody listens on was left by a VM that was killed: QEMU replaces it.
    if _status("--serial", path) is not None and (not path.is_socket() or is_listening(path)):
        raise UserError(f"--serial: {path} exists already: choose another path or remove it")


def remove_console(serial: Serial) -> None:
    """Remove the console's socket of a QEMU that has ended: one that was killed leaves it."""
    if serial.kind == "unix" and serial.path and serial.path.is_socket() and not is_listening(serial.path):
        serial.path.unlink(missing_ok=True)


def check_socket_length(path: Path) -> None:
    """Raises: UserError when QEMU could not use the socket `path`."""
    if len(os.fsencode(path)) >= _SUN_PATH_BYTES:
        raise UserError(f"socket path {path} is too long: the limit is {_SUN_PATH_BYTES - 1} bytes")


def _status(option: str, path: Path) -> os.stat_result | None:
    """None when there is no such file. Raises: UserError when that cannot be told."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from error


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


def value(text: object) -> str:
    """`text` as a value in a QEMU option, where a comma must be doubled."""
    return str(text).replace(",", ",,")


def machine_arguments(
    options: MachineOptions,
    binary: QemuBinary,
    monitor_fd: int,
    *,
    memory: str,
    machine: str = "q35",
    parameters: tuple[str, ...] = (),
    on_terminal: bool,
) -> list[str]:
    """The part of the command line that every VM has. It starts paused, its QMP monitor on the socket `monitor_fd`.

    memory: the -object of the RAM, with id=ram. machine: -machine without its memory. parameters: the kernel's, which
    the user's own come after.
    on_terminal: standard input is a terminal, which the guest's console then shares with QEMU's own monitor.
    Raises: UserError when the accelerator cannot be had.
    """
    command = [binary.path, "-name", f"guest={value(options.name)}"]
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-S"]
    command += accelerator_arguments(options.accel)
    command += ["-object", memory, "-machine", f"{machine},memory-backend=ram"]
    command += ["-m", f"{options.mem_mib}M", "-smp", str(options.cpus)]
    command += ["-device", "pvpanic"]
    command += ["-chardev", f"socket,id=qmp,fd={monitor_fd}", "-qmp", "chardev:qmp"]
    command += _console(options.serial, on_terminal=on_terminal)
    if not options.restart_on_reset:
        command += ["-no-reboot"]
    if options.kernel is not None:
        command += ["-kernel", str(options.kernel), "-append", kernel_parameters((*parameters, *options.params))]
    if options.initrd is not None:
        command += ["-initrd", value(options.initrd)]
    return command


def storage_arguments(options: MachineOptions) -> list[str]:
    """Disks and shared folders, at whatever PCI addresses are left: goes behind what has one of its own."""
    command: list[str] = []
    for index, disk in enumerate(options.blocks):
        read_only = "on" if disk.read_only else "off"
        command += ["-drive", f"if=none,id=block{index},format=raw,file={value(disk.path)},readonly={read_only}"]
        command += ["-device", f"virtio-blk-pci,drive=block{index}"]
    for index, shared in enumerate(options.shared_dirs):
        read_only = ",readonly=on" if shared.read_only else ""
        command += [
            "-fsdev",
            f"local,id=shared{index},path={value(shared.path)},security_model=none,multidevs=remap{read_only}",
        ]
        command += ["-device", f"virtio-9p-pci,fsdev=shared{index},mount_tag={value(shared.tag)}"]
    return command


def _console(serial: Serial, *, on_terminal: bool) -> list[str]:
    if serial.kind == "stdout":
        command = ["-chardev", f"stdio,id=console,signal=off,mux={'on' if on_terminal else 'off'}"]
        command += ["-serial", "chardev:console"]
        return [*command, "-monitor", "chardev:console"] if on_terminal else command
    where = {
        "sink": "null,id=console",
        "file": f"file,id=console,path={value(serial.path)}",
        "unix": f"socket,id=console,server=on,wait=off,path={value(serial.path)}",
    }[serial.kind]
    return ["-chardev", where, "-serial", "chardev:console"]
