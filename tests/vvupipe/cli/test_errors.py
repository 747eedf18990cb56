"""Bad input of a user: one clear line on standard error, exit status 2, nothing left behind."""

import os
import socket
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def vvupipe(tmp_path):
    def run(*arguments, timeout=40):
        return subprocess.run(
            [sys.executable, "-m", "vvupipe", *map(str, arguments)],
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)},
            check=False,
        )

    return run


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def assert_refused(finished, *words):
    assert finished.returncode == 2, finished
    assert finished.stdout == ""
    (line,) = finished.stderr.splitlines()
    for word in words:
        assert word in line


def test_no_place_to_serve(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image), "--socket", "--fd", "--vfio")


def test_two_places_to_serve(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image, "--socket", "/tmp/x", "--fd", 3), "one of")


def test_missing_image(vvupipe, tmp_path):
    assert_refused(vvupipe("device", "block", "--file", tmp_path / "no.img", "--socket", "s"), "no such image")
    assert not (tmp_path / "s").exists()


def test_image_of_odd_size(vvupipe, tmp_path):
    (tmp_path / "odd.img").write_bytes(bytes(1000))
    assert_refused(vvupipe("device", "block", "--file", tmp_path / "odd.img", "--socket", "s"), "multiple", "truncate")


def test_image_without_permission(vvupipe, image):
    if os.getuid() == 0:
        pytest.skip("root may read everything")
    image.chmod(0)
    assert_refused(vvupipe("device", "block", "--file", image, "--socket", "s"), "Permission denied")


@pytest.mark.parametrize("size", ["3", "1", "65536", "0"])
def test_queue_size(vvupipe, image, size):
    finished = vvupipe("device", "block", "--file", image, "--socket", "s", "--queue-size", size)
    assert_refused(finished, "--queue-size", "power of two")


def test_engine_that_does_not_go_with_direct_io(vvupipe, image):
    finished = vvupipe("device", "block", "--file", image, "--socket", "s", "--engine", "mmap", "--direct")
    assert_refused(finished, "--engine mmap", "--direct")


def test_engine_that_does_not_go_with_sqpoll(vvupipe, image):
    finished = vvupipe("device", "block", "--file", image, "--socket", "s", "--engine", "sync", "--sqpoll")
    assert_refused(finished, "--sqpoll")


def test_polling_of_a_device_that_cannot_be_polled(vvupipe, image):
    finished = vvupipe("device", "block", "--file", image, "--socket", "s", "--iopoll")
    assert_refused(finished, "--iopoll", "add --direct")


@pytest.mark.parametrize("cpus", ["x", "0-", "4095", "1-0", "0,0"])
def test_cpus(vvupipe, image, cpus):
    assert_refused(vvupipe("device", "block", "--file", image, "--socket", "s", "--cpus", cpus), "CPU")


@pytest.mark.parametrize("vm", ["--vhost-user-blk", "--vvu-proxy"])
@pytest.mark.parametrize("cpus", ["x", "0,0", "4095"])
def test_cpus_of_a_vm(vvupipe, vm, cpus):
    finished = vvupipe("run", vm, "s", "--cpus", cpus)
    assert_refused(finished, "CPU 4095 cannot be used" if cpus == "4095" else "'--cpus'")


@pytest.mark.parametrize(("mem", "says"), [(15, "16"), (999_999_999, "--mem 999999999: use at most 1048576 MiB")])
def test_memory_of_a_sibling(vvupipe, mem, says):
    assert_refused(vvupipe("run", "--vhost-user-blk", "s", "--mem", mem), says)


def test_socket_in_use(vvupipe, image, tmp_path):
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "used.sock"))
        other.listen()
        finished = vvupipe("device", "block", "--file", image, "--socket", tmp_path / "used.sock")
        assert_refused(finished, "in use by another process")
    assert (tmp_path / "used.sock").exists()


def test_socket_in_a_folder_that_does_not_exist(vvupipe, image, tmp_path):
    finished = vvupipe("device", "block", "--file", image, "--socket", tmp_path / "no" / "s")
    assert_refused(finished, "cannot listen")


def test_socket_path_that_is_a_file(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image, "--socket", image), "cannot listen", "in use")
    assert image.stat().st_size == 1 << 20


