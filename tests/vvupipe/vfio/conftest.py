import pytest

from tests.vvupipe.vfio.server_thread import RawClient, ServerThread


@pytest.fixture
def path(tmp_path):
    return tmp_path / "f.sock"


@pytest.fixture
def server(path):
    server = ServerThread(path)
    yield server
    server.close()


@pytest.fixture
def client(server, path):
    client = RawClient(path)
    yield client
    client.close()
