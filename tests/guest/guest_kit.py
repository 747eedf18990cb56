"""Booting Debian's kernel with a busybox initramfs as a sibling VM, for tests.

`boot_guest` runs a guest to its end; `Guest` is for tests that interfere with one on its way. A guest is the real
`run_qemu_sibling` in a process (group) of its own, which never outlives the `with` block.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from unpacked_kernel import unpacked

ROOT = Path(__file__).resolve().parents[2]
ENTRY = Path(__file__).with_name("sibling_entry.py")


def load_script(name):
    """The program scripts/NAME.py as a module."""
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
    return sys.modules[name]


initramfs = load_script("build_initramfs")


def missing(what):
    """End the test for want of `what`: a failure where VVUPIPE_FULL_TESTS asks for all tests, else a skip."""
    if os.environ.get("VVUPIPE_FULL_TESTS"):
        pytest.fail(f"{what} (scripts/system_packages.txt lists what the tests need)")
    pytest.skip(what)


@functools.cache
def packed_kernel():
    """The kernel as the distribution ships it, and users boot it."""
    try:
        return initramfs.newest_kernel()
    except initramfs.MissingPart as error:
        return missing(str(error))


@functools.cache
def _folder():
    """A folder that goes away with this process."""
    return tempfile.TemporaryDirectory(prefix="vvupipe-guests-")


@functools.cache
def kernel():
    """The same kernel for guests that shall boot soon: its image is unpacked where that is known how."""
    packed = packed_kernel()
    elf = unpacked(packed.image.read_bytes())
    if elf is None:
        return packed
    image = Path(_folder().name) / f"vmlinux-{packed.version}"
    image.write_bytes(elf)
    return dataclasses.replace(packed, image=image)


@functools.cache
def base_initramfs():
    """Kernel modules and busybox; a guest's script is appended."""
    try:
        return initramfs.build(kernel())
    except initramfs.MissingPart as error:
        return missing(str(error))


@dataclasses.dataclass
class GuestEnd:
    """How a guest ended: its console, what vvupipe said, the exit status and how long it all took."""

    console: str
    said: str
    status: int
    seconds: float

    @property
    def script_status(self):
        """Exit status of the guest's script, None when it never ended."""
        # Not at a line's beginning when the script's own last line has no end.
        found = re.search(rf"{initramfs.MARKER} exit (\d+)", self.console)
        return int(found[1]) if found else None

    @property
    def boot_seconds(self):
        """Guest's uptime when its script began."""
        return float(re.search(rf"^{initramfs.MARKER} ready ([\d.]+)", self.console, re.MULTILINE)[1])

    def word(self, key):
        """The rest of the console line that begins with `key`."""
        return re.search(rf"^{re.escape(key)} (.*?)\r?$", self.console, re.MULTILINE)[1]

    def __str__(self):
        return f"status {self.status} after {self.seconds:.1f} s\n--- said\n{self.said}\n--- console\n{self.console}"


class Console:
    """What a process with a guest writes: its standard output is the guest's console."""

    def __init__(self, process):
        self._process = process
        self._text = {"out": "", "err": ""}
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=(stream, key), daemon=True)
            for key, stream in (("out", process.stdout), ("err", process.stderr))
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream, key):
        while chunk := os.read(stream.fileno(), 65536):
            with self._changed:
                self._text[key] += chunk.decode(errors="replace")
                self._changed.notify_all()

    def text(self, stream="out"):
        """What came on standard output ("out") or standard error ("err")."""
        return self._text[stream]

    def wait_for(self, text, timeout_s=60, stream="out", start=0):
        """Wait until `text` came, `start` characters or later from the beginning."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while text not in self._text[stream][start:]:
                left = deadline - time.monotonic()
                ended = self._process.poll() is not None and not any(reader.is_alive() for reader in self._readers)
                if left <= 0 or ended:
                    pytest.fail(f"{text!r} did not come\n--- said\n{self.text('err')}\n--- console\n{self.text()}")
                self._changed.wait(min(left, 0.5))

    def join(self):
        """The process has ended: take its last words."""
        for reader in self._readers:
            reader.join(5)

    def close(self):
        """Take the last words and close the streams."""
        self.join()
        for stream in (self._process.stdout, self._process.stderr):
            stream.close()


class Guest:
    """A sibling VM under way. `script` is its work, `programs` are those of this machine that it takes for that.

    Other keywords are the fields of QemuSiblingOptions.
    """

    def __init__(self, folder, disks=(), script=None, *, env=None, firmware_only=False, programs=(), **options):
        fields = {"mem_mib": 256, "accel": "tcg", "params": ["quiet"], **options}
        fields["vhost_user_blk"] = [
            {key: str(value) if isinstance(value, Path) else value for key, value in disk.items()}
            for disk in (disk if isinstance(disk, dict) else {"socket_path": disk} for disk in disks)
        ]
        if firmware_only:
            fields["params"] = []
        else:
            fields.setdefault("kernel", str(kernel().image))
            initrd = folder / "initramfs"
            overlays = [initramfs.program_overlay(Path(program)) for program in programs]
            if script is not None:
                overlays.append(initramfs.script_overlay(script))
            initrd.write_bytes(base_initramfs() + b"".join(overlays))
            fields.setdefault("initrd", str(initrd))
        self._fields = fields
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}

    def __enter__(self):
        self._began = time.monotonic()
        self.process = subprocess.Popen(
            [sys.executable, str(ENTRY), json.dumps(self._fields)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=self._env,
            start_new_session=True,
        )
        self._console = Console(self.process)
        return self

    @property
    def console(self):
        """What the guest has written to its console."""
        return self._console.text()

    @property
    def said(self):
        """What vvupipe and QEMU have written to standard error."""
        return self._console.text("err")

    def wait_for(self, text, timeout_s=60, stream="out"):
        """Wait until `text` is on the console (stream "out") or was said ("err")."""
        self._console.wait_for(text, timeout_s, stream)

    def wait(self, timeout_s=90):
        """The guest's end, which must come within `timeout_s`."""
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {timeout_s} s\n--- said\n{self.said}\n--- console\n{self.console}")
        self._console.join()
        return GuestEnd(self.console, self.said, status, time.monotonic() - self._began)

    def __exit__(self, *_):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._console.close()


def boot_guest(folder, disks=(), script=None, *, timeout_s=90, **options):
    """Boot a guest that runs `script`, and wait for its end."""
    with Guest(folder, disks, script, **options) as guest:
        return guest.wait(timeout_s)
