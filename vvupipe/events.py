"""What a long-running command tells: a line for a person, or a JSON object a line for a program."""

from __future__ import annotations

import json
import logging
import sys

log = logging.getLogger(__name__)


class EventPrinter:
    """Prints events to standard output, flushed one by one."""

    def __init__(self, *, as_json: bool) -> None:
        self._as_json = as_json

    def emit(self, event: str, text: str, **fields: object) -> None:
        """One event: `text` for people, `event` and `fields` for programs."""
        line = json.dumps({"event": event, **fields}) if self._as_json else text
        try:
            print(line, flush=True)
        except BrokenPipeError:
            # Nobody reads any more; the service goes on.
            sys.stdout = open("/dev/null", "w")  # noqa: SIM115
        except OSError as error:
            # It stays in the buffer, and is written with the next one if there is room by then.
            log.warning("standard output cannot be written: %s", error.strerror)
