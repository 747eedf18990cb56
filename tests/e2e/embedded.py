"""The main job's command lines, each in a process of its own, in one runtime folder."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

ADDRESS = "0000:00:10.0"


class Scene:
    """Starts vvupipe commands; `close` ends what still runs."""

    def __init__(self, folder):
        self.folder = folder
        self.socket = folder / "vhost-user.socket"
        self.name = f"e2e-{os.getpid()}"
        self.environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        self._started = []

    def start(self, *arguments, ready=True):
        """A long-running command; with `ready`, it has said so."""
        process = subprocess.Popen(
            [sys.executable, "-m", "vvupipe", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )
        self._started.append(process)
        if ready:
            said = ""
            while '"ready"' not in said:
                line = process.stdout.readline()
                assert line, said
                said += line
        return process

    def run(self, *arguments, timeout=60):
        """A command that ends by itself."""
        return subprocess.run(
            [sys.executable, "-m", "vvupipe", *map(str, arguments)],
            capture_output=True,
            text=True,
            env=self.environment,
            timeout=timeout,
            check=False,
        )

    def device_vm(self, *options):
        proxy = f"{self.socket},addr={ADDRESS}"
        return self.start("run", "--vvu-proxy", proxy, "--name", self.name, "--json", *options)

    def backend(self, image):
        return self.start("device", "block", "--vfio", ADDRESS, "--file", image, "--json", "--cpus", first_cpu())

    def sibling(self, *work):
        options = ["--timeout", "30s", "--cpus", last_cpu(), "--json"]
        return self.start("run", "--vhost-user-blk", self.socket, *options, *work, ready=False)

    def end(self, process, signal_number=signal.SIGTERM):
        """End a command as its user would; gives (exit status, what it printed since)."""
        process.send_signal(signal_number)
        printed, _ = process.communicate(timeout=20)
        return process.returncode, printed

    def kill(self, process):
        process.kill()
        process.communicate(timeout=20)

    def close(self):
        for process in self._started:
            if process.poll() is None:
                process.kill()
                process.communicate()

    def left_behind(self):
        """Processes, sockets, folders and shared memory of this scene that are still there."""
        mine = str(self.folder)
        processes = [
            process.info
            for process in psutil.process_iter(["pid", "cmdline", "environ"])
            if process.info["pid"] != os.getpid() and (process.info["environ"] or {}).get("XDG_RUNTIME_DIR") == mine
        ]
        files = [path for path in self.folder.glob("vvupipe/*") if not path.name.startswith(".")]
        sockets = [path for path in self.folder.rglob("*") if path.is_socket()]
        memory = list(Path("/dev/shm").glob(f"vvupipe-{os.getuid()}-{self.name}-*"))
        return processes + files + sockets + memory


def first_cpu():
    return min(os.sched_getaffinity(0))


def last_cpu():
    return max(os.sched_getaffinity(0))
