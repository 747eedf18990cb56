"""The cache folder: found again, private, and another one when a kernel changes."""

import shutil

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


def test_digest_changes_with_any_kernel(tmp_path, monkeypatch):
    sources = kernel_cache._kernel_sources()
    assert {"chain.py", "blk_worker.py", "memory.py"} <= {path.name for path in sources}
    for path in sources:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(kernel_cache, "_kernel_sources", lambda: sorted(tmp_path.glob("*.py")))
    before = kernel_cache.digest.__wrapped__()
    (tmp_path / "chain.py").write_text("# changed\n")
    assert kernel_cache.digest.__wrapped__() != before


def test_environment_points_numba_to_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VVUPIPE_CACHE_DIR", str(tmp_path))
    environment = kernel_cache.environment()
    assert environment["NUMBA_CACHE_DIR"] == str(kernel_cache.folder())
    assert environment["NUMBA_CPU_NAME"] == "generic"
