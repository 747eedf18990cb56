"""Who may import whom: the rules of docs/architecture.md, read from the sources."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

#: Levels of vvupipe's packages: a module imports its own level and those below, as docs/architecture.md draws them.
LEVELS = [
    {"cli"},
    {"vm", "devices"},
    {"vvu", "ivshmem"},
    {"vhost_user", "vfio"},
    {"workers", "virtio", "pci"},
    {"memory", "fd_socket", "pipe", "events", "units", "errors", "unix_path", "ending_signals", "__main__"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def modules(folder):
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("path", modules("kernels"), ids=lambda path: path.name)
def test_kernels_import_numba_numpy_and_kernels_only(path):
    # mmap, os and platform tell of the machine and the environment: size of a page, kind of CPU, VVUPIPE_STAGES.
    # object_file looks at the functions that it compiles (inspect) and at what libc has (ctypes).
    allowed = {"numba", "numpy", "llvmlite", "kernels", "mmap", "os", "platform", "collections", "typing"}
    allowed |= {"ctypes", "inspect", "types"} if path.name == "object_file.py" else set()
    assert {name.split(".")[0] for name in imports_of(path)} <= allowed


@pytest.mark.parametrize("path", modules("kernels"), ids=lambda path: path.name)
def test_only_memory_follows_addresses_and_calls_libc(path):
    if path.name != "memory.py":
        text = path.read_text()
        assert "ExternalFunction" not in text
        assert "inttoptr" not in text
        assert "carray" not in text


@pytest.mark.parametrize("path", modules("vvupipe"), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    parts = path.relative_to(ROOT / "vvupipe").parts
    own = parts[0].removesuffix(".py")
    if own in ("__init__", "__main__"):
        return
    for name in imports_of(path):
        if name.startswith("vvupipe."):
            other = name.split(".")[1]
            assert LEVEL_OF[other] >= LEVEL_OF[own], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules("vvupipe/devices"), ids=lambda path: str(path.relative_to(ROOT)))
def test_devices_know_no_transport(path):
    transports = ("vvupipe.vvu", "vvupipe.vfio", "vvupipe.vhost_user.socket_transport", "vvupipe.pci")
    assert not [name for name in imports_of(path) if name.startswith(transports)]


@pytest.mark.parametrize(
    "path", [*modules("vvupipe/vvu"), *modules("vvupipe/vfio"), *modules("vvupipe/vhost_user")],
    ids=lambda path: str(path.relative_to(ROOT)),
)  # fmt: skip
def test_transports_know_no_device(path):
    assert not [name for name in imports_of(path) if name.startswith("vvupipe.devices")]


def loaded_with(modules):
    """Names of all modules that a new interpreter has after importing `modules`."""
    return subprocess.run(
        [sys.executable, "-c", f"import sys, {modules}; print(*sys.modules)"],
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    ).stdout.split()


def test_command_line_loads_without_numba_and_numpy():
    loaded = loaded_with("vvupipe.cli.main")
    assert "click" in loaded
    assert not {"numba", "numpy", "llvmlite"} & set(loaded)


def test_coordinator_of_a_back_end_loads_without_numba():
    """Compiling is for its workers: the coordinator only looks at dtypes."""
    modules = "vvupipe.devices.server, vvupipe.devices.block.device, vvupipe.vhost_user.socket_transport"
    loaded = loaded_with(modules)
    assert "vvupipe.devices.block.device" in loaded
    assert not {"numba", "llvmlite"} & set(loaded)


def test_processes_with_kernels_load_no_numba():
    modules = ("vvupipe.devices.block.worker", "vvupipe.vm.vcpu_process", "vvupipe.vvu.kick_relay")
    code = f"import sys, {', '.join(modules)}; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
