"""The embedded sibling on qemu-storage-daemon's vhost-user-blk export."""

import hashlib
import random
import signal
import subprocess
import sys
import time

import pytest

from tests.vvupipe.vm.sibling_kit import children, gone, run, run_json, spawn, storage_daemon, wait_for
from vvupipe.errors import UserError

pytestmark = pytest.mark.timeout(180)
SIZE = 16 << 20


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(random.Random(3).randbytes(SIZE))
    return path


@pytest.fixture
def daemon(tmp_path, image):
    with storage_daemon(tmp_path, image) as running:
        yield running


@pytest.fixture
def read_only(tmp_path, image):
    with storage_daemon(tmp_path, image, writable=False) as running:
        yield running


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_tells_what_it_found(daemon, capsys):
    status, found = run_json(capsys, daemon.socket, name="vm7")
    assert status == 0
    assert found["name"] == "vm7"
    disk = found["disk"]
    assert (disk["size_bytes"], disk["sector_bytes"], disk["read_only"], disk["queues"]) == (SIZE, 512, False, 2)
    assert disk["serial"] == "vhost_user_blk"
    assert disk["contents"] == "no file system or partition table"
    assert {"FLUSH", "MQ", "EVENT_IDX", "INDIRECT_DESC", "VERSION_1"} <= set(disk["features"])
    assert disk["protocol_features"] == ["MQ", "REPLY_ACK", "CONFIG"]
    assert "workload" not in found


def test_tells_it_to_people_too(daemon, capsys):
    assert run(daemon.socket) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "/dev/vda"
    assert lines[1].split() == ["size", "16", "MiB", f"({SIZE}", "bytes)"]


def test_a_file_system_is_recognised(daemon, image, capsys):
    made = subprocess.run(
        ["/sbin/mkfs.ext4", "-q", "-F", "-L", "data", image], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    _, found = run_json(capsys, daemon.socket)
    assert (found["disk"]["file_system"], found["disk"]["label"]) == ("ext4", "data")


@pytest.mark.parametrize("spin_max_ns", [0, 1_000_000_000])
def test_a_driver_that_may_not_spin_sleeps(daemon, capsys, spin_max_ns):
    options = {"workload": "randread", "iodepth": 1, "size": 1 << 20, "spin_max_ns": spin_max_ns}
    _, found = run_json(capsys, daemon.socket, **options)
    result = found["workload"]
    assert result["ok"]
    # An answer may be there before the driver sleeps; but most of 256 come later.
    assert result["sleeps"] > 20 if spin_max_ns == 0 else result["sleeps"] == 0


@pytest.mark.parametrize("workload", ["randread", "randwrite", "read", "write", "randrw", "rw"])
def test_workloads_move_what_they_should(daemon, image, capsys, workload):
    before = image.read_bytes()
    status, found = run_json(capsys, daemon.socket, workload=workload, bs=8192, iodepth=16, size=4 << 20, rwmixread=25)
    result = found["workload"]
    assert (status, result["ok"], result["errors"]) == (0, True, 0)
    reads, writes = result["read"]["requests"], result["write"]["requests"]
    assert reads + writes == (4 << 20) // 8192
    assert result["read"]["bytes"] + result["write"]["bytes"] == 4 << 20
    if workload in ("randread", "read"):
        assert writes == 0
    elif workload in ("randwrite", "write"):
        assert reads == 0
    else:
        assert 0.1 < reads / (reads + writes) < 0.45
    after = image.read_bytes()
    assert (after == before) == (writes == 0)
    assert after[4 << 20 :] == before[4 << 20 :]  # --size is kept
    for part in (result["read"], result["write"]):
        latency = part["latency_ns"]
        assert latency["min"] <= latency["p50"] <= latency["p99"] <= latency["p99.9"] <= latency["max"]


def test_two_jobs_share_the_disk(daemon, image, capsys):
    status, found = run_json(capsys, daemon.socket, workload="write", numjobs=2, bs=4096, cpus=[0])
    assert (status, found["workload"]["write"]["bytes"]) == (0, SIZE)
    before = random.Random(3).randbytes(SIZE)
    after = image.read_bytes()
    assert all(after[k : k + 4096] != before[k : k + 4096] for k in range(0, SIZE, 4096))


def test_the_runtime_is_kept(daemon, capsys):
    status, found = run_json(capsys, daemon.socket, workload="randread", runtime_s=0.5)
    assert status == 0
    assert 0.45 < found["workload"]["duration_s"] < 2.5
    assert found["workload"]["read"]["requests"] > 100


def test_a_runtime_of_less_than_a_nanosecond_ends_at_once(daemon, capsys):
    status, found = run_json(capsys, daemon.socket, workload="read", runtime_s=1e-10)
    assert (status, found["workload"]["unfinished"]) == (0, 0)
    assert found["workload"]["duration_s"] < 10


def test_verify(daemon, capsys):
    status, found = run_json(capsys, daemon.socket, workload="verify", numjobs=2, iodepth=8)
    result = found["workload"]
    assert (status, result["mismatches"], result["passes"]) == (0, 0, 1)
    assert result["verified_blocks"] == SIZE // 4096
    assert result["flushes"] == 2


def test_copy_out_and_sha256(daemon, image, tmp_path, capsys):
    target = tmp_path / "copy.img"
    target.write_text("old")
    status, found = run_json(capsys, daemon.socket, copy_out=target, sha256=True)
    assert status == 0
    assert target.read_bytes() == image.read_bytes()
    assert found["sha256"] == found["copy_out"]["sha256"] == sha256(image)
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob(".*.partial"))


