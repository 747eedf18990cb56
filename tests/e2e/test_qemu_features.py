"""What a real Linux guest makes of the device's features: ring layouts, discard, write cache, resize, an IOMMU."""

import os
import re
import shutil
import subprocess

import pytest
from backends import BACKENDS, Backend, Process, vvupipe_command, vvupipe_environment
from guest_kit import Guest, boot_guest

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

MIB = 1 << 20


def serve(folder, image, *options):
    """A back-end with one socket on `image`."""
    folder.mkdir(exist_ok=True)
    socket = folder / "block.sock"
    command = vvupipe_command("device", "block", "--file", image, "--socket", socket, "-v", *options)
    return Backend(socket, lambda: Process(command, folder / "block.log", vvupipe_environment(folder)))


@pytest.fixture
def backends(tmp_path):
    """make(name, size, *options): a back-end on a fresh image of random bytes; (back-end, image)."""
    made = []

    def make(name, size_bytes=16 * MIB, *options):
        folder = tmp_path / name
        folder.mkdir()
        image = folder / "disk.img"
        image.write_bytes(os.urandom(size_bytes))
        made.append(serve(folder, image, *options))
        return made[-1], image

    yield make
    for backend in made:
        backend.end()


RING_SCRIPT = """
check() {
    disk=$1
    echo "$disk features $(cat /sys/block/$disk/device/features)"
    dd if=/dev/urandom of=/tmp/data bs=1M count=8 2>/dev/null
    dd if=/tmp/data of=/dev/$disk bs=256k oflag=direct conv=notrunc,fsync 2>/dev/null || exit 10
    dd if=/dev/$disk bs=4k count=512 iflag=direct 2>/dev/null | cmp -n 2097152 - /tmp/data || exit 11
    echo 3 >/proc/sys/vm/drop_caches
    head -c 8388608 /dev/$disk | cmp - /tmp/data || exit 12
    echo "$disk data $(sha256sum </tmp/data)"
}
for disk in vda vdb vdc; do check $disk; done
echo "queues $(ls /sys/block/vdc/mq | wc -l)"
echo "cache $(cat /sys/block/vdc/queue/write_cache)"
echo "write through" >/sys/block/vdc/cache_type || exit 13
echo "cache_after $(cat /sys/block/vdc/cache_type)"
dd if=/dev/urandom of=/dev/vdc bs=4k count=16 seek=2048 oflag=direct conv=notrunc 2>/dev/null || exit 14
echo "write back" >/sys/block/vdc/cache_type || exit 15
"""

# Feature bits in the guest's sysfs: a string of 0 and 1, bit 0 first.
BITS = {"topology": 10, "config_wce": 11, "indirect": 28, "event_idx": 29, "packed": 34}


def has(end, disk, feature):
    return end.word(f"{disk} features")[BITS[feature]] == "1"


def test_ring_layouts_and_the_write_cache(backends, tmp_path):
    (packed, packed_image), (plain, plain_image), (many, many_image) = (backends(name) for name in "abc")
    disks = [
        {"socket_path": packed.socket, "num_queues": 1, "properties": ["packed=on"]},
        {"socket_path": plain.socket, "num_queues": 1, "properties": ["indirect_desc=off", "event_idx=off"]},
        {"socket_path": many.socket, "num_queues": 4, "properties": ["config-wce=on"]},
    ]
    end = boot_guest(tmp_path, disks, RING_SCRIPT, cpus=2, timeout_s=150)
    assert (end.status, end.script_status) == (0, 0), end
    assert has(end, "vda", "packed")
    assert not has(end, "vdb", "packed")
    assert not has(end, "vdb", "indirect")
    assert not has(end, "vdb", "event_idx")
    assert has(end, "vdc", "indirect")
    assert has(end, "vdc", "config_wce")
    assert has(end, "vda", "topology")
    for disk, image in (("vda", packed_image), ("vdb", plain_image), ("vdc", many_image)):
        done = subprocess.run(["sha256sum"], input=image.read_bytes()[: 8 * MIB], capture_output=True, check=True)
        assert end.word(f"{disk} data").split()[0] == done.stdout.decode().split()[0]
    assert end.word("queues") == "2", "one for each CPU that there is"
    assert end.word("cache") == "write back"
    assert end.word("cache_after") == "write through"
    log = many.serving.log.read_text()
    assert re.search("the write cache is off.*the write cache is on", log, re.DOTALL), log


