"""How every kernel is compiled: nopython, without the GIL; what Python calls is kept in numba's on-disk cache.

Processes of vvupipe load kernels from object files (object_file). The cache is for tests, and whoever else calls a
kernel by itself. Its folder is set by whoever starts the process (see vvupipe.workers.kernel_cache): numba's own key
does not see a change in a called kernel's file, so the folder's name carries a digest of all of them.
"""

from collections.abc import Callable
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"nogil": True, "fastmath": False, "boundscheck": False, "error_model": "numpy"}


#: Whether kernels can be called by the interpreter, and are kept for the next one.
_called_by_python = True


def for_object_file_only() -> None:
    """Kernels that are imported from here on are called by other kernels only: a third less to compile."""
    global _called_by_python  # noqa: PLW0603
    _called_by_python = False
    OPTIONS.update(no_cpython_wrapper=True, no_cfunc_wrapper=True)


class _LateCache:
    """numba's cache of one kernel, made when it is first asked for anything.

    Making one looks for its folder and writes a file there to see that it can, for each of some 200 kernels; but most
    processes call few of them, which have all others compiled in.
    """

    def __init__(self, dispatcher: Any) -> None:
        self._dispatcher = dispatcher

    def __getattr__(self, name: str) -> Any:
        self._dispatcher.enable_caching()  # which puts the cache itself in our place
        return getattr(self._dispatcher._cache, name)


def _compiled(function: Callable[..., Any], **options: Any) -> Any:
    # Without numba's run-time (_nrt) no kernel can allocate and none counts references. For every record or array that
    # one kernel hands to another that would be an atomic increment and decrement: a third of a worker's time, once.
    dispatcher = numba.njit(_nrt=False, **OPTIONS, **options)(function)
    if _called_by_python:
        dispatcher._cache = _LateCache(dispatcher)
    return dispatcher


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call for the types it is called with; callers keep to one set of types."""
    return _compiled(function)


def spliced(function: Callable[..., Any]) -> Any:
    """A part of a kernel: its source is put into its callers, so that it can return what no function can (records)."""
    return numba.njit(inline="always", _nrt=False, **OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel that is always compiled into its callers: it is called once for each request, with many arguments.

    Every array is seven of them, and a call passes those that do not fit into registers by the stack.
    """
    return _compiled(function, forceinline=True)
