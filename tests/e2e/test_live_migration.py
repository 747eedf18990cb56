"""Live migration between two QEMU processes, each with a back-end of its own on the same image.

What the back-end writes into guest memory while QEMU copies it reaches the other side only by the dirty-page log: the
guest fills its page cache from the disk all the time, and compares.

Debian 12's QEMU will not do: before 9.0, TCG forgets some pages that the guest's CPU writes while a migration runs
(QEMU's commit 03bfc2188f). In two of 24 runs of this test, programs or the guest's kernel went wrong for that.
"""

import asyncio
import os
import re
import time

import guest_kit
import pytest
from backends import Process, vvupipe_command, vvupipe_environment, wait_until
from qemu.qmp import QMPClient

from vvupipe.vm.qemu_backend import is_listening

pytestmark = [pytest.mark.qemu, pytest.mark.timeout(240)]

MIB = 1 << 20
PART_MIB, PARTS = 4, 4
READ_MIB = PART_MIB * PARTS
ROUNDS = 20
# Each round fills the page cache with another part of the disk and reads it again from there: what the last rounds
# before the end of the migration brought into memory is looked at on the other side.
SCRIPT = f"""
exec 3</dev/vda  # the last one who closes it empties its page cache
part() {{ dd if=/dev/vda bs=1M skip=$(($1 * {PART_MIB})) count={PART_MIB} 2>/dev/null | md5sum; }}
for p in $(seq 0 {PARTS - 1}); do part $p >/tmp/known$p; done
for i in $(seq {ROUNDS}); do
    p=$((i % {PARTS}))
    echo 3 >/proc/sys/vm/drop_caches
    for again in 1 2 3 4; do
        [ "$(part $p)" = "$(cat /tmp/known$p)" ] || exit 10
    done
    place=$(({READ_MIB} * 256 + i))
    printf "block %04d" $i | dd of=/dev/vda bs=4k seek=$place conv=notrunc,fsync 2>/dev/null || exit 11
    echo "round $i"
done
"""


class Vm:
    """A QEMU with the guest's console in a file; `incoming` waits for a migration."""

    def __init__(self, qemu, folder, name, socket, initrd, packed, incoming=None):
        self.console, self.monitor = folder / f"{name}.console", folder / f"{name}.qmp"
        command = [
            *(qemu, "-machine", "q35,accel=tcg,memory-backend=ram", "-cpu", "max", "-m", "192M"),
            *("-object", "memory-backend-memfd,id=ram,size=192M,share=on", "-nodefaults", "-display", "none"),
            *("-kernel", str(guest_kit.kernel().image), "-initrd", str(initrd)),
            # A guest that clears each page that it takes has it copied again for that, log or no log.
            *(
                "-append",
                "console=ttyS0 panic=-1 quiet init_on_alloc=0",
                "-serial",
                f"file:{self.console}",
                "-no-reboot",
            ),
            *("-chardev", f"socket,id=disk,path={socket}"),
            *("-device", f"vhost-user-blk-pci,chardev=disk,num-queues=1,packed={'on' if packed else 'off'}"),
            *("-qmp", f"unix:{self.monitor},server=on,wait=off"),
            *(("-incoming", f"unix:{incoming}") if incoming else ()),
        ]
        self.process = Process(command, folder / f"{name}.log")

    def text(self):
        return self.console.read_text(errors="replace") if self.console.exists() else ""

    def rounds(self):
        return self.text().count("round ")

    def wait_for(self, text, timeout_s=100):
        deadline = time.monotonic() + timeout_s
        while text not in self.text():
            self.process.check_alive()
            assert time.monotonic() < deadline, f"no '{text}':\n{self.text()}\n{self.process.log.read_text()}"
            time.sleep(0.05)


async def migrate(source, target_socket):
    """Migrate `source`, and let it end only after some rounds whose pages were copied before they were filled."""
    client = QMPClient("source")
    await client.connect(str(source.monitor))

    async def until(reached):
        async with asyncio.timeout(60):
            while not reached(info := await client.execute("query-migrate")):
                assert info["status"] not in ("failed", "completed"), info
                await asyncio.sleep(0.05)
        return info["ram"]

    try:
        await client.execute("migrate-set-parameters", {"max-bandwidth": 16 * MIB, "downtime-limit": 1})
        await client.execute("migrate", {"uri": f"unix:{target_socket}"})
        await until(lambda info: "ram" in info and info["ram"]["dirty-sync-count"] >= 2)
        # All was copied once. From here on there is always more to copy than a millisecond allows.
        await client.execute("migrate-set-parameters", {"max-bandwidth": MIB // 4})
        rounds = source.rounds()
        await until(lambda info: source.rounds() >= rounds + 3)
        await client.execute("migrate-set-parameters", {"downtime-limit": 2000, "max-bandwidth": 256 * MIB})
        return await until(lambda info: info["status"] == "completed")
    finally:
        await client.disconnect()


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_guest_reads_and_writes_through_a_live_migration(new_qemu, packed, tmp_path):
    image = tmp_path / "disk.img"
    image.write_bytes(os.urandom((READ_MIB + 8) * MIB))
    initrd = tmp_path / "initramfs"
    initrd.write_bytes(guest_kit.base_initramfs() + guest_kit.initramfs.script_overlay(SCRIPT))
    processes = []
    try:
        sockets = [tmp_path / f"{name}.sock" for name in ("source", "target")]
        for socket in sockets:
            command = vvupipe_command("device", "block", "--file", image, "--socket", socket, "--no-lock", "-v")
            processes.append(Process(command, tmp_path / f"{socket.stem}-block.log", vvupipe_environment(tmp_path)))
        wait_until(lambda: all(is_listening(socket) for socket in sockets), processes)
        source = Vm(new_qemu, tmp_path, "source", sockets[0], initrd, packed)
        processes.append(source.process)
        incoming = tmp_path / "migration.sock"
        target = Vm(new_qemu, tmp_path, "target", sockets[1], initrd, packed, incoming)
        processes.append(target.process)
        wait_until(incoming.exists, processes)
        source.wait_for("round 3")
        figures = asyncio.run(migrate(source, incoming))
        source.process.end()
        assert figures["dirty-sync-count"] >= 3, figures
        target.wait_for("vvupipe-guest: exit")
        assert "vvupipe-guest: exit 0" in target.text(), target.text()
    finally:
        logs = "\n".join(process.log.read_text() for process in processes)
        for process in reversed(processes):
            process.end()
    said = [int(number) for text in (source.text(), target.text()) for number in re.findall(r"round (\d+)", text)]
    assert said == list(range(1, ROUNDS + 1)), "every round once, the last ones on the other side"
    assert not re.search(rf"round {ROUNDS}\b", source.text())
    blocks = image.read_bytes()[READ_MIB * MIB :]
    assert [blocks[4096 * i : 4096 * i + 10] for i in range(1, ROUNDS + 1)] == [
        b"block %04d" % i for i in range(1, ROUNDS + 1)
    ]
    assert "the dirty-page log is on" in logs
