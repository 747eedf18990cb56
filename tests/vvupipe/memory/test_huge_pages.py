"""RAM in huge pages of both kinds, on the machine's real ones."""

import os
import re
import subprocess

import pytest

from tests.huge_pages_kit import KINDS, PAGE, machine_with, mapped, meminfo
from vvupipe.errors import UserError
from vvupipe.memory import huge_pages
from vvupipe.memory.huge_pages import HugePages
from vvupipe.memory.mapping import Mapping

pytestmark = pytest.mark.timeout(120)

RESERVED = HugePages(PAGE, reserved=True)
WORD = f"test-{os.getpid()}"


@pytest.mark.parametrize("kind", KINDS)
def test_pages_are_huge_for_all_who_map_them(kind):
    with machine_with(kind, 4):
        pages = huge_pages.choose(4 * PAGE)
        assert pages == HugePages(PAGE, reserved=kind == "reserved")
        assert str(pages) == f"huge pages (2 MiB), {kind}"
        fd = huge_pages.create(WORD, 4 * PAGE, pages)
        with Mapping(fd, 4 * PAGE, huge=True) as ours:
            ours.view[PAGE + 5] = 7
            ours.view[3 * PAGE] = 8
            assert mapped("self", kind, WORD) == (2 * PAGE, 2 * PAGE)
            assert bytes(ours.view[:PAGE]) == bytes(PAGE), "new memory is zeroed"
            # A back-end maps what it gets, and asks for nothing.
            with Mapping(fd, 4 * PAGE) as theirs:
                assert (theirs.view[PAGE + 5], theirs.view[3 * PAGE]) == (7, 8)
                touched, huge = mapped("self", kind, WORD)
                assert touched == huge >= 5 * PAGE
        os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_parts_that_are_no_whole_huge_pages(kind):
    with machine_with(kind, 3):
        fd = huge_pages.create(WORD, 3 * PAGE, huge_pages.choose(3 * PAGE))
        for huge in (True, False):
            with Mapping(fd, 4096, PAGE + 4096, huge=huge) as part, Mapping(fd, PAGE, PAGE // 2, huge=huge) as across:
                part.view[:] = bytes([huge + 1]) * 4096
                assert len(across.view) == PAGE
                across.view[PAGE // 2 - 1 : PAGE // 2 + 1] = b"ab"
                assert os.pread(fd, 4098, PAGE - 1)[:2] == b"ab"
                assert os.pread(fd, 4096, PAGE + 4096) == bytes([huge + 1]) * 4096
        assert mapped("self", kind, WORD) == (0, 0), "both are unmapped"
        os.close(fd)


def test_reserved_pages_are_promised_at_once():
    with machine_with("reserved", 4):
        fd = huge_pages.create(WORD, 3 * PAGE, RESERVED)
        assert meminfo("HugePages_Rsvd") >= 3
        with pytest.raises(UserError, match="no huge pages for 4 MiB of RAM"):
            huge_pages.choose(2 * PAGE)
        with pytest.raises(UserError, match=r"no room for 4 MiB of RAM in huge pages \(2 MiB\), reserved"):
            huge_pages.create(WORD, 2 * PAGE, RESERVED)
        free = meminfo("HugePages_Free")
        os.close(fd)
        assert huge_pages.choose(4 * PAGE) == RESERVED
        assert meminfo("HugePages_Free") == free


def test_what_the_refusal_says_helps():
    with machine_with("none"):
        total = meminfo("HugePages_Total")
        with pytest.raises(UserError) as refused:
            huge_pages.choose(6 * PAGE)
        assert "\n" not in str(refused.value)
        by_hand, reserving = re.search(r"as root, (.*) \(or (.*)\)$", str(refused.value)).groups()
        assert by_hand == "echo advise > /sys/kernel/mm/transparent_hugepage/shmem_enabled"
        assert reserving == f"sysctl vm.nr_hugepages={total + 6}"
        (huge_pages.NR_HUGEPAGES).write_text(reserving.partition("=")[2])
        if meminfo("HugePages_Total") == total + 6:
            assert huge_pages.choose(6 * PAGE) == RESERVED
        subprocess.run(by_hand, shell=True, check=True, timeout=10)
        assert huge_pages.choose(6 * PAGE) == HugePages(PAGE, reserved=False), "transparent ones come first"


def test_ram_is_whole_huge_pages():
    with machine_with("transparent"), pytest.raises(UserError, match=r"--mem 17: .* multiple of 2 MiB: use --mem 18"):
        huge_pages.choose(17 << 20)


def test_more_than_the_machine_has():
    with pytest.raises(UserError, match="are available: use a smaller --mem"):
        huge_pages.create(WORD, 1 << 50, HugePages(PAGE, reserved=False))


def test_usual_pages_have_a_text():
    assert huge_pages.pages_text(None) == f"pages of {os.sysconf('SC_PAGESIZE') >> 10} KiB"
