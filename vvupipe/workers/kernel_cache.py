"""Where compiled kernels are kept.

numba's own cache key is the file of the function it compiles; a change in a kernel that it calls, in another file,
goes unseen. So the folder's name carries a digest of all kernel sources and of the versions that compiled them.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
import tempfile
from functools import cache
from pathlib import Path

from kernels.stage_layout import STAGES_ON

#: Code for the plain x86-64 (or other) baseline: the same cache then serves a host and every guest on it. The kernels
#: are loads, stores and calls of libc's memcpy, which picks its own instructions at run time.
CPU_NAME = "generic"
#: An x86 CPU that lacks it takes it for a no-operation; other architectures have no such name.
CPU_FEATURES = "+prfchw" if platform.machine() == "x86_64" else ""


def _kernel_sources() -> list[Path]:
    spec = importlib.util.find_spec("kernels")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return sorted(path for folder in spec.submodule_search_locations for path in Path(folder).glob("*.py"))


@cache
def digest() -> str:
    """12 hex digits that change whenever compiled kernels may."""
    numba = importlib.metadata.version("numba")
    state = hashlib.sha256(f"{sys.version} numba {numba} {CPU_NAME} {CPU_FEATURES} stages {STAGES_ON}".encode())
    for path in _kernel_sources():
        state.update(path.name.encode() + path.read_bytes())
    return state.hexdigest()[:12]


def folder() -> Path:
    """The cache folder in use; created when missing.

    `$VVUPIPE_CACHE_DIR`, else `$XDG_CACHE_HOME/vvupipe`, else `~/.cache/vvupipe`; a per-user folder under the
    temporary one where that cannot be written (a read-only root).
    """
    override = os.environ.get("VVUPIPE_CACHE_DIR")
    home_cache = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "vvupipe"
    fallback = Path(tempfile.gettempdir()) / f"vvupipe-cache-{os.getuid()}"
    for base in [Path(override)] if override else [home_cache, fallback]:
        path = base / f"kernels-{digest()}"
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError:
            continue
        # A folder that somebody else could fill would run their code; one that was named is trusted.
        if os.access(path, os.W_OK) and (override or path.stat().st_uid == os.getuid()):
            return path
    return Path(tempfile.mkdtemp(prefix="vvupipe-cache-"))


def is_warm() -> bool:
    """Whether kernels were compiled into the cache before: loading them takes a fraction of that time."""
    return any(folder().glob("**/*_worker.serve-*.nbi"))


def environment() -> dict[str, str]:
    """Environment of a process that runs kernels: this one's, with numba pointed to the cache."""
    return {
        **os.environ,
        "NUMBA_CACHE_DIR": str(folder()),
        "NUMBA_CPU_NAME": CPU_NAME,
        "NUMBA_CPU_FEATURES": CPU_FEATURES,
    }
