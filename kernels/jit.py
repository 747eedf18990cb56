"""How every kernel is compiled: nopython, without the GIL, kept in numba's on-disk cache.

The cache folder is set by whoever starts the process (see vvupipe.workers.kernel_cache): numba's own key does not see
a change in a called kernel's file, so the folder's name carries a digest of all of them.
"""

from collections.abc import Callable
from typing import Any

import numba


def kernel(function: Callable[..., Any]) -> Any:
    """Compile on first call for the types it is called with; callers keep to one set of types."""
    return numba.njit(nogil=True, cache=True, fastmath=False, boundscheck=False, error_model="numpy")(function)
