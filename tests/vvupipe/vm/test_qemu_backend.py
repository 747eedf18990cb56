import asyncio
import os
import socket

import pytest

from vvupipe.errors import UserError
from vvupipe.vm.qemu_backend import is_listening, wait_for_backend

pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def server(tmp_path):
    with socket.socket(socket.AF_UNIX) as sock:
        yield sock


def test_bound_is_not_listening(server, tmp_path):
    path = tmp_path / "with space.sock"
    assert not is_listening(path)
    server.bind(str(path))
    assert not is_listening(path)
    server.listen()
    assert is_listening(path)
    (tmp_path / "link").symlink_to(path)
    assert is_listening(tmp_path / "link")


def test_a_listener_whose_file_is_gone_cannot_be_reached(server, tmp_path):
    server.bind(str(tmp_path / "s"))
    server.listen()
    os.unlink(tmp_path / "s")
    assert not is_listening(tmp_path / "s")


def test_a_relative_name_is_found_from_elsewhere(server, tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    server.bind("./unusual-name.sock")
    server.listen()
    assert is_listening(tmp_path / "sub/unusual-name.sock")
    monkeypatch.chdir(tmp_path)
    assert not is_listening(tmp_path / "unusual-name.sock")


def test_looking_takes_no_connection(server, tmp_path):
    path = tmp_path / "s"
    server.bind(str(path))
    server.listen()
    asyncio.run(wait_for_backend(path, 1, lambda _: pytest.fail("nothing to say")))
    server.setblocking(False)
    with pytest.raises(BlockingIOError):
        server.accept()


def test_says_once_that_it_waits(server, tmp_path):
    path = tmp_path / "s"
    said = []

    async def scenario():
        waiting = asyncio.create_task(wait_for_backend(path, None, said.append))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        server.bind(str(path))
        await asyncio.sleep(0.3)
        assert not waiting.done()
        server.listen()
        await asyncio.wait_for(waiting, 2)

    asyncio.run(scenario())
    assert said == [f"waiting for a back-end at {path}"]


def test_gives_up(tmp_path):
    with pytest.raises(UserError, match=r"no back-end at .* after 0\.2 s: start one"):
        asyncio.run(wait_for_backend(tmp_path / "s", 0.2, lambda _: None))


@pytest.mark.parametrize("name", ["x" * 300, "file/s"])
def test_a_path_that_cannot_be_there_is_not_waited_for(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot connect to"):
        asyncio.run(wait_for_backend(tmp_path / name, 5, lambda _: None))


def test_a_file_is_no_socket(tmp_path):
    (tmp_path / "s").touch()
    with pytest.raises(UserError, match="is no socket"):
        asyncio.run(wait_for_backend(tmp_path / "s", None, lambda _: None))
