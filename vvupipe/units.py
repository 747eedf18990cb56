"""Sizes and durations as people write and read them."""

from __future__ import annotations

import re
from collections import Counter

_SUFFIXES = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+)([kmgt]?)(?:i?b)?", re.IGNORECASE)
_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h)?")
_SIZE_MAX = (1 << 63) - 1  # of a file of Linux
_DURATION_MAX_S = 1e9  # 31 years, which fits 64 bits of nanoseconds
_CPU_MAX = 65535  # more than any Linux has; a list is written out
_SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, None: 1.0}


def parse_size(text: str) -> int:
    """Bytes of "4096", "4k", "512M", "1GiB" (powers of 1024, as fio has them). Raises: ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a size: use a number with k, m, g or t behind it, as in 4k")
    size = int(match[1]) * _SUFFIXES[match[2].lower()]
    if size > _SIZE_MAX:
        raise ValueError(f"'{text}' is too large: no file of Linux has more than {_SIZE_MAX >> 40}t")
    return size


def parse_duration(text: str) -> float:
    """Seconds of "10", "10s", "500ms", "2m". Raises: ValueError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise ValueError(f"'{text}' is not a duration: use a number with ms, s, m or h behind it, as in 10s")
    seconds = float(match[1]) * _SECONDS[match[2]]
    if seconds > _DURATION_MAX_S:
        raise ValueError(f"'{text}' is too long: use {_DURATION_MAX_S:.0f}s at most")
    return seconds


def human_bytes(count: float) -> str:
    """ "512 MiB", "1.5 GiB", "0 B"."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while count >= 1024 and len(units) > 1:
        count /= 1024
        units.pop(0)
    return f"{count:.0f} {units[0]}" if count == int(count) else f"{count:.2f} {units[0]}"


def human_ns(duration_ns: float) -> str:
    """ "850 ns", "12.3 us", "4.56 ms", "1.20 s"."""
    for unit, scale in (("ns", 1.0), ("us", 1e3), ("ms", 1e6)):
        if duration_ns < 1000 * scale:
            value = duration_ns / scale
            return f"{value:.0f} {unit}" if unit == "ns" else f"{value:.{1 if value >= 10 else 2}f} {unit}"
    return f"{duration_ns / 1e9:.2f} s"


def parse_cpu_list(text: str) -> list[int]:
    """CPUs of "0,2-3", in the order given, as taskset writes them. Raises: ValueError."""
    cpus: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f"'{text}' is not a list of CPUs: write it like 0,2-3")
        lowest, highest = int(first), int(last or first)
        if lowest > highest:
            raise ValueError(f"'{part.strip()}' runs backwards: write CPUs like {highest}-{lowest}")
        if highest > _CPU_MAX:
            raise ValueError(f"there is no CPU {highest}: they go up to {_CPU_MAX}")
        cpus.extend(range(lowest, highest + 1))
    if twice := [cpu for cpu, count in Counter(cpus).items() if count > 1]:
        raise ValueError(f"'{text}' names CPU {twice[0]} more than once")
    return cpus
