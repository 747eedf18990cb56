from pathlib import Path

import pytest

from vvupipe.cli import machine
from vvupipe.errors import UserError
from vvupipe.vm.qemu_machine import BlockDisk, Serial, SharedDir


def test_options_of_a_vm_with_a_kernel():
    assert machine.parse_block("a.img") == BlockDisk(Path("a.img"))
    assert machine.parse_block("path=a.img,ro=true") == BlockDisk(Path("a.img"), True)
    assert machine.parse_block("a.img,ro") == BlockDisk(Path("a.img"), True)
    assert machine.parse_shared_dir("/:host:ro=true:type=9p") == SharedDir(Path("/"), "host", True)
    assert machine.parse_shared_dir("/a:b") == SharedDir(Path("/a"), "b")
    assert machine.parse_serial(None) == Serial()
    assert machine.parse_serial("type=file,path=/x,hardware=serial,num=1,console") == Serial("file", Path("/x"))
    assert machine.parse_serial("type=sink") == Serial("sink")
    assert machine.parse_option_size("o", "k", "2G") == 2 << 30


@pytest.mark.parametrize(
    ("parse", "text"),
    [
        (machine.parse_block, ""),
        (machine.parse_block, "a,rw=true"),
        (machine.parse_block, "a,ro=maybe"),
        (machine.parse_shared_dir, "/folder"),
        (machine.parse_shared_dir, "/a:b:type=fs"),
        (machine.parse_serial, "type=file"),
        (machine.parse_serial, "type=sink,path=/x"),
        (machine.parse_serial, "type=tty"),
        (machine.parse_serial, "num=2"),
        (machine.parse_serial, "speed=9600"),
    ],
)
def test_words_that_are_none(parse, text):
    with pytest.raises(UserError, match="--"):
        parse(text)
