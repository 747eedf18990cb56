"""What the programs here share of their command lines: bad input is one line and exit status 2."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from vvupipe.errors import UserError

USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """A parser that refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong and end."""
        self.exit(USER_ERROR, f"{self.prog.removesuffix('.py')}: {message} (--help says more)\n")


def run(program: str, main: Callable[[], int]) -> NoReturn:
    """Run a program's `main` to the end of the process; a UserError is one line and status 2."""
    try:
        status = main()
    except UserError as error:
        print(f"{program}: {error}", file=sys.stderr)
        status = USER_ERROR
    sys.exit(status)


def above_0(text: str) -> float:
    """A number above 0. Raises: argparse.ArgumentTypeError."""
    value = _number(float, text)
    if not math.isfinite(value) or value <= 0:
        raise argparse.ArgumentTypeError(f"{text}: use a number above 0")
    return float(value)


def not_below_0(text: str) -> float:
    """A number, 0 or above. Raises: argparse.ArgumentTypeError."""
    value = _number(float, text)
    if not math.isfinite(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text}: use a number that is not below 0")
    return float(value)


def whole_from(least: int) -> Callable[[str], int]:
    """Whole numbers from `least` on."""

    def whole(text: str) -> int:
        value = _number(int, text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text}: use a whole number from {least} on")
        return int(value)

    return whole


def _number(kind: type[int] | type[float], text: str) -> float:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is not a {'whole ' if kind is int else ''}number") from None


def folder(text: str) -> Path:
    """A folder in which files can be made. Raises: argparse.ArgumentTypeError."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: there is no such folder")
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{text}: this folder cannot be written to")
    return path


def results_of(path: Path, *, key: str) -> list[dict[str, Any]]:
    """The lines of results.jsonl in the folder `path`, each of which has `key`. Raises: UserError."""
    file = path / "results.jsonl"
    try:
        records = [json.loads(line) for line in file.read_text().splitlines()]
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}: name a folder of perf/results/") from error
    except ValueError as error:
        raise UserError(f"{file} is not lines of JSON: {error}") from error
    if not records:
        raise UserError(f"nothing was measured in {path}")
    if not all(isinstance(record, dict) and key in record for record in records):
        raise UserError(f"{file} has the results of another program")
    return records
