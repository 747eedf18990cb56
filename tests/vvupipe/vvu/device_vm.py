"""A device VM in its own process, as its user starts it."""

import contextlib
import os

from tests.conformance.carriers import start, stop

ADDRESS = "0000:00:10.0"


class Vm:
    def __init__(self, folder, name="dev", options=()):
        self.socket = folder / f"{name}.sock"
        self.log_path = folder / f"{name}.log"
        environment = {**os.environ, "XDG_RUNTIME_DIR": str(folder)}
        command = ["run", "--vvu-proxy", f"{self.socket},addr={ADDRESS}", "--name", name, "--mem", 16, "--json", "-v"]
        self.process, self.ready = start([*command, *options], self.log_path, environment)
        self.name = name

    def log(self):
        return self.log_path.read_text()

    def stop(self):
        stop(self.process)

    def kill(self):
        self.process.kill()
        self.process.wait(10)
        self.process.stdout.close()


@contextlib.contextmanager
def running(folder, monkeypatch, **options):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    vm = Vm(folder, **options)
    try:
        yield vm
    finally:
        vm.stop()
    assert not vm.socket.exists()
    assert "Traceback" not in vm.log()
