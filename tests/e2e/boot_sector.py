"""A disk that boots by itself: a boot sector that reads and writes the disk through the firmware.

Sector 1 holds a counter (byte 0) and a text (from byte 8, ended by 0). At each boot the code reads it with INT 13h,
writes the text and the counter to the serial port, adds 1, writes the sector back and resets the machine; once the
counter is at `boots` it powers off instead (PM1a control of QEMU's q35 at port 0x604). A failed INT 13h writes "!"
and powers off.
"""

SECTOR = 512
LOAD = 0x7C00
BUFFER = 0x7E00
TEXT_AT = 8
_JC, _JZ, _JAE, _JMP = 0x72, 0x74, 0x73, 0xEB


def _le16(value):
    return value.to_bytes(2, "little")


def _code(boots):
    """Machine code with labels: bytes, ("label", name), or (opcode of a short jump, name)."""
    transfer = lambda function: [  # noqa: E731
        bytes([0xB8, 0x01, function]),  # mov ax, function << 8 | 1 sector
        b"\xb9\x02\x00",  # mov cx, 2: cylinder 0, sector 2 (they count from 1)
        b"\x5a\x52",  # pop dx; push dx: the drive that we were booted from
        b"\x30\xf6",  # xor dh, dh: head 0
        b"\xbb" + _le16(BUFFER),  # mov bx, BUFFER
        b"\xcd\x13",  # int 13h
        (_JC, "failed"),
    ]
    put = b"\xba\xf8\x03\xee"  # mov dx, 3f8h; out dx, al
    return [
        b"\x31\xc0\x8e\xd8\x8e\xc0\x8e\xd0",  # xor ax, ax; mov ds, ax; mov es, ax; mov ss, ax
        b"\xbc" + _le16(LOAD),  # mov sp, LOAD
        b"\x52",  # push dx
        *transfer(0x02),
        b"\xbe" + _le16(BUFFER + TEXT_AT),  # mov si, text
        ("label", "next"),
        b"\xac\x84\xc0",  # lodsb; test al, al
        (_JZ, "printed"),
        put,
        (_JMP, "next"),
        ("label", "printed"),
        b"\xa0" + _le16(BUFFER) + b"\x04\x30",  # mov al, [BUFFER]; add al, '0'
        put,
        b"\xb0\x0a",  # mov al, '\n'
        put,
        b"\xfe\x06" + _le16(BUFFER),  # inc byte [BUFFER]
        *transfer(0x03),
        b"\x80\x3e" + _le16(BUFFER) + bytes([boots]),  # cmp byte [BUFFER], boots
        (_JAE, "off"),
        b"\xba\xf9\x0c\xb0\x06\xee",  # mov dx, 0cf9h; mov al, 6; out dx, al: hard reset
        ("label", "stay"),
        b"\xf4",  # hlt
        (_JMP, "stay"),
        ("label", "failed"),
        b"\xb0\x21",  # mov al, '!'
        put,
        ("label", "off"),
        b"\xba\x04\x06\xb8\x00\x20\xef",  # mov dx, 604h; mov ax, 2000h; out dx, ax: SLP_EN, S5
        (_JMP, "stay"),
    ]


def _assemble(items):
    labels, code = {}, b""
    for _ in range(2):  # the first round finds the labels
        code = b""
        for item in items:
            if isinstance(item, bytes):
                code += item
            elif item[0] == "label":
                labels[item[1]] = len(code)
            else:
                opcode, name = item
                offset = labels.get(name, len(code)) - (len(code) + 2)
                code += bytes([opcode]) + offset.to_bytes(1, "little", signed=True)
    return code


def bootable_image(text, boots, size_bytes):
    """The bytes of the disk."""
    code = _assemble(_code(boots))
    assert len(code) <= 440, "the partition table begins there"
    boot = code.ljust(SECTOR - 2, b"\0") + b"\x55\xaa"
    data = (bytes(TEXT_AT) + text.encode() + b"\0").ljust(SECTOR, b"\0")
    return (boot + data).ljust(size_bytes, b"\0")
