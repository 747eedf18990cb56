"""The cache folder: found again, private, and another one when a kernel changes."""

import os
import shutil

import pytest

from vvupipe.workers import kernel_cache


def test_folder_is_found_again_and_private(tmp_path, monkeypatch):
    monkeypatch.setenv("VVUPIPE_CACHE_DIR", str(tmp_path))
    first = kernel_cache.folder()
    assert first == kernel_cache.folder()
    assert first.parent == tmp_path
    assert first.stat().st_mode & 0o777 == 0o700


def test_folder_falls_back_when_home_cannot_be_written(tmp_path, monkeypatch):
    monkeypatch.delenv("VVUPIPE_CACHE_DIR", raising=False)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", lambda: str(tmp_path))
    assert kernel_cache.folder().is_relative_to(tmp_path)


@pytest.fixture
def copied(tmp_path, monkeypatch):
    """Copies the kernels to a folder, as another copy of vvupipe would have them, and gives their digest there."""
    sources = kernel_cache._kernel_sources()
    assert {"chain.py", "blk_worker.py", "memory.py"} <= {path.name for path in sources}

    def digest(name):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        for path in sources:
            if not (folder / path.name).exists():
                shutil.copy2(path, folder)
        monkeypatch.setattr(kernel_cache, "_kernel_sources", lambda: sorted(folder.glob("*.py")))
        kernel_cache._sources_digest.cache_clear()
        return kernel_cache.digest("")

    yield digest
    monkeypatch.undo()
    kernel_cache._sources_digest.cache_clear()


def test_digest_changes_with_any_kernel(copied, tmp_path):
    before = copied("copy")
    assert copied("copy") == before
    times = os.stat(tmp_path / "copy" / "chain.py")
    (tmp_path / "copy" / "chain.py").write_text("# changed\n")
    os.utime(tmp_path / "copy" / "chain.py", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert copied("copy") != before


def test_digest_changes_with_what_numba_looks_at(copied, tmp_path):
    """Else a folder would seem warm that holds another copy's kernels, and each of this one's is compiled anew."""
    before = copied("copy")
    assert copied("another copy") != before
    os.utime(tmp_path / "copy" / "chain.py", ns=(1, 1))
    assert copied("copy") != before


def test_environment_points_numba_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VVUPIPE_CACHE_DIR", str(tmp_path))
    environment = kernel_cache.environment()
    assert environment["NUMBA_CACHE_DIR"] == str(kernel_cache.folder())
    assert environment["NUMBA_CPU_NAME"] == "generic"


def test_kernels_for_another_cpu_lie_elsewhere():
    assert kernel_cache.digest("+prfchw") != kernel_cache.digest("+prfchw,+avx2")


@pytest.mark.parametrize(("flags", "found"), [("fpu avx avx2 bmi1", True), ("fpu avx avx512f", False)])
def test_what_the_cpu_has(tmp_path, flags, found):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: none of avx2\n")
    assert kernel_cache._has_avx2(cpuinfo) is found
    assert not kernel_cache._has_avx2(tmp_path / "none")


def test_what_a_lesser_cpu_has_compiled_is_taken(tmp_path, monkeypatch):
    monkeypatch.setenv("VVUPIPE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(kernel_cache, "_cpu_features", lambda: ["+more", "+less"])
    assert kernel_cache.environment()["NUMBA_CPU_FEATURES"] == "+more"
    lesser = tmp_path / f"kernels-{kernel_cache.digest('+less')}"
    lesser.mkdir()
    (lesser / "blk.o").touch()
    assert kernel_cache.environment()["NUMBA_CPU_FEATURES"] == "+less"
    assert kernel_cache.folder() == lesser
    assert kernel_cache.is_warm()
    ours = tmp_path / f"kernels-{kernel_cache.digest('+more')}"
    (ours / "blk.o").touch()
    assert kernel_cache.folder() == ours
