"""The configuration space, field by field as virtio 1.2, 5.2.4 lays it out."""

import struct

from vvupipe.devices.block import config_space


def test_fields():
    space = config_space.pack(1 << 30, 4096, 254, 4)
    assert struct.unpack_from("<Q", space, 0) == ((1 << 30) // 512,)
    assert struct.unpack_from("<I", space, 12) == (254,)
    assert struct.unpack_from("<I", space, 20) == (4096,)
    assert space[32] == 1
    assert struct.unpack_from("<H", space, 34) == (4,)
    assert space[24:32] == bytes(8), "no topology"