def test_socket_of_a_killed_process_is_taken_over(image, tmp_path):
    path = tmp_path / "stale.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    command = [sys.executable, "-m", "vvupipe", "device", "block", "--file", image, "--socket", path, "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert '"ready"' in process.stdout.readline()
    process.terminate()
    assert process.wait(20) == 0
    assert not path.exists()
    process.stdout.close()


def test_fd_that_is_no_socket(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image, "--fd", 0), "not a")


@pytest.mark.parametrize("address", ["x", "00:10", "0000:00:10.8", "0000:00:20.0"])
def test_malformed_address(vvupipe, image, address):
    assert_refused(vvupipe("device", "block", "--file", image, "--vfio", address), "PCI address")


def test_no_such_vm(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image, "--vfio", "0000:00:10.0", "--vm", "ghost"), "ghost")


def test_no_vm_at_all(vvupipe, image):
    assert_refused(vvupipe("device", "block", "--file", image, "--vfio", "0000:00:10.0"), "vvupipe run --vvu-proxy")


@pytest.mark.parametrize("option", ["s,addr", "s,addr=zz", "s,foo=1", ",addr=0000:00:10.0", "s,uuid=1"])
def test_vvu_proxy_option(vvupipe, option):
    assert_refused(vvupipe("run", "--vvu-proxy", option))


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--vhost-user-blk", "s,num-queues=2", "num-queues is for a VM with a KERNEL"),
        ("--vhost-user-blk", "s,queues=2", "'queues=2' cannot be: use the path alone"),
        ("--vvu-proxy", "s,shared-memory=1G", "shared-memory is for a VM with a KERNEL"),
        ("--vvu-proxy", "s,foo=1", "'foo=1' cannot be: use addr=VALUE or uuid=VALUE, each once"),
    ],
)
def test_what_follows_a_socket_is_told_whole(vvupipe, option, value, says):
    finished = vvupipe("run", option, value)
    assert_refused(finished, says)
    assert finished.stderr.rstrip().endswith(says)


@pytest.mark.parametrize("arguments", [("s", "k", "--cpus", "\u00b2"), ("s,num-queues=\u00b2", "k")])
def test_numbers_that_are_no_decimals(vvupipe, arguments):
    assert_refused(vvupipe("run", "--vhost-user-blk", *arguments), "number")


def test_vm_without_a_purpose(vvupipe):
    assert_refused(vvupipe("run"), "--vvu-proxy", "--vhost-user-blk")


def test_back_end_that_does_not_come(vvupipe, tmp_path):
    started = time.monotonic()
    finished = vvupipe("run", "--vhost-user-blk", tmp_path / "no.sock", "--timeout", "1s")
    assert finished.returncode == 2
    assert "waiting" in finished.stderr.lower()
    assert time.monotonic() - started < 20


def test_workload_options_need_sense(vvupipe, tmp_path):
    assert_refused(vvupipe("run", "--vhost-user-blk", "s", "--workload", "dance"), "dance")
    assert_refused(vvupipe("run", "--vhost-user-blk", "s", "--bs", "4x"), "not a size")


@pytest.mark.parametrize("option", ["bs", "iodepth", "runtime", "size", "numjobs", "rwmixread"])
def test_options_of_a_workload_go_with_one(vvupipe, option):
    assert_refused(vvupipe("run", "--vhost-user-blk", "s", f"--{option}", 4), f"--{option} goes with --workload")


@pytest.mark.parametrize("workload", ["read", "randwrite", "verify"])
def test_a_share_of_reads_goes_with_a_mixed_workload(vvupipe, workload):
    finished = vvupipe("run", "--vhost-user-blk", "s", "--workload", workload, "--rwmixread", 70)
    assert_refused(finished, "--rwmixread goes with --workload randrw or rw")


@pytest.mark.parametrize(("option", "value"), [("size", 0), ("runtime", 0), ("rwmixread", 101)])
def test_numbers_of_a_workload(vvupipe, option, value):
    assert_refused(vvupipe("run", "--vhost-user-blk", "s", "--workload", "randrw", f"--{option}", value), option)


def test_help_is_quick_and_names_the_commands(vvupipe):
    finished = vvupipe("--help")
    assert finished.returncode == 0
    assert {"run", "device", "lspci"} <= set(finished.stdout.split())
