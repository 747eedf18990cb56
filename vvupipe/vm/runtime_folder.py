"""Where running VMs are found: `BASE/NAME/` with a lock that its process holds, and vm.json.

A VM that was killed leaves its folder, its RAM's name and its socket files; the next start (or look) removes them.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vvupipe.errors import UserError
from vvupipe.memory import shared
from vvupipe.unix_path import reachable

log = logging.getLogger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_LOCK = "lock"
_DESCRIPTION = "vm.json"
_STARTING_LOCK = ".lock"


def _base_path() -> Path:
    given = os.environ.get("XDG_RUNTIME_DIR")
    user = Path(f"/run/user/{os.getuid()}")
    if given:
        return Path(given) / "vvupipe"
    if user.is_dir() and os.access(user, os.W_OK):
        return user / "vvupipe"
    if os.getuid() == 0:
        return Path("/run/vvupipe")
    return Path(tempfile.gettempdir()) / f"vvupipe-{os.getuid()}"


def base_folder() -> Path:
    """`$XDG_RUNTIME_DIR/vvupipe`, or a folder of this user under /run or the temporary folder; 0700, created.

    Raises: UserError when it cannot be made or belongs to somebody else.
    """
    base = _base_path()
    try:
        base.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = base.lstat()
    except OSError as error:
        raise UserError(f"cannot make {base}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours") from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise UserError(f"{base} belongs to somebody else; set XDG_RUNTIME_DIR to a folder of yours")
    if status.st_mode & 0o077:
        base.chmod(0o700)
    return base


@dataclass(frozen=True, slots=True)
class RunningVm:
    """A VM that runs now, as its vm.json tells."""

    name: str
    folder: Path
    pid: int
    ram_name: str
    ram_bytes: int
    #: address -> name of its vfio-user socket in `folder`
    functions: dict[str, str]


class RuntimeFolder:
    """The folder of one VM, held by a lock as long as the process lives."""

    def __init__(self, path: Path, lock_fd: int) -> None:
        self.path = path
        self.name = path.name
        self._lock_fd = lock_fd

    @classmethod
    def create(cls, name: str | None) -> RuntimeFolder:
        """Take the folder called `name`, or the first free of vm0, vm1, ...; first remove what killed VMs left.

        Raises: UserError when the name is taken or malformed, or nothing can be written there.
        """
        if name is not None and not _NAME.fullmatch(name):
            raise UserError(f"'{name}' cannot be a VM's name: use letters, digits, '.', '_' and '-', 63 at most")
        base = base_folder()
        with _starting(base):
            _remove_stale(base)
            if name is None:
                name = next(f"vm{k}" for k in range(1 << 16) if not (base / f"vm{k}").exists())
            path = base / name
            try:
                path.mkdir(mode=0o700)
            except FileExistsError:
                raise UserError(f"a VM named {name} runs already: choose another --name or stop that one") from None
            except OSError as error:
                raise UserError(f"cannot make {path}: {error.strerror}") from error
            try:
                lock_fd = _open_lock(path / _LOCK)
            except BaseException:
                shutil.rmtree(path, ignore_errors=True)
                raise
            # It waits: whoever lists VMs just now has it for a moment.
            fcntl.flock(lock_fd, fcntl.LOCK_EX)
        return cls(path, lock_fd)

    def describe(self, fields: dict[str, Any]) -> None:
        """Write vm.json in one step. Raises: UserError."""
        temporary = self.path / f".{_DESCRIPTION}.new"
        try:
            temporary.write_text(json.dumps({"pid": os.getpid(), **fields}, indent=1) + "\n")
            temporary.replace(self.path / _DESCRIPTION)
        except OSError as error:
            raise _unwritable(temporary, error) from error

    def close(self) -> None:
        """Remove the folder. Harmless when called again."""
        if self._lock_fd >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock_fd)
            self._lock_fd = -1


def _open_lock(path: Path) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> UserError:
    return UserError(f"cannot write {path}: {error.strerror}; set XDG_RUNTIME_DIR to a folder of yours that has room")


@contextlib.contextmanager
def _starting(base: Path) -> Iterator[None]:
    """One at a time may create or clean up."""
    fd = _open_lock(base / _STARTING_LOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _folders(base: Path) -> list[Path]:
    return sorted(path for path in base.iterdir() if path.is_dir() and _NAME.fullmatch(path.name))


def _is_held(path: Path) -> bool:
    """Whether a living process holds the folder's lock."""
    try:
        fd = os.open(path / _LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared, so that two who look do not take each other for the VM.
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _remove_stale(base: Path) -> None:
    for name in shared.remove_stale():
        log.info("removed the shared memory %s of a killed VM", name)
    for path in _folders(base):
        if _is_held(path):
            continue
        log.info("removing what the killed VM %s left", path.name)
        description = _read_description(path)
        ram_name = description.get("ram")
        if isinstance(ram_name, str) and ram_name.startswith(shared.PREFIX) and "/" not in ram_name[1:]:
            shared.unlink(ram_name)
        listening = description.get("listening", [])
        for text in listening if isinstance(listening, list) else []:
            _remove_dead_socket(Path(str(text)))
        shutil.rmtree(path, ignore_errors=True)


def _remove_dead_socket(path: Path) -> None:
    """Remove a socket file that nobody listens on; another VM may have taken the path meanwhile."""
    if not path.is_socket():
        return
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        try:
            with reachable(path) as short:
                probe.connect(short)
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.debug("%s stays: %s", path, error)


def _read_description(path: Path) -> dict[str, Any]:
    try:
        description = json.loads((path / _DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) else {}


def running_descriptions() -> list[dict[str, Any]]:
    """vm.json of every device VM of this user that runs. Creates nothing."""
    if not _base_path().is_dir():
        return []
    return [_read_description(path) for path in _folders(base_folder()) if _is_held(path)]


def running_vms() -> list[RunningVm]:
    """Every embedded device VM of this user that runs, by name."""
    found = []
    for path in _folders(base_folder()):
        description = _read_description(path) if _is_held(path) else {}
        if "ram" in description:
            found.append(
                RunningVm(
                    path.name,
                    path,
                    int(description["pid"]),
                    str(description["ram"]),
                    int(description["ram_bytes"]),
                    dict(description["functions"]),
                )
            )
    return found


def find_vm(name: str | None) -> RunningVm:
    """The VM of that name, or the only one. Raises: UserError."""
    running = running_vms()
    names = ", ".join(vm.name for vm in running) or "none"
    if name is not None:
        for vm in running:
            if vm.name == name:
                return vm
        raise UserError(f"no device VM named {name} runs (running: {names}); start it with 'vvupipe run --vvu-proxy'")
    if not running:
        raise UserError("no device VM runs: start one with 'vvupipe run --vvu-proxy SOCK'")
    if len(running) > 1:
        raise UserError(f"several device VMs run ({names}): say which with --vm NAME")
    return running[0]
