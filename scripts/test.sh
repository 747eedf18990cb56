#!/usr/bin/env bash
# Run all checks and tests, with their set-up: system packages (as root, on Debian), a virtual environment, then
# ruff, mypy and pytest. Arguments go to pytest, as in: scripts/test.sh -k conformance

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"

# Everything the real-guest tests need, by package; a machine that has them is left alone.
install_system_packages() {
    local missing
    missing=$(grep -v '^#' "$ROOT/scripts/system_packages.txt" |
        while read -r package; do
            dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
        done)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "Not root: tests that need these packages are skipped:" $missing >&2
        return 0
    fi
    # shellcheck disable=SC2086
    install_packages $missing
}

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
