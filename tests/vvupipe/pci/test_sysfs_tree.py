import errno
import shutil
import subprocess

import pytest

from vvupipe.pci import sysfs_tree
from vvupipe.pci.address import PciAddress
from vvupipe.pci.config_space import Bar, ConfigSpace
from vvupipe.pci.sysfs_tree import SysfsTree

ADDRESS = PciAddress.parse("0000:00:10.0")


@pytest.fixture
def config():
    config = ConfigSpace(vendor=0x1AF4, device=0x107D, class_code=0x00FF00, revision=1)
    config.add_bar(Bar(0, 0x8000))
    config.add_bar(Bar(4, 1 << 38, is_64bit=True, prefetchable=True))
    config.place_bar(0, 0xE0000000)
    config.place_bar(4, 1 << 40)
    return config


def test_files_are_as_linux_writes_them(tmp_path, config):
    tree = SysfsTree(tmp_path / "sys")
    tree.show(ADDRESS, config)
    folder = tree.path / "devices" / "0000:00:10.0"
    assert (folder / "vendor").read_text() == "0x1af4\n"
    assert (folder / "device").read_text() == "0x107d\n"
    assert (folder / "class").read_text() == "0x00ff00\n"
    assert (folder / "revision").read_text() == "0x01\n"
    assert len((folder / "config").read_bytes()) == 256
    lines = (folder / "resource").read_text().splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["0x00000000e0000000", "0x00000000e0007fff"]
    assert lines[4].split()[:2] == ["0x0000010000000000", "0x0000013fffffffff"]
    assert int(lines[4].split()[2], 16) & 0x102200 == 0x102200
    assert set(lines[1].split()) == {"0x0000000000000000"}


def test_config_follows_and_the_tree_goes(tmp_path, config):
    tree = SysfsTree(tmp_path / "sys")
    config.on_change = lambda: tree.show(ADDRESS, config)
    tree.show(ADDRESS, config)
    config.write(4, b"\x06\x00")
    assert (tree.path / "devices" / "0000:00:10.0" / "config").read_bytes()[4] == 6
    tree.close()
    assert not (tmp_path / "sys").exists()


def test_full_disk_holds_up_nobody_who_changes_the_configuration(tmp_path, config, monkeypatch, caplog):
    tree = SysfsTree(tmp_path / "sys")
    tree.show(ADDRESS, config)
    config.on_change = lambda: tree.update(ADDRESS, config)

    def full(path, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(sysfs_tree, "_replace", full)
        config.write(4, b"\x02\x00")
        assert config.get(4, 2) == 2
        assert "lspci does not see what changed: No space left on device" in caplog.text
    config.write(4, b"\x06\x00")
    assert (tree.path / "devices" / "0000:00:10.0" / "config").read_bytes()[4] == 6


@pytest.mark.skipif(not shutil.which("lspci"), reason="needs lspci")
def test_stock_lspci_prints_the_line_of_the_readme(tmp_path, config):
    tree = SysfsTree(tmp_path / "sys")
    tree.show(ADDRESS, config)
    command = ["lspci", "-O", f"sysfs.path={tree.path}", "-s", "00:10.0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    assert done.stdout == "00:10.0 Unclassified device [00ff]: Red Hat, Inc. Device 107d (rev 01)\n"
