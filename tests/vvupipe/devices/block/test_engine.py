"""Which engine an image gets, and the one line for what is not possible."""

import os
import types

import pytest

from vvupipe.devices.block import engine
from vvupipe.devices.block.engine import Engine, EngineChoice, choose, engine_fields
from vvupipe.devices.block.image import open_image
from vvupipe.errors import UserError

NONE = "this kernel has none"
FOR_URING = "--sqpoll, --iopoll and --pin-memory"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(1 << 16))
    return path


def opened(path, **options):
    return open_image(path, **{"read_only": False, "lock": False, **options})


def given(monkeypatch, reason):
    """io_uring is there (None), or is not for that reason."""
    monkeypatch.setattr(engine.io_uring, "available", lambda: reason)


class Direct:
    """An image that was opened with O_DIRECT, wherever the tests run."""

    direct, read_only, path, fd, size_bytes = True, False, "disk.img", -1, 1 << 16
    limits = types.SimpleNamespace(direct_alignment_bytes=512)


@pytest.mark.parametrize("missing", [None, NONE])
def test_auto_copies_what_can_be_mapped(monkeypatch, image, missing):
    given(monkeypatch, missing)
    assert choose(Engine.AUTO, opened(image)) == EngineChoice(Engine.MMAP, missing is None)


def test_only_files_in_memory_are_mapped_for_writing(monkeypatch, image):
    given(monkeypatch, None)
    assert not choose(Engine.MMAP, opened(image)).writable_map
    monkeypatch.setattr(engine.file_memory, "is_dax", lambda fd: True)
    assert choose(Engine.MMAP, opened(image)) == EngineChoice(Engine.MMAP, True, writable_map=True, map_always=True)
    monkeypatch.undo()
    fd = os.memfd_create("image")
    os.truncate(fd, 1 << 16)
    in_memory = opened(image)
    os.close(in_memory.fd)
    in_memory.fd = fd
    choice = choose(Engine.MMAP, in_memory)
    assert (choice.writable_map, choice.map_always) == (True, False)


def test_auto_of_direct_io(monkeypatch):
    given(monkeypatch, None)
    assert choose(Engine.AUTO, Direct) == EngineChoice(Engine.URING, True)
    given(monkeypatch, NONE)
    assert choose(Engine.AUTO, Direct) == EngineChoice(Engine.SYNC, False)


def test_auto_of_an_image_that_cannot_be_mapped(monkeypatch, image):
    given(monkeypatch, None)
    write_only = opened(image)
    os.close(write_only.fd)
    write_only.fd = os.open(image, os.O_WRONLY)  # mmap(2): EACCES
    assert choose(Engine.AUTO, write_only) == EngineChoice(Engine.URING, True)
    with pytest.raises(UserError, match="cannot be mapped: use --engine uring or sync"):
        choose(Engine.MMAP, write_only)


def test_image_of_somebody_else(monkeypatch, image):
    """To who neither owns nor may write it mincore(2) says that all is in memory."""
    given(monkeypatch, None)
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(image).st_uid + 1)
    assert choose(Engine.AUTO, opened(image, read_only=True)).engine == Engine.MMAP, "it may be written"
    monkeypatch.setattr(os, "access", lambda *arguments, **options: False)
    assert choose(Engine.AUTO, opened(image, read_only=True)) == EngineChoice(Engine.URING, True)
    with pytest.raises(UserError, match=r"--engine mmap: Linux tells what of .* is in memory only to who owns it"):
        choose(Engine.MMAP, opened(image, read_only=True))


def test_read_only_image_is_not_mapped_for_writing(monkeypatch, image):
    given(monkeypatch, None)
    assert choose(Engine.MMAP, opened(image, read_only=True)) == EngineChoice(Engine.MMAP, True)


@pytest.mark.parametrize("missing", [None, NONE])
def test_sync_takes_no_io_uring(monkeypatch, image, missing):
    given(monkeypatch, missing)
    assert choose(Engine.SYNC, opened(image)) == EngineChoice(Engine.SYNC, False)


def test_uring_and_sqpoll(monkeypatch, image):
    given(monkeypatch, None)
    assert choose(Engine.URING, opened(image)) == EngineChoice(Engine.URING, True)
    assert choose(Engine.URING, opened(image), sqpoll=True) == EngineChoice(Engine.URING, True, True)
    assert choose(Engine.MMAP, opened(image), sqpoll=True) == EngineChoice(Engine.MMAP, True, True)
    assert choose(Engine.URING, opened(image), pin_memory=True) == EngineChoice(Engine.URING, True, pin_memory=True)


@pytest.mark.parametrize(
    ("wanted", "sqpoll", "words"),
    [
        (Engine.URING, False, "io_uring cannot be used: this kernel has none: use --engine sync"),
        (Engine.AUTO, True, f"io_uring cannot be used: this kernel has none: leave {FOR_URING} away"),
        (Engine.MMAP, True, f"io_uring cannot be used: this kernel has none: leave {FOR_URING} away"),
    ],
)
def test_without_io_uring(monkeypatch, image, wanted, sqpoll, words):
    given(monkeypatch, NONE)
    with pytest.raises(UserError) as caught:
        choose(wanted, opened(image), sqpoll=sqpoll)
    assert str(caught.value) == words


def test_sync_and_sqpoll_do_not_go_together(monkeypatch, image):
    given(monkeypatch, None)
    with pytest.raises(UserError, match="which --engine sync does not use: leave them away"):
        choose(Engine.SYNC, opened(image), sqpoll=True)


def test_polling_for_completions(monkeypatch, image):
    given(monkeypatch, None)
    asked = []
    monkeypatch.setattr(engine.polled_queues, "missing", lambda *arguments: asked.append(arguments))
    for wanted in (Engine.AUTO, Engine.URING):
        assert choose(wanted, Direct, iopoll=True) == EngineChoice(Engine.URING, True, iopoll=True)
    assert asked == [(-1, 512)] * 2
    assert engine_fields(EngineChoice(Engine.URING, True, iopoll=True), Direct)["iopoll"]
    with pytest.raises(UserError, match="--iopoll is for what goes around the page cache: add --direct"):
        choose(Engine.AUTO, opened(image), iopoll=True)
    with pytest.raises(UserError, match="which --engine sync does not use"):
        choose(Engine.SYNC, Direct, iopoll=True)
    monkeypatch.setattr(engine.polled_queues, "missing", lambda *_: "it is slow")
    with pytest.raises(UserError, match=r"--iopoll: completions on disk\.img cannot be polled for: it is slow"):
        choose(Engine.AUTO, Direct, iopoll=True)


def test_mapping_and_direct_io_do_not_go_together(monkeypatch):
    given(monkeypatch, None)
    with pytest.raises(UserError, match="--engine mmap goes through the page cache and --direct around it"):
        choose(Engine.MMAP, Direct)


def test_what_workers_are_told(image):
    disk = opened(image)
    mapped = engine_fields(EngineChoice(Engine.MMAP, True, writable_map=True), disk)
    assert (mapped["maps"], mapped["writable_map"], mapped["uring"], mapped["nowait"]) == (True, True, True, False)
    sync = engine_fields(EngineChoice(Engine.SYNC, False), disk)
    assert (sync["maps"], sync["nowait"], sync["uring"]) == (False, True, False)
    direct = engine_fields(EngineChoice(Engine.SYNC, False), Direct)
    assert not direct["nowait"], "nothing of it would be in memory"
    assert sync["helpers"] > mapped["helpers"] > 0
