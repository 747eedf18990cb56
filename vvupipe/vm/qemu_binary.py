"""Finding a QEMU that is new enough, and what it may use to run guest code."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vvupipe.errors import UserError

PROGRAM = "qemu-system-x86_64"
MINIMUM = (7, 2)  #: the oldest version that the tests run
_PACKAGE = "qemu-system-x86"
_VERSION_TIMEOUT_S = 30

Accelerator = Literal["auto", "kvm", "tcg"]


@dataclass(frozen=True, slots=True)
class QemuBinary:
    """An executable QEMU for x86-64 guests; `version` is (major, minor, micro)."""

    path: str
    version: tuple[int, int, int]


def find_qemu(override: str | None = None) -> QemuBinary:
    """The QEMU to use: `override` (a name or a path), else the one on PATH.

    Raises: UserError when there is none, it does not run, or it is older than MINIMUM.
    """
    wanted = override or PROGRAM
    path = shutil.which(wanted)
    if path is None:
        raise UserError(f"{wanted} is not installed: install the package {_PACKAGE}, or name another with --qemu")
    try:
        answer = subprocess.run(
            [path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, timeout=_VERSION_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"{path} does not run: {error}") from error
    found = re.search(rb"version (\d+)\.(\d+)(?:\.(\d+))?", answer.stdout)
    if answer.returncode or not found:
        raise UserError(f"{path} does not say its version: is it QEMU?")
    version = (int(found[1]), int(found[2]), int(found[3] or 0))
    if version[:2] < MINIMUM:
        raise UserError(
            f"{path} is QEMU {'.'.join(map(str, version))}, too old: "
            f"{'.'.join(map(str, MINIMUM))} or newer is needed (package {_PACKAGE})"
        )
    return QemuBinary(path, version)


def kvm_usable(device: Path = Path("/dev/kvm"), cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether a guest would run on KVM.

    The device alone proves nothing: inside some containers it opens, but no CPU can enter a guest.
    """
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
        flags = re.search(r"^flags\s*:(.*)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:
        return False
    return bool(flags and {"vmx", "svm"} & set(flags[1].split()))


def accelerator_arguments(choice: Accelerator) -> list[str]:
    """QEMU's arguments for `choice`. Raises: UserError when KVM is demanded and cannot work."""
    if choice == "kvm" and not kvm_usable():
        raise UserError("KVM cannot be used here (/dev/kvm, or vmx/svm in /proc/cpuinfo, is missing): try --accel tcg")
    if choice == "kvm" or (choice == "auto" and kvm_usable()):
        return ["-accel", "kvm", "-cpu", "host"]
    return ["-accel", "tcg,thread=multi", "-cpu", "max"]
