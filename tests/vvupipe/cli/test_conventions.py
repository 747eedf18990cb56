"""The conventions for back-end programs of QEMU, docs/interop/vhost-user.rst and vhost-user.json."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mock.frontend import Frontend
from vvupipe.cli import conventions

PROGRAM = [sys.executable, "-c", "from vvupipe.cli.block_program import main; main()"]


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 20))
    return path


def run(*arguments, **options):
    return subprocess.run([*map(str, arguments)], capture_output=True, text=True, timeout=40, check=False, **options)


def discovery(*arguments, path=""):
    """`vvupipe device discovery` with folders before the others in PATH."""
    environment = {**os.environ, "PATH": f"{path}{os.pathsep}{os.environ['PATH']}"}
    return run(sys.executable, "-m", "vvupipe", "device", "discovery", *arguments, env=environment)


@pytest.fixture
def installed(tmp_path):
    """The folder of a vvupipe-block that PATH has, unless the real one is installed beside this Python."""
    beside = Path(sys.executable).parent
    if (beside / "vvupipe-block").exists():
        return beside
    program = tmp_path / "bin" / "vvupipe-block"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    return program.parent


def assert_discovers(found, program):
    assert found.pop("description")
    assert found == {"type": "block", "binary": str(program)}


def test_capabilities_whatever_else_is_asked():
    for others in ([], ["--nonsense"], ["--fd", "x", "--file"]):
        finished = run(*PROGRAM, *others, "--print-capabilities")
        assert finished.returncode == 0, finished.stderr
        assert json.loads(finished.stdout) == {"type": "block", "features": ["read-only", "blk-file"]}


def test_options_of_the_conventions(image, tmp_path):
    path = tmp_path / "blk.sock"
    command = [*PROGRAM, f"--socket-path={path}", f"--blk-file={image}", "--read-only", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    ready = json.loads(process.stdout.readline())
    assert (ready["event"], ready["file"], ready["read_only"]) == ("ready", str(image), True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()


def test_fd_of_the_management_layer(image):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        command = [*PROGRAM, f"--fd={theirs.fileno()}", f"--blk-file={image}", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[theirs.fileno()])
        assert '"ready"' in process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stdout.close()


def test_socket_of_systemd(image, tmp_path):
    """sd_listen_fds(3): file descriptor 3, and whom it is meant for."""
    path = tmp_path / "activated.sock"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        shell = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$@" 3<&{listening.fileno()}'
        command = ["bash", "-c", shell, "bash", *PROGRAM, f"--blk-file={image}", "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, pass_fds=[listening.fileno()])
        assert '"ready"' in process.stdout.readline()
    frontend = Frontend(path)
    offered, _ = frontend.negotiate()
    assert offered
    frontend.close()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    process.stdout.close()
    assert path.exists(), "the socket is systemd's"


def test_several_sockets_of_systemd_are_too_many(image):
    shell = 'LISTEN_PID=$$ LISTEN_FDS=2 exec "$@"'
    finished = run("sh", "-c", shell, "sh", *PROGRAM, f"--blk-file={image}")
    assert finished.returncode == 2
    assert "LISTEN_FDS=2" in finished.stderr


def test_errors_are_those_of_the_program(image, tmp_path):
    finished = run(*PROGRAM, f"--blk-file={tmp_path}/no.img", "--socket-path=s", cwd=tmp_path, env=with_tree())
    assert finished.returncode == 2
    assert finished.stderr == f"vvupipe-block: {tmp_path}/no.img: no such image\n"
    finished = run(*PROGRAM, f"--blk-file={image}", f"--socket-path={tmp_path}/s", "--fd=3")
    assert finished.returncode == 2
    assert "one of" in finished.stderr


def with_tree():
    """The environment with which this tree is imported from any folder."""
    return {**os.environ, "PYTHONPATH": str(Path(conventions.__file__).parents[2])}


def test_help_of_the_program():
    finished = run(*PROGRAM, "-h")
    assert finished.returncode == 0
    assert {"--socket,", "--socket-path", "--blk-file"} <= set(finished.stdout.split())


def test_discovery(installed):
    finished = discovery(path=installed)
    assert finished.returncode == 0, finished.stderr
    assert_discovers(json.loads(finished.stdout), installed / "vvupipe-block")


def test_discovery_is_installed(installed, tmp_path):
    folder = tmp_path / "qemu" / "vhost-user"
    finished = discovery("--install", folder, path=installed)
    assert finished.returncode == 0, finished.stderr
    path = folder / "50-vvupipe-block.json"
    assert finished.stdout == f"{path}\n"
    assert_discovers(json.loads(path.read_text()), installed / "vvupipe-block")


def test_discovery_that_cannot_be_installed(installed, image):
    finished = discovery("--install", image, path=installed)
    assert finished.returncode == 2
    assert "cannot be written" in finished.stderr
    assert len(finished.stderr.splitlines()) == 1


def test_discovery_wants_an_absolute_path():
    with pytest.raises(ValueError, match="absolute"):
        conventions.discovery(Path("vvupipe-block"))
