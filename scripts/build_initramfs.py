#!/usr/bin/env python3
"""Build an initramfs for trying virtual disks: the distribution's kernel modules, busybox and a script.

The guest mounts proc, sys and dev, loads the modules in the order that modules.dep asks for, runs its script (or a
shell on the console), says how that ended and powers off. Nothing of the host but the kernel package and
busybox-static is needed, and only Python's standard library: tests import this file as a module.

With --host-root the guest then enters the host's own root, which it gets by 9p, read-only below a writable layer of its
memory (host_root_init.sh): whatever is installed on the host runs in it. guest_init.sh says what the guest prints and
which kernel parameters it heeds.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import lzma
import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

DEFAULT_MODULES = ("virtio_pci", "virtio_blk", "ext4")
HOST_ROOT_MODULES = ("9pnet_virtio", "9p", "overlay", "vfio_iommu_type1", "vfio-pci")
HOST_ROOT_WELCOME = ("iommufd",)
WELCOME_MODULES = ("pvpanic-mmio",)  #: loaded too where the kernel has them: a panic is then told to the hypervisor
MARKER = "vvupipe-guest:"
SCRIPT_PARAMETER = "vvupipe.script"  #: kernel parameter that holds a script in base64; the dot keeps it from init
_HERE = Path(__file__).resolve().parent
_KERNEL_PACKAGES = "linux-image-amd64"
_BUSYBOX_PACKAGE = "busybox-static"


class MissingPart(Exception):
    """Something the initramfs is made of is not installed. The message is one line that says what to do."""


@dataclass(frozen=True)
class Kernel:
    """An installed kernel: its version, its image and its folder of modules."""

    version: str
    image: Path
    modules: Path


def _version_key(version: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.findall(r"\d+|[a-z]+", version)]


def installed_kernels(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> list[Kernel]:
    """Kernels that can be read and have modules, the newest first."""
    found = []
    for image in boot.glob("vmlinuz-*"):
        version = image.name.removeprefix("vmlinuz-")
        folder = modules / version
        if os.access(image, os.R_OK) and (folder / "modules.dep").is_file():
            found.append(Kernel(version, image, folder))
    return sorted(found, key=lambda kernel: _version_key(kernel.version), reverse=True)


def newest_kernel(boot: Path = Path("/boot"), modules: Path = Path("/lib/modules")) -> Kernel:
    """The newest kernel that has modules. Raises: MissingPart."""
    kernels = installed_kernels(boot, modules)
    if kernels:
        return kernels[0]
    unreadable = [str(path) for path in boot.glob("vmlinuz-*") if not os.access(path, os.R_OK)]
    if unreadable:
        raise MissingPart(f"{unreadable[0]} cannot be read by this user: copy it or ask for read permission")
    raise MissingPart(f"no kernel with modules in {boot} and {modules}: install the package {_KERNEL_PACKAGES}")


class ModuleTree:
    """The modules of one kernel and what each needs (depmod's modules.dep, modules.softdep, modules.alias)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, str] = {}
        self._needs: dict[str, list[str]] = {}
        for line in self._lines("modules.dep"):
            path, _, needs = line.partition(":")
            self._files[_module_name(path)] = path
            self._needs[_module_name(path)] = [_module_name(need) for need in needs.split()]
        self._builtin = {_module_name(line) for line in self._lines("modules.builtin")}
        self._before: dict[str, list[str]] = {}
        for line in self._lines("modules.softdep"):
            words = line.split()
            if words[:1] == ["softdep"] and "pre:" in words:
                rest = words[words.index("pre:") + 1 :]
                end = rest.index("post:") if "post:" in rest else len(rest)
                self._before.setdefault(_module_name(words[1]), []).extend(rest[:end])
        self._aliases: dict[str, list[str]] = {}
        for line in self._lines("modules.alias"):
            words = line.split()
            if words[:1] == ["alias"]:
                self._aliases.setdefault(_module_name(words[1]), []).append(_module_name(words[2]))

    def _lines(self, name: str) -> list[str]:
        path = self._folder / name
        return path.read_text().splitlines() if path.is_file() else []

    def load_order(self, names: Iterable[str], welcome: Iterable[str] = ()) -> list[tuple[str, bool]]:
        """(path below the modules' folder, required) of every module to load, what is needed first.

        Not required are those of `welcome`, and what only a soft dependency asks for: it may not fit the guest's CPU.
        Raises: MissingPart for a name that is neither a module nor built in.
        """
        order: dict[str, bool] = {}

        def visit(name: str, required: bool, above: tuple[str, ...]) -> None:
            if name in above:
                return  # soft dependencies may form a circle
            for wish in self._before.get(name, []):
                wished = _module_name(wish)
                for candidate in [wished] if wished in self._files else self._aliases.get(wished, []):
                    visit(candidate, False, (*above, name))
            for need in self._needs[name]:
                visit(need, required, (*above, name))
            order[name] = order.get(name, False) or required

        for name in map(_module_name, names):
            if name in self._files:
                visit(name, True, ())
            elif name not in self._builtin:
                raise MissingPart(f"no module {name} in {self._folder}")
        for name in map(_module_name, welcome):
            if name in self._files:
                visit(name, False, ())
        return [(self._files[name], required) for name, required in order.items()]

    def read(self, path: str) -> bytes:
        """The module's bytes, unpacked: busybox's insmod may know no compression."""
        data = (self._folder / path).read_bytes()
        if path.endswith(".xz"):
            return lzma.decompress(data)
        if path.endswith(".gz"):
            return gzip.decompress(data)
        if path.endswith(".zst"):
            if not shutil.which("zstd"):
                raise MissingPart(f"{path} is compressed with zstd: install the package zstd")
            return subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
        return data


def _module_name(path: str) -> str:
    return re.sub(r"\.ko(\.\w+)?$", "", path.rsplit("/", 1)[-1]).replace("-", "_")


class Archive:
    """A cpio archive of the "newc" form (Linux Documentation/driver-api/early-userspace/buffer-format.rst)."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._count = 0
        self._folders: set[str] = set()

    def _entry(self, name: str, mode: int, content: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self._count += 1
        encoded = name.encode() + b"\0"
        fields = [self._count, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(encoded), 0]
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)

    def folder(self, name: str) -> None:
        """Add a folder and those above it; harmless when it is there."""
        parts = name.strip("/").split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            if path and path not in self._folders:
                self._folders.add(path)
                self._entry(path, stat.S_IFDIR | 0o755)

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        """Add a file, with the folders above it."""
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name.strip("/"), stat.S_IFREG | mode, content)

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device."""
        self.folder(os.path.dirname(name.strip("/")))
        self._entry(name.strip("/"), stat.S_IFCHR | 0o600, device=(major, minor))

    def packed(self) -> bytes:
        """The archive, ended and compressed. The kernel unpacks several such, one after another."""
        whole = Archive()
        whole._data = bytearray(self._data)
        whole._count = self._count
        whole._entry("TRAILER!!!", 0)
        return gzip.compress(bytes(whole._data), compresslevel=6, mtime=0)


def find_busybox() -> Path:
    """The static busybox. Raises: MissingPart when there is none, or only one that needs shared libraries."""
    found = shutil.which("busybox", path=os.environ.get("PATH", "") + ":/bin:/usr/bin")
    if not found:
        raise MissingPart(f"busybox is not installed: install the package {_BUSYBOX_PACKAGE}")
    path = Path(found).resolve()
    if b"/ld-linux" in path.read_bytes()[:4096]:
        raise MissingPart(f"{path} needs shared libraries: install the package {_BUSYBOX_PACKAGE}")
    return path


def build(
    kernel: Kernel,
    modules: Iterable[str] = DEFAULT_MODULES,
    script: str | None = None,
    *,
    host_root: bool = False,
) -> bytes:
    """The initramfs for `kernel`: loads `modules`, runs `script` (None: a shell on the console), powers off.

    host_root: it does so in the host's root, for which the VM needs a 9p share called "host"
    (vvupipe run --shared-dir /:host:ro=true). Raises: MissingPart.
    """
    modules, welcome = list(modules), list(WELCOME_MODULES)
    if host_root:
        modules += HOST_ROOT_MODULES
        welcome += HOST_ROOT_WELCOME
    tree = ModuleTree(kernel.modules)
    archive = Archive()
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", find_busybox().read_bytes(), 0o755)
    archive.file("init", (_HERE / "guest_init.sh").read_bytes(), 0o755)
    if host_root:
        archive.file("etc/guest/host_root_init.sh", (_HERE / "host_root_init.sh").read_bytes())
    lines = []
    for path, required in tree.load_order(modules, welcome):
        name = _module_name(path) + ".ko"
        archive.file(f"modules/{name}", tree.read(path))
        lines.append(f"{'required' if required else 'optional'} {name}\n")
    archive.file("etc/guest/modules", "".join(lines).encode())
    if script is not None:
        archive.file("etc/guest/script", script.encode())
    return archive.packed()


def script_overlay(script: str) -> bytes:
    """An archive that only brings `script`: append it to a built initramfs to give that one something to do."""
    archive = Archive()
    archive.file("etc/guest/script", script.encode())
    return archive.packed()


def files_of_program(program: Path) -> list[Path]:
    """A program of this machine and the libraries that it is linked with, by the paths at which the loader looks."""
    done = subprocess.run(["ldd", str(program)], capture_output=True, text=True, check=True)
    return [program, *(Path(path) for path in re.findall(r"(?:=> |^\s*)(/\S+) \(", done.stdout, re.MULTILINE))]


def program_overlay(program: Path) -> bytes:
    """An archive that brings a program of this machine with its libraries: append it to a built initramfs."""
    archive = Archive()
    for path in files_of_program(program):
        archive.file(str(path), path.read_bytes(), 0o755)
    return archive.packed()


def script_parameter(script: str) -> str:
    """The kernel parameter that brings a short `script` (x86 Linux cuts its command line after 2047 bytes)."""
    return f"{SCRIPT_PARAMETER}={base64.b64encode(script.encode()).decode()}"


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Build an initramfs (kernel modules, busybox, a script).")
    parser.add_argument("--output", "-o", type=Path, required=True, help="where to write the initramfs")
    parser.add_argument("--script", type=Path, help="shell script that the guest runs (default: a shell)")
    parser.add_argument(
        "--module", action="append", default=[], metavar="NAME", help="one more module to load (may be repeated)"
    )
    parser.add_argument("--host-root", action="store_true", help="enter the host's root (see above)")
    parser.add_argument("--kernel-version", help="which kernel's modules (default: the newest that has some)")
    options = parser.parse_args(arguments)
    try:
        kernel = newest_kernel()
        if options.kernel_version:
            known = {kernel.version: kernel for kernel in installed_kernels()}
            if options.kernel_version not in known:
                raise MissingPart(f"no kernel {options.kernel_version}, there is {', '.join(known)}")
            kernel = known[options.kernel_version]
        script = options.script.read_text() if options.script else None
        initramfs = build(kernel, [*DEFAULT_MODULES, *options.module], script, host_root=options.host_root)
        options.output.write_bytes(initramfs)
    except (MissingPart, OSError, UnicodeDecodeError) as error:
        print(f"build_initramfs: {error}", file=sys.stderr)
        return 2
    print(f"{options.output}: for the kernel {kernel.image}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
