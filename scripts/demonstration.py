"""How a demonstration begins and ends as a program: whatever ends it, what it started and made goes first."""

import signal
import subprocess
import sys
from collections.abc import Callable
from typing import NoReturn


def run(main: Callable[[], int], name: str) -> NoReturn:
    """Run `main` to its exit status. SIGTERM ends it as Ctrl-C does; what the system refuses is one line."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"{name}: {error}")
