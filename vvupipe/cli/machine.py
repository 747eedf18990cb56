"""The options of `vvupipe run` that every VM with a KERNEL has."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vvupipe.errors import UserError
from vvupipe.units import parse_size

if TYPE_CHECKING:
    from vvupipe.vm.qemu_machine import BlockDisk, Serial, SharedDir

_SERIAL_KINDS = ("stdout", "sink", "file", "unix")


def machine_fields(options: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of vm.qemu_machine.MachineOptions. Raises: UserError."""
    cpus = options["cpus"] or "1"
    if not cpus.isdecimal() or int(cpus) < 1:
        raise UserError(f"--cpus {cpus}: with a KERNEL this is the number of vCPUs")
    fields = {
        "kernel": options["kernel"],
        "initrd": options["initrd"],
        "params": options["params"],
        "cpus": int(cpus),
        "accel": options["accel"],
        "qemu": options["qemu"],
        "serial": parse_serial(options["serial"]),
        "blocks": tuple(parse_block(text) for text in options["blocks"]),
        "shared_dirs": tuple(parse_shared_dir(text) for text in options["shared_dirs"]),
        "hugepages": options["hugepages"],
    }
    if options["name"]:
        fields["name"] = options["name"]
    if options["mem"]:
        fields["mem_mib"] = options["mem"]
    return fields


def parse_option_size(option: str, key: str, text: str | None) -> int | None:
    """The bytes of key=SIZE, None when it is missing. Raises: UserError."""
    if text is None:
        return None
    try:
        return parse_size(text)
    except ValueError as error:
        raise UserError(f"{option} {key}={text}: {error}") from error


def _flag(option: str, text: str, value: str) -> bool:
    if value not in {"true", "false"}:
        raise UserError(f"{option} {text}: ro=true or ro=false")
    return value == "true"


def parse_block(text: str) -> BlockDisk:
    """--block PATH[,ro=true], or crosvm's path=PATH,ro=true. Raises: UserError."""
    from vvupipe.vm.qemu_machine import BlockDisk

    first, *rest = text.split(",")
    read_only = False
    for part in rest:
        key, _, value = part.partition("=")
        if key != "ro":
            raise UserError(f"--block {text}: '{part}' is not ro=true")
        read_only = _flag("--block", text, value or "true")
    path = first.removeprefix("path=")
    if not path:
        raise UserError(f"--block {text}: the image's path is missing")
    return BlockDisk(Path(path), read_only)


def parse_shared_dir(text: str) -> SharedDir:
    """--shared-dir PATH:TAG[:ro=true][:type=9p]. Raises: UserError."""
    from vvupipe.vm.qemu_machine import SharedDir

    path, colon, rest = text.partition(":")
    tag, *extra = rest.split(":")
    if not path or not colon or not tag:
        raise UserError(f"--shared-dir {text}: write it like /folder:tag")
    read_only = False
    for part in extra:
        key, _, value = part.partition("=")
        if key == "ro":
            read_only = _flag("--shared-dir", text, value or "true")
        elif part not in {"type=9p", "type=p9"}:
            raise UserError(f"--shared-dir {text}: '{part}' is not ro=true or type=9p")
    return SharedDir(Path(path), tag, read_only)


def parse_serial(text: str | None) -> Serial:
    """--serial type=TYPE[,path=PATH], with crosvm's other words for a first console allowed. Raises: UserError."""
    from vvupipe.vm.qemu_machine import Serial

    if text is None:
        return Serial()
    values = {}
    for part in text.split(","):
        key, _, value = part.partition("=")
        if key not in {"type", "path", "hardware", "num", "console", "stdin", "earlycon"}:
            raise UserError(f"--serial {text}: '{part}' is not type=TYPE or path=PATH")
        values[key] = value
    if values.get("hardware", "serial") != "serial" or values.get("num", "1") != "1":
        raise UserError(f"--serial {text}: there is one console, hardware=serial,num=1")
    kind = values.get("type", "stdout")
    path = values.get("path")
    if kind not in _SERIAL_KINDS:
        raise UserError(f"--serial {text}: type is one of {', '.join(_SERIAL_KINDS)}")
    if (kind in {"file", "unix"}) != bool(path):
        raise UserError(f"--serial {text}: path=PATH goes with type=file and type=unix")
    return Serial(kind, Path(path) if path else None)  # type: ignore[arg-type]
