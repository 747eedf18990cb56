"""Processes of the back-ends: started, watched, measured, ended."""

from __future__ import annotations

import contextlib
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

_END_S = 20
_POLL_S = 0.002
# vhost-user: header (request, flags, size); GET_FEATURES is request 1, its answer a u64.
_HEADER = struct.Struct("=III")
_GET_FEATURES, _VERSION = 1, 1


class Unavailable(Exception):
    """A back-end cannot run here, or not so. The message is one line."""


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to `log`; it is ended with the block."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def check_alive(process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises: Unavailable, with the last line of its log, when the process has ended."""
    if process.poll() is None:
        return
    lines = log.read_text(errors="replace").strip().splitlines()
    raise Unavailable(lines[-1] if lines else f"it ended with status {process.returncode}")


def wait_for_line(process: subprocess.Popen[bytes], log: Path, text: str, timeout_s: float) -> None:
    """Wait until `text` stands in the log. Raises: Unavailable."""
    deadline = time.monotonic() + timeout_s
    while text not in log.read_text(errors="replace"):
        check_alive(process, log)
        if time.monotonic() > deadline:
            raise Unavailable(f"it did not start within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def wait_for_answer(path: Path, process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    """Wait until the vhost-user back-end at `path` answers GET_FEATURES. Raises: Unavailable."""
    deadline = time.monotonic() + timeout_s
    while not _answers(path, process):
        check_alive(process, log)
        if time.monotonic() > deadline:
            raise Unavailable(f"it did not answer within {timeout_s:.0f} s")
        time.sleep(_POLL_S)


def _answers(path: Path, process: subprocess.Popen[bytes]) -> bool:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(0.5)
        try:
            sock.connect(str(path))
            sock.sendall(_HEADER.pack(_GET_FEATURES, _VERSION, 0))
            # A VVU proxy takes the connection and answers when there is a back-end behind it.
            while process.poll() is None:
                try:
                    return len(sock.recv(_HEADER.size + 8)) == _HEADER.size + 8
                except TimeoutError:
                    continue
        except (FileNotFoundError, ConnectionError, BlockingIOError, TimeoutError):
            return False
    return False


def tree(roots: Iterable[int]) -> list[psutil.Process]:
    """The processes `roots` and all below them."""
    found: dict[int, psutil.Process] = {}
    for pid in roots:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            for each in (process, *process.children(recursive=True)):
                found[each.pid] = each
    return list(found.values())


def cpu_seconds(processes: Iterable[psutil.Process]) -> float:
    """CPU time that they used so far, ended threads included (/proc/PID/stat, in steps of 10 ms)."""
    total = 0.0
    for process in processes:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def scheduled_seconds(processes: Iterable[psutil.Process]) -> float:
    """CPU time of the threads that live now, to the nanosecond (/proc/PID/task/TID/schedstat)."""
    total_ns = 0
    for process in processes:
        for path in Path(f"/proc/{process.pid}/task").glob("*/schedstat"):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                total_ns += int(path.read_text().split()[0])
    return total_ns / 1e9


def memory(processes: Iterable[psutil.Process]) -> list[dict[str, Any]]:
    """What each process has in memory, in bytes: of its own (USS), and with its share of what others have too (PSS)."""
    rows = []
    for process in processes:
        info = process.memory_full_info()
        command = " ".join(process.cmdline())
        rows.append({"pid": process.pid, "command": command, "uss": info.uss, "pss": info.pss, "rss": info.rss})
    return rows
