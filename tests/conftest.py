"""Kernels in this process use the cache that vvupipe's own processes use, compiled for the same baseline.

Property tests draw new examples in every run by hand, and the same in every run of CI, which must not fail by chance.
"""

import os

from hypothesis import settings

from vvupipe.workers import kernel_cache

for _name, _value in kernel_cache.environment().items():
    os.environ.setdefault(_name, _value)

# The first example may have to compile a kernel, and machines are shared: no example has a deadline.
settings.register_profile("by hand", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "by hand")