def test_a_copy_that_cannot_be_written_is_refused_before_anything_is_done(daemon, image, tmp_path):
    before = image.read_bytes()
    with pytest.raises(UserError, match="No such file"):
        run(daemon.socket, workload="write", copy_out=tmp_path / "no" / "copy.img")
    assert image.read_bytes() == before


def test_copy_out_to_the_longest_name(daemon, image, tmp_path):
    target = tmp_path / ("ä" * 127)
    assert run(daemon.socket, copy_out=target) == 0
    assert target.read_bytes() == image.read_bytes()


def test_copy_in(daemon, image, tmp_path, capsys):
    source = tmp_path / "in.img"
    source.write_bytes(random.Random(4).randbytes(SIZE))
    status, found = run_json(capsys, daemon.socket, copy_in=source)
    assert status == 0
    assert image.read_bytes() == source.read_bytes()
    assert found["copy_in"]["sha256"] == sha256(source)


def test_little_memory_makes_small_windows(daemon, image, tmp_path):
    target = tmp_path / "copy.img"
    assert run(daemon.socket, copy_out=target, mem_mib=1) == 0
    assert target.read_bytes() == image.read_bytes()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"workload": "nonsense"}, "use one of"),
        ({"workload": "read", "bs": 1000}, "multiple of the disk's sector size"),
        ({"workload": "read", "bs": 0}, "above 0"),
        ({"workload": "read", "bs": 16 << 20}, "larger --mem"),
        ({"workload": "read", "bs": 1 << 32, "iodepth": 1, "mem_mib": 8192}, "--bs 4294967296: .* at most 2 GiB"),
        ({"workload": "read", "iodepth": 257}, "larger --queue-size"),
        ({"workload": "read", "numjobs": 3}, "--numjobs 2 or less"),
        ({"workload": "read", "size": SIZE + 4096}, "the disk has 16 MiB"),
        ({"workload": "read", "size": 512}, "less than one block"),
        ({"workload": "verify", "size": 0}, "--size 0: use a size above 0"),
        ({"workload": "rw", "rwmixread": 101}, "0 to 100"),
        ({"workload": "read", "runtime_s": 0.0}, "above 0"),
        ({"queue_size": 100}, "power of two"),
        ({"mem_mib": 0}, "--mem 0"),
        ({"mem_mib": 1, "queue_size": 1024, "workload": "read", "numjobs": 16}, "larger --mem"),
        ({"copy_in": "missing"}, "No such file"),
        ({"copy_out": "no/folder"}, "No such file"),
        ({"copy_out": "."}, "no regular file"),
        ({"copy_out": "x" * 300}, "File name too long"),
        ({"copy_out": "disk.img/x"}, "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_one_clear_line(daemon, tmp_path, options, match):
    for name in ("copy_in", "copy_out"):
        if name in options:
            options[name] = tmp_path / options[name]
    with pytest.raises(UserError, match=match) as raised:
        run(daemon.socket, **options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("difference", [-512, 512])
def test_copy_in_of_another_size(daemon, image, tmp_path, difference):
    source = tmp_path / "in.img"
    source.write_bytes(bytes(SIZE + difference))
    with pytest.raises(UserError, match=f"{SIZE + difference} bytes is .* than the disk of {SIZE} bytes"):
        run(daemon.socket, copy_in=source)
    assert image.read_bytes() == random.Random(3).randbytes(SIZE)


@pytest.mark.parametrize("work", [{"workload": "randwrite"}, {"workload": "verify"}, {"copy_in": "disk.img"}])
def test_a_read_only_disk_is_not_written(read_only, tmp_path, work):
    if "copy_in" in work:
        work = {"copy_in": tmp_path / "disk.img"}
    with pytest.raises(UserError, match="read-only"):
        run(read_only.socket, **work)


def test_a_read_only_disk_is_read(read_only, image, capsys):
    status, found = run_json(capsys, read_only.socket, sha256=True, workload="randread")
    assert (status, found["disk"]["read_only"], found["sha256"]) == (0, True, sha256(image))


def test_waits_for_the_back_end(daemon, capsys):
    daemon.kill()
    daemon.socket.unlink()
    process = spawn(daemon.socket)
    assert process.stderr.readline() == f"waiting for a back-end at {daemon.socket}\n"
    daemon.start()
    out, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (0, "")
    assert out.startswith("/dev/vda")


def test_a_kill_of_the_back_end_loses_nothing(daemon):
    process = spawn(daemon.socket, workload="verify", runtime_s=5.0, json=True)
    wait_for(lambda: children(process.pid))
    time.sleep(1.5)
    for _ in range(3):
        daemon.kill()
        time.sleep(0.1)
        daemon.start()
        time.sleep(0.8)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert '"mismatches": 0' in out
    assert '"errors": 0' in out
    assert '"reconnects": 3' in out
    assert err.count("requests in flight are done again") == 3


def test_a_back_end_that_stays_away_is_one_line(daemon):
    process = spawn(daemon.socket, workload="randread", runtime_s=60.0, timeout_s=2.0)
    assert process.stdout.readline() == "/dev/vda\n"
    time.sleep(0.5)
    daemon.kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 99
    assert "TransportError: the disk is lost: no back-end" in err
    assert "Traceback" not in err


def test_another_disk_is_not_taken_for_the_first(daemon, image):
    process = spawn(daemon.socket, workload="randread", runtime_s=60.0)
    assert process.stdout.readline() == "/dev/vda\n"
    daemon.kill()
    with open(image, "r+b") as file:
        file.truncate(SIZE // 2)
    daemon.start()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 99
    assert "another disk" in err


def test_interrupt_prints_what_was_measured(daemon):
    process = spawn(daemon.socket, workload="randread", runtime_s=60.0)
    assert process.stdout.readline() == "/dev/vda\n"
    time.sleep(0.5)
    vcpus = children(process.pid)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130, err
    assert "(interrupted)" in out
    assert "IOPS" in out
    assert vcpus
    assert all(gone(pid) for pid in vcpus)


def test_interrupt_without_a_back_end(daemon):
    daemon.kill()
    process = spawn(daemon.socket)
    process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_ends_with_its_vcpus(daemon, number):
    process = spawn(daemon.socket, workload="randread", runtime_s=60.0, numjobs=2)
    assert process.stdout.readline() == "/dev/vda\n"
    vcpus = children(process.pid)
    assert len(vcpus) == 2
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == (143 if number == signal.SIGTERM else -9)
    wait_for(lambda: all(gone(pid) for pid in vcpus))


def test_an_interrupted_copy_leaves_no_file(daemon, tmp_path, image):
    with open(image, "r+b") as file:
        file.truncate(2 << 30)
    daemon.kill()
    daemon.start()
    target = tmp_path / "folder" / "copy.img"
    target.parent.mkdir()
    process = spawn(daemon.socket, copy_out=str(target))
    wait_for(lambda: list(target.parent.iterdir()))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert list(target.parent.iterdir()) == []


@pytest.mark.parametrize("at_work", [True, False])
def test_a_killed_vcpu_is_one_line(daemon, at_work):
    process = spawn(daemon.socket, workload="randread", runtime_s=60.0)
    if at_work:
        assert process.stdout.readline() == "/dev/vda\n"
        time.sleep(0.3)
    wait_for(lambda: children(process.pid))
    (vcpu,) = children(process.pid)
    subprocess.run(["kill", "-9", str(vcpu)], check=True)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 99
    assert "WorkerError: vCPU 0" in err
    assert "killed by signal 9" in err
    assert "Traceback" not in err


def test_importing_it_needs_no_numba():
    code = "import sys, vvupipe.vm.sibling; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
