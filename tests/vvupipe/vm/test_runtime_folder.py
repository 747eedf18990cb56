import contextlib
import fcntl
import json
import os
import socket
import stat
import threading
import time

import pytest

from vvupipe.errors import UserError
from vvupipe.memory import shared
from vvupipe.vm.runtime_folder import RuntimeFolder, base_folder, find_vm, running_vms


@pytest.fixture(autouse=True)
def runtime_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


FIELDS = {"ram": "/vvupipe-none", "ram_bytes": 1 << 20, "functions": {"0000:00:10.0": "f.sock"}, "listening": []}


def started(name=None):
    folder = RuntimeFolder.create(name)
    folder.describe(FIELDS)
    return folder


def test_folder_is_private(tmp_path):
    folder = started()
    assert folder.path == tmp_path / "vvupipe" / "vm0"
    assert stat.S_IMODE(folder.path.stat().st_mode) == stat.S_IMODE(folder.path.parent.stat().st_mode) == 0o700
    folder.close()
    folder.close()
    assert not folder.path.exists()


def test_first_free_name():
    folders = [started() for _ in range(3)]
    assert [folder.name for folder in folders] == ["vm0", "vm1", "vm2"]
    folders[1].close()
    again = started()
    assert again.name == "vm1"
    for folder in (folders[0], again, folders[2]):
        folder.close()


def test_name_that_is_taken_or_malformed():
    folder = started("disk.vm-1")
    with pytest.raises(UserError, match=r"a VM named disk\.vm-1 runs already"):
        RuntimeFolder.create("disk.vm-1")
    for name in ("", "..", "a/b", ".hidden", "x" * 64, "a b"):
        with pytest.raises(UserError, match="cannot be a VM's name"):
            RuntimeFolder.create(name)
    folder.close()


def test_find_vm():
    with pytest.raises(UserError, match="no device VM runs"):
        find_vm(None)
    first = started("a")
    assert find_vm(None).name == find_vm("a").name == "a"
    assert (find_vm("a").pid, find_vm("a").functions) == (os.getpid(), FIELDS["functions"])
    second = started("b")
    with pytest.raises(UserError, match=r"several device VMs run \(a, b\): say which with --vm NAME"):
        find_vm(None)
    with pytest.raises(UserError, match=r"no device VM named c runs \(running: a, b\)"):
        find_vm("c")
    first.close()
    second.close()


def forget(folder):
    """As a kill would: the lock goes, the files stay."""
    os.close(folder._lock_fd)


def test_what_a_killed_vm_left_is_removed(tmp_path):
    name = f"{shared.PREFIX}test-{os.getpid()}"
    os.close(shared.create_named(name, 4096))
    dead, living = tmp_path / "dead.sock", tmp_path / "living.sock"
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(dead))
    living_sock = socket.socket(socket.AF_UNIX)
    living_sock.bind(str(living))
    living_sock.listen()
    killed = RuntimeFolder.create("killed")
    killed.describe({**FIELDS, "ram": name, "listening": [str(dead), str(living), str(tmp_path)]})
    forget(killed)
    assert running_vms() == []
    other = started("other")
    assert not killed.path.exists()
    assert not os.path.exists(f"/dev/shm{name}")
    assert not dead.exists()
    assert living.exists()
    assert started("killed").name == "killed"
    other.close()
    living_sock.close()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", json.dumps({"ram": "/vvupipe-../x", "listening": 3}), json.dumps({"ram": "/other"})]
)
def test_description_that_is_none_hurts_nobody(content):
    killed = RuntimeFolder.create("killed")
    (killed.path / "vm.json").write_text(content)
    forget(killed)
    started("killed").close()


def test_vm_that_is_still_starting_is_not_cleaned_up():
    starting = RuntimeFolder.create("starting")
    assert running_vms() == []
    started("other").close()
    assert starting.path.exists()
    starting.close()


def test_base_that_is_not_ours(tmp_path):
    (tmp_path / "vvupipe").symlink_to("/tmp")
    with pytest.raises(UserError, match="belongs to somebody else"):
        base_folder()


def test_base_without_the_variable(monkeypatch):
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    base = base_folder()
    assert base.stat().st_uid == os.getuid()
    assert stat.S_IMODE(base.stat().st_mode) == 0o700


def test_who_looks_does_not_hinder_a_start(tmp_path, monkeypatch):
    """Somebody lists the VMs in the moment between the making of the lock and its taking."""
    opened = os.open
    lookers = []

    def open_and_be_looked_at(path, *arguments):
        fd = opened(path, *arguments)
        if str(path).endswith("vm0/lock") and not lookers:
            looker = opened(path, os.O_RDWR)
            fcntl.flock(looker, fcntl.LOCK_SH)
            lookers.append(threading.Timer(0.2, os.close, [looker]))
            lookers[0].start()
        return fd

    monkeypatch.setattr(os, "open", open_and_be_looked_at)
    folder = started()
    lookers[0].join()
    assert [vm.name for vm in running_vms()] == ["vm0"]
    folder.close()


def test_two_who_look_do_not_see_each_other(tmp_path):
    """A killed VM is listed by one while the other has its lock."""
    folder = started()
    forget(folder)
    with open(tmp_path / "vvupipe" / "vm0" / "lock", "r+b") as other:
        fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
        assert running_vms() == []


def test_starting_and_looking_at_once():
    """As often as it takes to have met, before there was a shared lock."""
    ended = time.monotonic() + 1
    stop = threading.Event()

    def look():
        while not stop.is_set():
            running_vms()

    lookers = [threading.Thread(target=look) for _ in range(2)]
    for looker in lookers:
        looker.start()
    with contextlib.ExitStack() as stack:
        stack.callback(stop.set)
        while time.monotonic() < ended:
            started().close()
    for looker in lookers:
        looker.join(10)


@pytest.mark.parametrize("name", [".lock", "vm0/.vm.json.new"])
def test_what_cannot_be_written_is_one_line(tmp_path, name):
    base = base_folder()
    if name == ".lock":
        (base / name).mkdir()
        with pytest.raises(UserError, match=r"cannot write .*XDG_RUNTIME_DIR"):
            RuntimeFolder.create(None)
        return
    folder = RuntimeFolder.create(None)
    (base / name).mkdir()
    with pytest.raises(UserError, match=r"cannot write .*XDG_RUNTIME_DIR"):
        folder.describe(FIELDS)
    folder.close()
    assert not folder.path.exists()
