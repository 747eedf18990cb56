"""A real Linux guest on a vhost-user disk: it finds the disk, reads it, and what it writes is there afterwards."""

import contextlib
import hashlib
import os
import subprocess

import psutil
import pytest
from guest_kit import Guest, boot_guest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

SIZE = 64 << 20
SBIN = {**os.environ, "PATH": os.environ.get("PATH", "") + ":/usr/sbin:/sbin"}

FILE_SYSTEM_SCRIPT = """
set -e
echo "size $(blockdev --getsize64 /dev/vda)"
echo "sector $(blockdev --getss /dev/vda)"
echo "before $(sha256sum /dev/vda)"
mount -t ext4 /dev/vda /mnt
echo "host-file $(sha256sum /mnt/from-host)"
dd if=/dev/urandom of=/mnt/from-guest bs=64k count=128 2>/dev/null
echo "guest-file $(sha256sum /mnt/from-guest)"
mkdir /mnt/many
for i in $(seq 200); do echo "file $i" >/mnt/many/$i; done
rm /mnt/many/100
sync
umount /mnt
echo "after $(sha256sum /dev/vda)"
"""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def make_ext4(image, folder):
    """A host-made file system with one file of random bytes; the file's sha256."""
    source = folder / "source"
    source.mkdir()
    content = os.urandom(24 << 20)
    (source / "from-host").write_bytes(content)
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-d", source, image], check=True, env=SBIN, timeout=60)
    return sha256(content)


def debugfs(image, request):
    """The answer of debugfs, which reads the image without mounting it."""
    done = subprocess.run(["debugfs", "-R", request, image], capture_output=True, check=True, env=SBIN, timeout=60)
    return done.stdout


def test_guest_uses_a_host_made_file_system(backend_factory, tmp_path):
    image = tmp_path / "disk.img"
    host_file = make_ext4(image, tmp_path)
    before = sha256(image.read_bytes())
    with backend_factory(image, tmp_path) as backend:
        disk = {"socket_path": backend.socket, "num_queues": backend.queues}
        end = boot_guest(tmp_path, [disk], FILE_SYSTEM_SCRIPT, cpus=2, timeout_s=150)
    assert end.status == 0, end
    assert end.script_status == 0, end
    assert end.word("size") == str(SIZE)
    assert end.word("sector") == "512"
    assert end.word("before").split()[0] == before
    assert end.word("host-file").split()[0] == host_file

    assert end.word("after").split()[0] == sha256(image.read_bytes())
    fsck = ["fsck.ext4", "-fn", image]
    check = subprocess.run(fsck, capture_output=True, text=True, env=SBIN, timeout=60, check=False)
    assert check.returncode == 0, check.stdout + check.stderr
    assert sha256(debugfs(image, "cat /from-guest")) == end.word("guest-file").split()[0]
    assert sha256(debugfs(image, "cat /from-host")) == host_file
    assert [debugfs(image, f"cat /many/{i}") for i in (1, 99, 200)] == [b"file 1\n", b"file 99\n", b"file 200\n"]
    assert debugfs(image, "cat /many/100") == b""


