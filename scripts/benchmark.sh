#!/usr/bin/env bash
# Compare vvupipe with qemu-storage-daemon under the same front-end. Options go to perf/compare.py (--help).

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv "[perf]"
command -v qemu-storage-daemon >/dev/null ||
    echo "qemu-storage-daemon is not installed (package qemu-system-common): only vvupipe is measured" >&2
exec "$PYTHON" "$ROOT/perf/compare.py" "$@"
