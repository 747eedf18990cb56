"""A real device VM under way, with a shell on its console that the test types into."""

import contextlib
import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from guest_kit import ROOT, Console, initramfs, kernel, missing

from vvupipe.vm.qemu_backend import is_listening
from vvupipe.workers import kernel_cache

VVUPIPE = [sys.executable, "-P", "-m", "vvupipe"]

#: Reads commands from the console and answers each with its output and "<<status of number>>".
SHELL = """
stty -echo
echo guest-shell
number=0
while read -r line; do
    eval "$line" </dev/null
    echo "<<$? of $number>>"
    number=$((number + 1))
done
"""


@functools.cache
def host_root_initramfs():
    """Enters the host's root; the script is appended."""
    try:
        return initramfs.build(kernel(), host_root=True)
    except initramfs.MissingPart as error:
        return missing(str(error))


def guest_command(*arguments):
    """What is typed in the guest to run the very vvupipe that the test runs."""
    return shlex.join([*VVUPIPE, *map(str, arguments)])


def make_image(folder, name, size_bytes):
    """An image of zeroes that takes no space; its path."""
    path = folder / name
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


class DeviceVm:
    """`vvupipe run --vvu-proxy ... KERNEL`; `run` types a command into it. `folder` is /share in the guest."""

    def __init__(self, folder, proxies, *options, mem=512, cpus=2):
        """proxies: {PCI address: socket path}."""
        self.folder = folder
        self.sockets = dict(proxies)
        initrd = folder / "device-vm.initramfs"
        initrd.write_bytes(host_root_initramfs() + initramfs.script_overlay(SHELL))
        self._command = [*VVUPIPE, "run", "-v"]
        for address, path in proxies.items():
            self._command += ["--vvu-proxy", f"{path},addr={address}"]
        self._command += ["--initrd", initrd, "--mem", mem, "--cpus", cpus, "--accel", "tcg", "--name", "device-vm"]
        self._command += ["--shared-dir", "/:host:ro=true", "--shared-dir", f"{folder}:share"]
        parameters = f"quiet vvupipe.share=share:/share vvupipe.cwd={ROOT} vvupipe.env=PYTHONPATH={ROOT}"
        parameters += f" vvupipe.env=VVUPIPE_CACHE_DIR={kernel_cache.folder().parent}"
        self._command += ["-p", parameters, *options, kernel().image]
        self._number = 0
        self._backends = 0

    def __enter__(self):
        runtime = self.folder / "runtime"
        runtime.mkdir(mode=0o700, exist_ok=True)
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(runtime), "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [str(part) for part in self._command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment,
            start_new_session=True,
        )
        self._console = Console(self.process)
        try:
            self.wait_for("guest-shell", 90)
        except BaseException:
            self.__exit__()
            raise
        return self

    @property
    def console(self):
        """What the guest wrote so far."""
        return self._console.text()

    @property
    def said(self):
        """What vvupipe wrote to standard error."""
        return self._console.text("err")

    def wait_for(self, text, timeout_s=120, stream="out", start=0):
        """See Console."""
        self._console.wait_for(text, timeout_s, stream, start)

    def type(self, command):
        """Type a line and do not wait."""
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()
        self._number += 1

    def run(self, command, timeout_s=120):
        """(status, output) of a command in the guest."""
        start = len(self.console)
        number = self._number
        self.type(command)
        self.wait_for(f" of {number}>>", timeout_s, start=start)
        text = self.console[start:].replace("\r", "")
        output, status = re.search(rf"(.*?)<<(\d+) of {number}>>", text, re.DOTALL).groups()
        return int(status), output.removeprefix("\n")  # the end of the line before may come late

    def check(self, command, timeout_s=120):
        """The output of a command that must succeed."""
        status, output = self.run(command, timeout_s)
        assert status == 0, (command, output, self.said)
        return output

    def start_backend(self, address, image):
        """Start a back-end in the guest for an image in the shared folder; its pid there, once it serves."""
        return self.start_backends({address: ["--file", f"/share/{image}"]})[0]

    def start_backends(self, images, timeout_s=120):
        """Start a back-end for each address at once; their pids in the guest, once all serve.

        images: {address: the options that say what it serves}.
        """
        started = {}
        for address, image in images.items():
            self._backends += 1
            self.backend_log = self.folder / f"back-end{self._backends}.log"
            command = guest_command("device", "block", "--vfio", address, "--bind", *image, "--json", "-v")
            pid = int(self.check(f"{command} >/share/{self.backend_log.name} 2>&1 & echo $!"))
            started[pid] = self.backend_log
        deadline = time.monotonic() + timeout_s
        for pid, log in started.items():
            while '"event": "ready"' not in (text := log.read_text() if log.exists() else ""):
                if time.monotonic() > deadline:
                    processes = self.run(f"ps; cat /proc/{pid}/stack; dmesg | tail -n 20")[1]
                    pytest.fail(f"no back-end\n--- log\n{text}\n--- guest\n{processes}\n--- said\n{self.said}")
                time.sleep(0.1)
        return list(started)

    def rebooted(self):
        """The guest was told to reboot: wait for the shell of its next life."""
        start = len(self.console)
        self._number = 0
        self.wait_for("guest-shell", 90, start=start)

    def wait_listening(self, address):
        """Wait until the proxy listens."""
        deadline = time.monotonic() + 20
        while not is_listening(self.sockets[address]):
            assert time.monotonic() < deadline, self.said
            time.sleep(0.05)

    def kill(self):
        """kill -9 of vvupipe itself, which ends QEMU too."""
        self.process.kill()
        self.process.wait(20)

    def end(self):
        """Power off in good order; the exit status."""
        self.type("exit 0")
        return self.process.wait(30)

    def __exit__(self, *_):
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._console.close()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
