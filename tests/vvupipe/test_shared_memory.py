"""POSIX shared memory: nothing stays behind, whoever is killed."""

import os
import subprocess
import sys
from pathlib import Path

import posix_ipc
import pytest

from vvupipe.errors import UserError
from vvupipe.memory import shared

pytestmark = pytest.mark.timeout(60)


def objects(word):
    return [path.name for path in Path("/dev/shm").glob("vvupipe-*") if word in path.name]


def test_unnamed_memory_has_no_name():
    fd = shared.create_unnamed(8192)
    assert os.fstat(fd).st_size == 8192
    assert not [name for name in objects("") if name.startswith(f"vvupipe-{os.getpid()}-")]
    os.close(fd)


def test_memory_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(monkeypatch):
    monkeypatch.setattr(shared, "_YOUNG_S", -1.0)
    name = f"{shared.PREFIX}{os.getuid()}-stale-{os.getpid()}"
    code = f"from vvupipe.memory import shared; shared.create_named({name!r}, 4096); print('made', flush=True); input()"
    owner = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"made\n"
    shared.remove_stale()
    assert objects("-stale-") == [name[1:]]
    owner.kill()
    owner.wait()
    assert name[1:] in shared.remove_stale()
    assert not objects("-stale-")
    owner.stdin.close()
    owner.stdout.close()


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["fifo", "link", "somebody else's"])
def test_what_others_put_there_is_left_alone(monkeypatch, tmp_path, kind):
    monkeypatch.setattr(shared, "_YOUNG_S", -1.0)
    path = Path("/dev/shm") / f"vvupipe-{os.getuid()}-planted-{os.getpid()}"
    target = tmp_path / "fifo"
    os.mkfifo(target)
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(target)
    else:
        if os.getuid():
            pytest.skip("needs root")
        path.touch(mode=0o644)
        os.chown(path, 4711, 4711)
    try:
        assert path.name not in shared.remove_stale()
        assert path.is_symlink() or path.exists()
    finally:
        path.unlink()


def test_no_room_is_one_line_and_leaves_nothing():
    name = f"{shared.PREFIX}{os.getuid()}-room-{os.getpid()}"
    with pytest.raises(UserError, match="no room"):
        shared.create_named(name, 1 << 62)
    assert not objects("-room-")


@pytest.mark.parametrize(
    "error", [posix_ipc.PermissionsError("No permission to access this segment"), OSError(30, "Read-only file system")]
)
def test_memory_that_cannot_be_made_is_one_line(monkeypatch, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(posix_ipc, "SharedMemory", refuse)
    with pytest.raises(UserError, match=r"no shared memory can be made in /dev/shm: .*(permission|Read-only)"):
        shared.create_unnamed(4096)
