#!/usr/bin/env bash
# Run all checks and tests, with their set-up: system packages (as root, on Debian), a virtual environment, then
# ruff, mypy and pytest. Arguments go to pytest, as in: scripts/test.sh -k conformance

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

if command -v dpkg-query >/dev/null; then
    install_system_packages
else
    echo "Not a Debian system: tests that need QEMU, a guest kernel or busybox are skipped where those are missing" >&2
fi
make_venv "[dev]"
cd "$ROOT"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "$@"
