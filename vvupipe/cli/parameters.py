"""Parameter types and options that several commands share."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any

import click

from vvupipe.errors import UserError
from vvupipe.units import parse_cpu_list, parse_duration, parse_size


class _Parsed(click.ParamType[Any]):
    """A parameter read by a function that raises ValueError with a whole sentence."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


SIZE = _Parsed("size", parse_size)
DURATION = _Parsed("duration", parse_duration)
CPU_LIST = _Parsed("cpus", parse_cpu_list)


def check_cpus(cpus: list[int] | None) -> list[int]:
    """The CPUs to use: those given, or all that this process may run on. Raises: UserError on one it may not."""
    allowed = sorted(os.sched_getaffinity(0))
    if cpus is None:
        return allowed
    refused = sorted(set(cpus) - set(allowed))
    if refused:
        raise UserError(
            f"CPU {', '.join(map(str, refused))} cannot be used by this process: "
            f"choose from {','.join(map(str, allowed))}"
        )
    return cpus


def open_output(path: Path) -> FileIO:
    """An unbuffered file, emptied. Raises: UserError."""
    try:
        return path.open("wb", buffering=0)
    except OSError as error:
        raise UserError(f"the trace cannot be written to {path}: {error.strerror}") from error


def set_up_logging(verbose: int) -> None:
    """-v shows the life cycle, -vv every message."""
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)-7s %(name)s: %(message)s")


verbose_option = click.option("-v", "--verbose", count=True, help="Log the life cycle; -vv logs every message.")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object per line, for programs.")
