"""docs/coverage.md: every name of the code has its row, and every row's tests exist."""

import re
from pathlib import Path

import pytest

from kernels import virtio_layout
from vvupipe.vhost_user.messages import BackendRequest, ProtocolFeature, Request

TESTS = Path(__file__).resolve().parent
TABLE = TESTS.parent / "docs" / "coverage.md"


def sections():
    """{heading: [cells of each row]}"""
    found, rows = {}, []
    for line in TABLE.read_text().splitlines():
        if line.startswith("## "):
            rows = found[line[3:]] = []
        elif line.startswith("|") and not line.startswith("| ---"):
            rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return {heading: rows[1:] for heading, rows in found.items()}


SECTIONS = sections()


@pytest.mark.parametrize(
    ("heading", "names"),
    [
        ("Requests of the front-end", Request),
        ("Requests of the back-end", BackendRequest),
        ("Protocol features", ProtocolFeature),
    ],
)
def test_every_name_has_one_row(heading, names):
    assert [row[0] for row in SECTIONS[heading]] == [each.name for each in names]


def test_every_ring_feature_and_block_command_has_a_row():
    rows = " ".join(row[0] for heading in ("Ring features", "Block commands and features") for row in SECTIONS[heading])
    prefixes = re.compile(r"^(F|BLK_F|BLK_T)_(.+)$")
    names = {match[2] for name in dir(virtio_layout) if (match := prefixes.match(name))}
    without_a_row = {"VERSION_1"}  # what all of it stands on
    missing = {name for name in names - without_a_row if not re.search(rf"\b{name}\b", rows)}
    assert not missing


def test_every_row_has_tests_that_exist():
    rows = [row for rows in SECTIONS.values() for row in rows]
    assert len(rows) > 90
    for row in rows:
        named = [name for name in row[-1].split(", ") if name]
        assert named, f"{row[0]} without a test"
        for name in named:
            path, _, function = name.partition("::")
            source = (TESTS / path).read_text()
            assert re.search(rf"^(async )?def {function}\(", source, re.MULTILINE), f"{row[0]}: {name}"
