#!/usr/bin/env bash
# newer_qemu.sh [DIR]: unpack a QEMU >= 10.1, which has a vfio-user client, from a newer Debian release, with its libraries,
# into DIR (default: .newer-qemu of this checkout), and print the path of a program that runs it. Nothing is installed.
# Needs apt and dpkg-deb; about 400 MB of disk. Exit status 1, with one line, when it cannot be had.

set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
DIR=$(realpath -m "${1:-$ROOT/.newer-qemu}")
RUN=$DIR/qemu-system-x86_64
SUITE=trixie
MIRROR=${VVUPIPE_DEBIAN_MIRROR:-http://deb.debian.org/debian}

give_up() {
    echo "newer_qemu: $*" >&2
    exit 1
}

if [ -x "$RUN" ] && "$RUN" --version >/dev/null 2>&1; then
    echo "$RUN"
    exit
fi
for tool in apt-get dpkg-deb; do
    command -v "$tool" >/dev/null || give_up "$tool is not installed: this takes a Debian system"
done
KEYS=/usr/share/keyrings/debian-archive-keyring.gpg
[ -r "$KEYS" ] || give_up "$KEYS is missing: install the package debian-archive-keyring"

rm -rf "$DIR"
mkdir -p "$DIR"/apt/{lists/partial,archives/partial} "$DIR/root"
: >"$DIR/apt/status"
for suite in "$SUITE" "$SUITE-backports"; do
    echo "deb [signed-by=$KEYS] $MIRROR $suite main"
done >"$DIR/apt/sources.list"
# An apt of its own that believes nothing to be installed, so that it fetches every library too.
apt=(apt-get -qq -o "Dir::State=$DIR/apt" -o "Dir::State::lists=$DIR/apt/lists" -o "Dir::State::status=$DIR/apt/status"
    -o "Dir::Cache=$DIR/apt" -o "Dir::Etc::sourcelist=$DIR/apt/sources.list" -o "Dir::Etc::sourceparts=-"
    -o "Dir::Etc::preferencesparts=-" -o "APT::Sandbox::User=root" -o "Debug::NoLocking=1" -o "APT::Install-Recommends=0")
"${apt[@]}" update >"$DIR/apt/log" 2>&1 || give_up "the package lists of $SUITE cannot be had: $(tail -n 1 "$DIR/apt/log")"
"${apt[@]}" install --yes --download-only -t "$SUITE-backports" qemu-system-x86 >>"$DIR/apt/log" 2>&1 ||
    give_up "the packages of $SUITE-backports cannot be had: $(tail -n 1 "$DIR/apt/log")"
for package in "$DIR"/apt/archives/*.deb; do
    dpkg-deb -x "$package" "$DIR/root" || give_up "$package cannot be unpacked"
done
rm -rf "$DIR/apt/archives" "$DIR/apt/lists"

loader=$(find "$DIR/root" -name 'ld-linux-x86-64.so.2' | head -n 1)
[ -n "$loader" ] || give_up "no dynamic loader for x86-64 in the packages"
libraries=$(find "$DIR/root" -name 'lib*.so*' -printf '%h\n' | sort -u | paste -sd:)
cat >"$RUN" <<END
#!/bin/sh
exec $loader --library-path $libraries $DIR/root/usr/bin/qemu-system-x86_64 \\
    -L $DIR/root/usr/share/qemu -L $DIR/root/usr/share/seabios "\$@"
END
chmod +x "$RUN"
"$RUN" --version >/dev/null 2>&1 || give_up "$RUN does not run"
echo "$RUN"
