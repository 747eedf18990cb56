"""How every kernel is compiled: nopython, without the GIL, kept in numba's on-disk cache.

The cache folder is set by whoever starts the process (see vvupipe.workers.kernel_cache): numba's own key does not see
a change in a called kernel's file, so the folder's name carries a digest of all of them.
"""

from collections.abc import Callable
from typing import Any

import numba

_OPTIONS = {"nogil": True, "cache": True, "fastmath": False, "boundscheck": False, "error_model": "numpy"}


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call for the types it is called with; callers keep to one set of types.

    Without numba's run-time (_nrt) no kernel can allocate and none counts references. For every record or array that
    one kernel hands to another that would be an atomic increment and decrement: a third of a worker's time, once.
    """
    return numba.njit(_nrt=False, **_OPTIONS)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A kernel that is always compiled into its callers: it is called once for each request, with many arguments.

    Every array is seven of them, and a call passes those that do not fit into registers by the stack.
    """
    return numba.njit(_nrt=False, forceinline=True, **_OPTIONS)(function)
