#!/usr/bin/env bash
# The whole scene with real VMs, on stock QEMU: a device VM, the block back-end in it, a sibling VM with /dev/vda mounted.
# Installs QEMU, a kernel and busybox when it may (root, Debian). Options go to scripts/real_demo.py (--help).

source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
if command -v dpkg-query >/dev/null; then
    install_system_packages
fi
make_venv ""
exec "$PYTHON" "$ROOT/scripts/real_demo.py" "$@"
