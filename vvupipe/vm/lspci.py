"""The functions of an embedded VM as lspci prints them."""

from __future__ import annotations

import shutil
import subprocess

from vvupipe.pci.address import PciAddress
from vvupipe.vm.runtime_folder import RunningVm, find_vm

SYSFS = "sys"  #: folder of the sysfs-shaped tree in a VM's runtime folder
_LSPCI_S = 10.0


def lspci_lines(vm_name: str | None) -> list[str]:
    """What lspci prints for each function of a VM; the stock lspci says it when it is installed.

    Raises: UserError when there is no such VM.
    """
    vm = find_vm(vm_name)
    path = vm.folder / SYSFS / "bus" / "pci"
    lspci = shutil.which("lspci")
    if lspci:
        try:
            done = subprocess.run(
                [lspci, "-A", "linux-sysfs", "-O", f"sysfs.path={path}"],
                capture_output=True, text=True, timeout=_LSPCI_S, check=False,
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return _own_lines(vm)
        if done.returncode == 0 and done.stdout:
            return done.stdout.splitlines()
    return _own_lines(vm)


def _own_lines(vm: RunningVm) -> list[str]:
    return [function_line(PciAddress.parse(address)) for address in sorted(vm.functions)]


def function_line(address: PciAddress) -> str:
    """The line of a VVU function, as lspci without a name for the device prints it."""
    return f"{address.short} Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)"
