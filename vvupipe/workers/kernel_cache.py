"""Where compiled kernels are kept.

numba's own cache key is the file of the function it compiles: where it lies, when it was last changed, its size. A
change in a kernel that it calls, in another file, goes unseen. So the folder's name carries a digest of all kernel
sources and of the versions that compiled them; and of numba's own key, lest a folder seem to hold kernels that numba
will not take: those of another copy of vvupipe.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import sys
import tempfile
from functools import cache
from pathlib import Path

from kernels.stage_layout import STAGES_ON

#: Code for the plain x86-64 (or other) baseline: the same cache then serves a host and every guest on it.
CPU_NAME = "generic"


def _folders_of(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return [Path(folder) for folder in spec.submodule_search_locations]


def _kernel_sources() -> list[Path]:
    return sorted(path for folder in _folders_of("kernels") for path in folder.glob("*.py"))


def _has_avx2(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    try:
        return re.search(r"^flags\s*:.*\bavx2\b", cpuinfo.read_text(), re.MULTILINE) is not None
    except OSError:
        return False


def _cpu_features() -> list[str]:
    """What kernels may be compiled for here, the best first. A CPU without prfchw takes it for a no-operation."""
    if platform.machine() != "x86_64":
        return [""]
    return ["+prfchw,+avx2", "+prfchw"] if _has_avx2() else ["+prfchw"]


@cache
def _sources_digest() -> str:
    state = hashlib.sha256()
    for path in _kernel_sources():
        state.update(f"{path} {path.stat().st_mtime} ".encode() + path.read_bytes())
    return state.hexdigest()


@cache
def _numba_version() -> bytes:
    # importlib.metadata would tell as well, but takes longer to import than all of this.
    return (_folders_of("numba")[0] / "_version.py").read_bytes()


def digest(features: str) -> str:
    """12 hex digits that change whenever compiled kernels may. features: of the CPU that they are compiled for."""
    versions = f"{sys.version} numba {_numba_version()!r} {CPU_NAME} {features} stages {STAGES_ON}"
    return hashlib.sha256(f"{versions} {_sources_digest()}".encode()).hexdigest()[:12]


def _holds_kernels(path: Path) -> bool:
    return (path / "blk.o").exists()  # the large one; those of a relay or a vCPU are compiled in seconds


def _folders() -> list[Path]:
    """Where caches may lie, the best first."""
    override = os.environ.get("VVUPIPE_CACHE_DIR")
    if override:
        return [Path(override)]
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "vvupipe"
    return [home_cache, Path(tempfile.gettempdir()) / f"vvupipe-cache-{os.getuid()}"]


def _usable(path: Path) -> bool:
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    # A folder that somebody else could fill would run their code; one that was named is trusted.
    named = bool(os.environ.get("VVUPIPE_CACHE_DIR"))
    return os.access(path, os.W_OK) and (named or path.stat().st_uid == os.getuid())


def _chosen() -> tuple[Path, str]:
    """The cache in use, and the CPU features that its kernels are compiled for."""
    every = _cpu_features()
    for base in _folders():
        places = [(base / f"kernels-{digest(features)}", features) for features in every]
        # A guest whose CPU has more than its host's takes what the host has compiled: there it would take minutes.
        for path, features in sorted(places, key=lambda place: not _holds_kernels(place[0])):
            if _usable(path):
                return path, features
    return Path(tempfile.mkdtemp(prefix="vvupipe-cache-")), every[0]


def folder() -> Path:
    """The cache folder in use; created when missing.

    `$VVUPIPE_CACHE_DIR`, else `$XDG_CACHE_HOME/vvupipe`, else `~/.cache/vvupipe`; a per-user folder under the
    temporary one where that cannot be written (a read-only root).
    """
    return _chosen()[0]


def is_warm() -> bool:
    """Whether kernels were compiled into the cache before: loading them takes a fraction of that time."""
    return _holds_kernels(folder())


def object_file(name: str) -> Path:
    """Where the object file of kernels/NAME_entries.py is, or belongs."""
    return folder() / f"{name}.o"


def environment() -> dict[str, str]:
    """Environment of a process that runs kernels: this one's, with numba pointed to the cache."""
    path, features = _chosen()
    return {
        **os.environ,
        "NUMBA_CACHE_DIR": str(path),
        "NUMBA_CPU_NAME": CPU_NAME,
        "NUMBA_CPU_FEATURES": features,
    }
