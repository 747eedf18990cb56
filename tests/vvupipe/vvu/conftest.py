import pytest

from tests.vvupipe.vvu.device_vm import running


@pytest.fixture
def vm(tmp_path, monkeypatch):
    with running(tmp_path, monkeypatch) as vm:
        yield vm
