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
"$PYTHON" -m tests.compile_kernels &
compiling=$!
trap 'kill "$compiling" 2>/dev/null || true' EXIT
# Debian 12 has no QEMU with a vfio-user client; tests that want one are skipped where it cannot be had.
VVUPIPE_NEW_QEMU=${VVUPIPE_NEW_QEMU:-$("$ROOT/scripts/newer_qemu.sh" || true)}
export VVUPIPE_NEW_QEMU
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
wait "$compiling"
trap - EXIT
for argument in "$@"; do
    # Somebody wants certain tests: one run, in order.
    case $argument in --*) ;; *) exec "$PYTHON" -m pytest "$@" ;; esac
done
# Two at a time (three guests were slower than two). What pins processes to CPUs does not share them with guests. Those
# go by name: else files of few tests, which may be long ones, come last, and one CPU is idle meanwhile.
status=0
"$PYTHON" -m pytest -n 2 --dist loadfile --ignore tests/e2e "$@" || status=$?
"$PYTHON" -m pytest -n 2 --dist loadfile --no-loadscope-reorder tests/e2e -m qemu "$@" || status=$?
"$PYTHON" -m pytest -n 2 --dist loadfile tests/e2e -m "not qemu" "$@" || status=$?
exit "$status"