def test_several_guests_one_after_another(backend_factory, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    with backend_factory(image, tmp_path) as backend:
        for turn in range(2):
            script = (
                f"[ $(head -c 1 /dev/vda | hexdump -e '1/1 \"%d\"') = {turn} ] || exit 7\n"
                f"printf '\\{turn + 1:03o}' | dd of=/dev/vda conv=notrunc,fsync 2>/dev/null"
            )
            # One queue, then two: the next front-end need not resemble the last.
            disk = {"socket_path": backend.socket, "num_queues": 1 + turn % backend.queues, "queue_size": 64 << turn}
            end = boot_guest(tmp_path, [disk], script)
            assert (end.status, end.script_status) == (0, 0), end
            assert image.read_bytes()[0] == turn + 1


def test_two_disks_at_once(backend_factory, tmp_path):
    with contextlib.ExitStack() as stack:
        disks = []
        for name in ("a", "b"):
            folder = tmp_path / name
            folder.mkdir()
            (folder / "disk.img").write_bytes(name.encode() * (1 << 20))
            backend = stack.enter_context(backend_factory(folder / "disk.img", folder))
            disks.append({"socket_path": backend.socket, "num_queues": backend.queues})
        end = boot_guest(tmp_path, disks, "dd if=/dev/vda of=/dev/vdb bs=4k count=1 oflag=direct conv=fsync")
    assert (end.status, end.script_status) == (0, 0), end
    assert (tmp_path / "a/disk.img").read_bytes() == b"a" * (1 << 20)
    assert (tmp_path / "b/disk.img").read_bytes() == b"a" * 4096 + b"b" * ((1 << 20) - 4096)


KILL_SCRIPT = """
half=$((4 << 20))
first=$(dd if=/dev/vda bs=1M count=4 2>/dev/null | sha256sum)
echo 3 >/proc/sys/vm/drop_caches

# CPU 0, and with it one queue, reads the first half; CPU 1, and the other queue, writes the second.
reader() {
    for i in $(seq 10); do
        now=$(dd if=/dev/vda bs=@BS@ iflag=direct,count_bytes count=$half 2>/dev/null | sha256sum)
        [ "$now" = "$first" ] || exit 9
        echo "read $i"
    done
}
writer() {
    for i in $(seq 10); do
        dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
        dd if=/tmp/data of=/dev/vda bs=@BS@ oflag=direct,seek_bytes seek=$half conv=notrunc 2>/dev/null || exit 10
        dd if=/dev/vda bs=@BS@ skip=$((half / @BS@)) iflag=direct 2>/dev/null | cmp -s - /tmp/data || exit 11
        echo "written $i"
    done
}
reader & reader=$!
taskset -p 1 $reader >/dev/null
writer & writer=$!
taskset -p 2 $writer >/dev/null
wait $reader || exit $?
wait $writer || exit $?
echo "last $(sha256sum </tmp/data)"
"""


def guest_through(interfere, factory, folder):
    """A guest that reads and writes with both queues while `interfere(backend)` happens three times."""
    image = folder / "disk.img"
    image.write_bytes(os.urandom(8 << 20))
    # 1 MiB is cut into three requests in flight at once, 256 KiB is one.
    script = KILL_SCRIPT.replace("@BS@", str((1 << 20) if factory.tracks_inflight else (256 << 10)))
    with factory(image, folder) as backend:
        disk = {"socket_path": backend.socket, "num_queues": backend.queues}
        with Guest(folder, [disk], script, cpus=2) as guest:
            for turn in (2, 4, 6):
                guest.wait_for(f"read {turn}")
                guest.wait_for(f"written {turn}")
                interfere(backend)
            end = guest.wait()
    assert (end.status, end.script_status) == (0, 0), end
    assert end.word("last").split()[0] == sha256(image.read_bytes()[4 << 20 :])
    return end


def test_guest_goes_on_when_a_killed_backend_is_started_again(backend_factory, tmp_path):
    guest_through(lambda backend: backend.kill_and_restart(), backend_factory, tmp_path)


def test_guest_sees_nothing_of_killed_workers(worker_backend_factory, tmp_path):
    killed = set()

    def kill_workers(backend):
        workers = [child for child in psutil.Process(backend.serving.pid).children() if is_worker(child)]
        assert workers
        for worker in workers:
            killed.add(worker)  # psutil tells processes apart by their start time as well
            worker.kill()

    end = guest_through(kill_workers, worker_backend_factory, tmp_path)
    assert "qemu-system" not in end.said, end  # no disconnect on the front-end's side
    assert len(killed) >= 3, "each time others were there"


def is_worker(process):
    return "vvupipe" in " ".join(process.cmdline()) and "resource_tracker" not in " ".join(process.cmdline())
