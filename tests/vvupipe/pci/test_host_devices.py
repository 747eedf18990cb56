"""Looking at and binding functions, on a folder that behaves as sysfs does."""

import pytest

from vvupipe.errors import UserError
from vvupipe.pci.address import PciAddress
from vvupipe.pci.host_devices import Binding, all_devices, find_device
from vvupipe.vm import real_functions as real

ADDRESS = "0000:00:10.0"


class Sysfs:
    """/sys/bus/pci with functions that drivers can be bound to; `kernel` reacts to what is written."""

    def __init__(self, root):
        self.root = root
        self.writes = []
        (root / "devices").mkdir(parents=True)
        (root / "drivers").mkdir()
        (root / "drivers_probe").write_text("")
        self.takes = True

    def add(self, address, vendor=0x1AF4, device=0x107D, group=7, driver=None, bar1=0x1000):
        folder = self.root / "devices" / address
        folder.mkdir()
        for name, value in (("vendor", vendor), ("device", device), ("class", 0xFF00), ("revision", 1)):
            (folder / name).write_text(f"{value:#x}\n")
        (folder / "driver_override").write_text("(null)\n")
        bars = [(0, 0xFF), (0xFEA00000, 0xFEA00000 + bar1 - 1) if bar1 else (0, 0)]
        (folder / "resource").write_text("".join(f"{start:#018x} {end:#018x} 0x0\n" for start, end in bars))
        if group is not None:
            members = self.root / "groups" / str(group) / "devices"
            members.mkdir(parents=True, exist_ok=True)
            (members / address).symlink_to(folder)
            (folder / "iommu_group").symlink_to(members.parent)
        if driver:
            self.add_driver(driver)
            self.bind(address, driver)
        return folder

    def add_driver(self, name):
        (self.root / "drivers" / name).mkdir(exist_ok=True)
        (self.root / "drivers" / name / "unbind").write_text("")

    def bind(self, address, driver):
        link = self.root / "devices" / address / "driver"
        link.unlink(missing_ok=True)
        if driver:
            link.symlink_to(self.root / "drivers" / driver)

    def driver(self, address):
        link = self.root / "devices" / address / "driver"
        return link.resolve().name if link.exists() else None


@pytest.fixture
def sysfs(tmp_path, monkeypatch):
    sysfs = Sysfs(tmp_path / "pci")
    real_write = type(tmp_path).write_text

    def write_text(path, text, *args, **kwargs):
        done = real_write(path, text, *args, **kwargs)
        if path.name == "unbind" and text.strip():
            sysfs.writes.append(("unbind", text.strip()))
            sysfs.bind(text.strip(), None)
        elif path.name == "drivers_probe" and text.strip():
            sysfs.writes.append(("probe", text.strip()))
            override = (sysfs.root / "devices" / text.strip() / "driver_override").read_text().strip()
            known = {path.name for path in (sysfs.root / "drivers").iterdir()}
            wanted = override if override not in {"", "(null)"} else "native"
            if sysfs.takes and wanted in known:
                sysfs.bind(text.strip(), wanted)
        return done

    monkeypatch.setattr(type(tmp_path), "write_text", write_text)
    return sysfs


def device(sysfs, address=ADDRESS):
    return find_device(PciAddress.parse(address), sysfs.root)


def test_what_sysfs_tells(sysfs):
    sysfs.add(ADDRESS, driver="native")
    sysfs.add("0000:00:11.0", group=None)
    found = all_devices(sysfs.root)
    assert [(str(d.address), d.vendor, d.device, d.driver, d.iommu_group) for d in found] == [
        (ADDRESS, 0x1AF4, 0x107D, "native", 7),
        ("0000:00:11.0", 0x1AF4, 0x107D, None, None),
    ]
    assert device(sysfs, "0000:00:12.0") is None
    assert all_devices(sysfs.root / "nothing") == []


@pytest.mark.parametrize("former", [None, "native"])
def test_binding_is_undone(sysfs, former):
    folder = sysfs.add(ADDRESS, driver=former)
    sysfs.add_driver("vfio-pci")
    binding = Binding(device(sysfs), sysfs.root)
    assert sysfs.driver(ADDRESS) == "vfio-pci"
    binding.close()
    assert sysfs.driver(ADDRESS) == former
    assert (folder / "driver_override").read_text().strip() == ""
    binding.close()
    assert sysfs.driver(ADDRESS) == former


def test_a_function_that_is_bound_already_stays_so(sysfs):
    sysfs.add(ADDRESS, driver="vfio-pci")
    Binding(device(sysfs), sysfs.root).close()
    assert (sysfs.driver(ADDRESS), sysfs.writes) == ("vfio-pci", [])


def test_what_cannot_be_bound_is_left_as_it_was(sysfs):
    sysfs.add(ADDRESS, driver="native")
    with pytest.raises(UserError, match="modprobe vfio-pci"):
        Binding(device(sysfs), sysfs.root)
    sysfs.add_driver("vfio-pci")
    sysfs.takes = False
    with pytest.raises(UserError, match="not taken by vfio-pci"):
        Binding(device(sysfs), sysfs.root)
    assert (sysfs.root / "devices" / ADDRESS / "driver_override").read_text().strip() == ""


def obstacles(sysfs, dev):
    return {str(f.device.address): f.obstacle for f in real.real_functions(sysfs.root, dev)}


def test_what_stands_in_the_way(sysfs, tmp_path):
    dev = tmp_path / "vfio"
    dev.mkdir()
    sysfs.add(ADDRESS)
    sysfs.add("0000:00:02.0", device=0x1000)  # virtio-net: not ours
    sysfs.add("0000:00:03.0", device=0x1110, bar1=0)  # a window
    assert list(obstacles(sysfs, dev)) == [ADDRESS]
    assert "modprobe vfio-pci" in obstacles(sysfs, dev)[ADDRESS]
    sysfs.add_driver("vfio-pci")
    assert "--bind" in obstacles(sysfs, dev)[ADDRESS]
    sysfs.add("0000:00:04.0", device=0x1110, group=None)
    assert "intel_iommu=on" in obstacles(sysfs, dev)["0000:00:04.0"]
    sysfs.bind(ADDRESS, "vfio-pci")
    assert "is not there" in obstacles(sysfs, dev)[ADDRESS]
    (dev / "7").write_text("")
    assert obstacles(sysfs, dev)[ADDRESS] is None
    sysfs.add("0000:00:05.0", device=0x2000, driver="e1000")
    assert "0000:00:05.0 of the same IOMMU group 7 is bound to e1000" in obstacles(sysfs, dev)[ADDRESS]


def test_what_a_user_types_to_bind(sysfs):
    sysfs.add(ADDRESS, driver="native")
    commands = real.bind_commands(device(sysfs), sysfs.root).split(" && ")
    assert [command.rsplit("/", 1)[-1] for command in commands] == ["driver_override", "unbind", "drivers_probe"]
