"""scripts/build_initramfs.py: the archive's form, the order of modules, and what is said when a part is missing."""

import base64
import gzip
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from guest_kit import ROOT, initramfs
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(60)


def entries(packed):
    """(name, mode, content, device) of each entry: a second reading of the newc form."""
    data, position, found = gzip.decompress(packed), 0, []
    while True:
        assert data[position : position + 6] == b"070701"
        fields = [int(data[position + 6 + 8 * k : position + 14 + 8 * k], 16) for k in range(13)]
        mode, size, name_size, device = fields[1], fields[6], fields[11], tuple(fields[9:11])
        name_at = position + 110
        name = data[name_at : name_at + name_size - 1].decode()
        assert data[name_at + name_size - 1] == 0
        content_at = -(-(name_at + name_size) // 4) * 4
        content = data[content_at : content_at + size]
        position = -(-(content_at + size) // 4) * 4
        if name == "TRAILER!!!":
            assert position == len(data)
            return found
        found.append((name, mode, content, device))


NAMES = st.text("abcdef.-_", min_size=1, max_size=12).filter(lambda name: name.strip("."))
PATHS = st.lists(NAMES, min_size=1, max_size=3).map("/".join)


@given(st.dictionaries(PATHS, st.binary(max_size=50), max_size=8))
def test_files_come_out_as_they_went_in(files):
    files = {path: data for path, data in files.items() if not any(p.startswith(path + "/") for p in files)}
    archive = initramfs.Archive()
    for path, content in files.items():
        archive.file(path, content)
    found = entries(archive.packed())
    assert {name: content for name, mode, content, _ in found if mode == 0o100644} == files
    seen = set()
    for name, _mode, _, _ in found:
        assert name not in seen
        assert not os.path.dirname(name) or os.path.dirname(name) in seen, "a folder comes before what is in it"
        seen.add(name)


def test_packing_does_not_end_the_archive():
    archive = initramfs.Archive()
    archive.file("a", b"1")
    archive.packed()
    archive.character_device("dev/console", 5, 1)
    assert [(name, device) for name, _, _, device in entries(archive.packed())] == [
        ("a", (0, 0)),
        ("dev", (0, 0)),
        ("dev/console", (5, 1)),
    ]


@pytest.fixture
def tree(tmp_path):
    """A folder of modules: top needs middle needs low; top would like fast (soft), by an alias."""
    (tmp_path / "modules.dep").write_text(
        "k/top-one.ko.xz: k/middle.ko.xz k/low.ko.xz\n"
        "k/middle.ko.xz: k/low.ko.xz\nk/low.ko.xz:\nk/fast.ko:\nk/slow.ko:\n"
    )
    (tmp_path / "modules.softdep").write_text("# comment\nsoftdep top_one pre: crypto-x post: nothing\n")
    (tmp_path / "modules.alias").write_text("alias crypto-x fast\nalias crypto-x slow\n")
    (tmp_path / "modules.builtin").write_text("kernel/lib/built-in.ko\n")
    return tmp_path


def test_needed_modules_come_first_and_soft_ones_are_not_required(tree):
    order = initramfs.ModuleTree(tree).load_order(["top-one", "built_in", "low"])
    assert order == [
        ("k/fast.ko", False),
        ("k/slow.ko", False),
        ("k/low.ko.xz", True),
        ("k/middle.ko.xz", True),
        ("k/top-one.ko.xz", True),
    ]


def test_a_welcome_module_may_be_missing_and_makes_nothing_optional(tree):
    order = initramfs.ModuleTree(tree).load_order(["low"], welcome=["middle", "absent"])
    assert order == [("k/low.ko.xz", True), ("k/middle.ko.xz", False)]


def test_a_soft_dependency_may_go_round_in_a_circle(tree):
    (tree / "modules.softdep").write_text("softdep fast pre: slow\nsoftdep slow pre: fast\n")
    assert [path for path, _ in initramfs.ModuleTree(tree).load_order(["fast"])] == ["k/slow.ko", "k/fast.ko"]


def test_an_unknown_module_is_named(tree):
    with pytest.raises(initramfs.MissingPart, match="no module nonsense"):
        initramfs.ModuleTree(tree).load_order(["nonsense"])


def test_modules_are_unpacked(tree):
    (tree / "k").mkdir()
    (tree / "k/low.ko.xz").write_bytes(lzma.compress(b"module"))
    (tree / "k/fast.ko").write_bytes(b"plain")
    modules = initramfs.ModuleTree(tree)
    assert modules.read("k/low.ko.xz") == b"module"
    assert modules.read("k/fast.ko") == b"plain"


def install_kernel(root, version, *, with_modules=True):
    (root / "boot").mkdir(exist_ok=True)
    (root / "boot" / f"vmlinuz-{version}").write_bytes(b"kernel")
    if with_modules:
        (root / "modules" / version).mkdir(parents=True)
        (root / "modules" / version / "modules.dep").write_text("")


def test_the_newest_kernel_with_modules_is_taken(tmp_path):
    for version in ("6.1.0-9-amd64", "6.1.0-56-amd64", "5.10.0-30-amd64", "6.1.0-rc3"):
        install_kernel(tmp_path, version)
    install_kernel(tmp_path, "6.12.0-1-amd64", with_modules=False)
    kernels = initramfs.installed_kernels(tmp_path / "boot", tmp_path / "modules")
    assert [kernel.version for kernel in kernels[:2]] == ["6.1.0-56-amd64", "6.1.0-9-amd64"]
    assert kernels[-1].version == "5.10.0-30-amd64"
    assert initramfs.newest_kernel(tmp_path / "boot", tmp_path / "modules") == kernels[0]


def test_a_missing_kernel_names_the_package(tmp_path):
    with pytest.raises(initramfs.MissingPart, match="install the package linux-image-amd64"):
        initramfs.newest_kernel(tmp_path, tmp_path)


def test_a_missing_or_dynamic_busybox_names_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr(initramfs.shutil, "which", lambda *_, **__: None)
    with pytest.raises(initramfs.MissingPart, match="install the package busybox-static"):
        initramfs.find_busybox()
    monkeypatch.setattr(initramfs.shutil, "which", lambda *_, **__: sys.executable)
    with pytest.raises(initramfs.MissingPart, match="needs shared libraries"):
        initramfs.find_busybox()


def test_the_program_writes_an_archive_with_its_script(tmp_path):
    try:
        initramfs.newest_kernel()
        initramfs.find_busybox()
    except initramfs.MissingPart as error:
        pytest.skip(str(error))
    (tmp_path / "work.sh").write_text("echo hello\n")
    command = [sys.executable, ROOT / "scripts/build_initramfs.py", "--output", tmp_path / "initramfs"]
    done = subprocess.run([*command, "--script", tmp_path / "work.sh", "--module", "isofs"], check=True, timeout=30)
    assert done.returncode == 0
    found = {name: content for name, _, content, _ in entries((tmp_path / "initramfs").read_bytes())}
    assert found["etc/guest/script"] == b"echo hello\n"
    loaded = found["etc/guest/modules"].decode().split()
    assert loaded.index("virtio_ring.ko") < loaded.index("virtio.ko") < loaded.index("virtio_blk.ko")
    assert found["modules/isofs.ko"][:4] == b"\x7fELF"

    done = subprocess.run([*command, "--module", "nonsense"], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "no module nonsense" in line


def test_the_kernel_parameter_holds_the_script():
    key, _, value = initramfs.script_parameter("echo 'a b'\n").partition("=")
    assert key == initramfs.SCRIPT_PARAMETER
    assert base64.b64decode(value) == b"echo 'a b'\n"


def test_a_program_brings_its_loader():
    program = Path(shutil.which("ls"))
    names = [path.name for path in initramfs.files_of_program(program)]
    assert names[0] == "ls"
    assert any(name.startswith("ld-linux") for name in names)
    assert "libc.so.6" in names
    assert str(program)[1:].encode() in gzip.decompress(initramfs.program_overlay(program))