DISCARD_SCRIPT = """
echo "discard $(cat /sys/block/vda/queue/discard_max_bytes)"
echo "zeroes $(cat /sys/block/vda/queue/write_zeroes_max_bytes)"
echo "physical $(cat /sys/block/vda/queue/physical_block_size)"
blkdiscard -o 0 -l 33554432 /dev/vda || exit 10
echo "blkdiscard done"
head -c 33554432 /dev/vda | tr -d '\\0' | head -c 1 | grep -q . && exit 11
@BLKDISCARD@ -z -o 33554432 -l 8388608 /dev/vda || exit 14
dd if=/dev/vda bs=1M skip=32 count=8 iflag=direct 2>/dev/null | tr -d '\\0' | head -c 1 | grep -q . && exit 15
echo "write-zeroes done"
mount -t ext4 /dev/vdb /mnt || exit 12
dd if=/dev/zero bs=1M count=24 2>/dev/null | tr '\\0' 'x' >/mnt/large
sync
rm /mnt/large
sync
fstrim -v /mnt || exit 13
umount /mnt
echo "fstrim done"
"""


def test_discard_shrinks_the_image(backends, tmp_path):
    discarded, first = backends("a", 64 * MIB)
    trimmed, second = backends("b", 64 * MIB)
    sbin = {**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}
    subprocess.run(["mkfs.ext4", "-q", "-F", "-E", "nodiscard", second], check=True, env=sbin, timeout=60)
    before = [image.stat().st_blocks * 512 for image in (first, second)]
    # The one of busybox cannot write zeroes (BLKZEROOUT).
    program = shutil.which("blkdiscard", path="/usr/sbin:/sbin")
    script = DISCARD_SCRIPT.replace("@BLKDISCARD@", program)
    end = boot_guest(tmp_path, [discarded.socket, trimmed.socket], script, programs=[program], timeout_s=150)
    assert (end.status, end.script_status) == (0, 0), end
    assert int(end.word("discard")) >= MIB
    assert int(end.word("zeroes")) >= MIB
    assert end.word("physical") == "4096"
    after = [image.stat().st_blocks * 512 for image in (first, second)]
    assert after[0] <= before[0] - 32 * MIB
    content = first.read_bytes()
    assert content[: 40 * MIB] == bytes(40 * MIB)
    assert content[40 * MIB :].count(0) < MIB, "the rest is as random as it was"
    # Random bytes filled the image: all that the file system does not use is given back.
    assert after[1] <= before[1] - 32 * MIB
    check = subprocess.run(["fsck.ext4", "-fn", second], capture_output=True, env=sbin, check=False, timeout=60)
    assert check.returncode == 0, check.stdout


RESIZE_SCRIPT = """
echo "sectors $(cat /sys/block/vda/size)"
for i in $(seq 600); do
    now=$(cat /sys/block/vda/size)
    [ $now = @NEW@ ] && break
    sleep 0.1
done
[ $now = @NEW@ ] || exit 10
printf last | dd of=/dev/vda bs=512 seek=$((now - 1)) conv=notrunc,fsync 2>/dev/null || exit 11
echo "resized $now"
"""


@pytest.mark.parametrize("path", ["socket", "vvu"])
def test_resize_reaches_the_guest(path, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(16 * MIB))
    script = RESIZE_SCRIPT.replace("@NEW@", str(24 * MIB // 512))
    with BACKENDS[f"vvupipe-{path}"](image, tmp_path) as backend, Guest(tmp_path, [backend.socket], script) as guest:
        guest.wait_for(f"sectors {16 * MIB // 512}")
        subprocess.run(vvupipe_command("device", "resize", image, "24M"), check=True, timeout=30)
        end = guest.wait()
    assert (end.status, end.script_status) == (0, 0), end
    assert image.stat().st_size == 24 * MIB
    assert image.read_bytes()[-512:-508] == b"last"


IOMMU_SCRIPT = """
dmesg | grep -q "Adding to iommu group" || exit 9
echo "features $(cat /sys/block/vda/device/features)"
dd if=/dev/urandom of=/tmp/data bs=1M count=4 2>/dev/null
dd if=/tmp/data of=/dev/vda bs=64k oflag=direct conv=notrunc,fsync 2>/dev/null || exit 10
dd if=/dev/vda bs=64k count=64 iflag=direct 2>/dev/null | cmp - /tmp/data || exit 11
echo "data $(sha256sum </tmp/data)"
"""


def test_guest_with_an_iommu(backends, tmp_path):
    backend, image = backends("a")
    disk = {
        "socket_path": backend.socket,
        "num_queues": 1,
        "properties": ["iommu_platform=on", "ats=on", "disable-legacy=on"],
    }
    end = boot_guest(
        tmp_path, [disk], IOMMU_SCRIPT, iommu=True, params=["quiet", "intel_iommu=on", "iommu.passthrough=0"],
        timeout_s=100,
    )  # fmt: skip
    assert (end.status, end.script_status) == (0, 0), end
    assert end.word("features")[33] == "1"
    done = subprocess.run(["sha256sum"], input=image.read_bytes()[: 4 * MIB], capture_output=True, check=True)
    assert end.word("data").split()[0] == done.stdout.decode().split()[0]
