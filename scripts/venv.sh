# Sourced by the other scripts: installs system packages, makes a virtual environment with vvupipe in it, and names its
# python $PYTHON.
#
# Uses the first Python >= 3.11 it finds ($VVUPIPE_PYTHON first). Installs only what is missing or has changed.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VVUPIPE_VENV:-$ROOT/.venv}

can_install() {
    [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null
}

install_packages() {
    echo "Installing $* ..." >&2
    apt-get update -qq >&2
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

# Everything the real-guest tests need, by package; a machine that has them is left alone.
install_system_packages() {
    local missing
    missing=$(grep -v '^#' "$ROOT/scripts/system_packages.txt" |
        while read -r package; do
            dpkg-query -W -f '${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || echo "$package"
        done)
    [ -n "$missing" ] || return 0
    if [ "$(id -u)" != 0 ]; then
        echo "Not root: what needs these packages is left out:" $missing >&2
        return 0
    fi
    # shellcheck disable=SC2086
    install_packages $missing
}

have_python() {
    ${VVUPIPE_PYTHON:-python3} -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    if ! have_python && can_install; then
        install_packages python3 python3-venv
    fi
    for candidate in ${VVUPIPE_PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    echo "vvupipe needs Python 3.11 or newer: install it, or name it with VVUPIPE_PYTHON=/path/to/python" >&2
    return 2
}

# make_venv EXTRA: EXTRA is "" or "[dev]".
make_venv() {
    install_venv "$1"
    # An editable install leaves that to the first run, which in an emulated guest takes seconds and is forgotten.
    "$PYTHON" -m compileall -q "$ROOT/vvupipe" "$ROOT/kernels"
}

install_venv() {
    local extra=$1 base stamp
    base=$(find_python)
    stamp="$VENV/.installed$extra"
    PYTHON=$VENV/bin/python
    if [ -x "$PYTHON" ] && [ -e "$stamp" ] && [ ! "$ROOT/pyproject.toml" -nt "$stamp" ]; then
        return
    fi
    echo "Setting up $VENV (once) ..." >&2
    if [ ! -x "$PYTHON" ] || ! "$PYTHON" -m pip --version >/dev/null 2>&1; then
        rm -rf "$VENV"
        if ! "$base" -m venv "$VENV" >/dev/null 2>&1; then
            rm -rf "$VENV"
            make_venv_without_ensurepip "$base"
        fi
    fi
    "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$ROOT$extra"
    touch "$stamp"
}

# Debian's python3 comes without ensurepip: use virtualenv if pip is there, or the package python3-venv as root.
make_venv_without_ensurepip() {
    local base=$1
    if "$base" -m virtualenv "$VENV" >/dev/null 2>&1; then
        return
    fi
    if "$base" -m pip install --quiet --target "$ROOT/.venv-tool" virtualenv >/dev/null 2>&1 &&
        PYTHONPATH="$ROOT/.venv-tool" "$base" -m virtualenv "$VENV" >/dev/null 2>&1; then
        return
    fi
    if can_install; then
        install_packages python3-venv
        "$base" -m venv "$VENV"
        return
    fi
    echo "$base cannot make a virtual environment: install the package python3-venv (or virtualenv)" >&2
    return 2
}
