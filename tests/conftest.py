"""Kernels in this process use the cache that vvupipe's own processes use, compiled for the same baseline."""

import os

from vvupipe.workers import kernel_cache

for _name, _value in kernel_cache.environment().items():
    os.environ.setdefault(_name, _value)
