#!/usr/bin/env bash
# Show vvupipe's main job on the embedded default: device VM, back-end on its VVU function, sibling VM with the disk.
# Sets up everything it needs in ./.venv; no root, no system packages. Options go to scripts/demo.py (--help).

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv ""
exec "$PYTHON" "$ROOT/scripts/demo.py" "$@"
