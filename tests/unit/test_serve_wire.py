"""Frames, shared memory, and the folder of input images, each by itself."""

from __future__ import annotations

import base64
import fcntl
import io
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omni_rollout.rollout.serve import shared
from omni_rollout.rollout.serve.errors import BadRequest
from omni_rollout.rollout.serve.images import ImageFolder, image_bytes
from omni_rollout.rollout.serve.wire import CutOffError, frame, frames

PARTS = st.lists(
    st.tuples(st.dictionaries(st.text(max_size=5), st.integers(), max_size=3), st.binary(max_size=200)), max_size=5
)


@settings(max_examples=100, deadline=None)
@given(parts=PARTS, cut=st.integers(1, 50))
def test_frames_come_back_however_they_are_cut(parts, cut):
    content = b"".join(b"".join(frame({**head, "type": "x"}, body)) for head, body in parts)
    whole = content + b"".join(frame({"type": "end"}))
    pieces = [whole[start : start + cut] for start in range(0, len(whole), cut)]
    found = list(frames(pieces))
    assert [body for _, body in found] == [body for _, body in parts]
    assert all(head.items() <= got.items() for (head, _), (got, _) in zip(parts, found, strict=True) if "type" not in head)
    with pytest.raises(CutOffError):
        list(frames([content]))
    with pytest.raises(CutOffError):
        list(frames([whole[:-1]]))


@pytest.fixture
def memory(tmp_path, monkeypatch):
    monkeypatch.setattr(shared, "MEMORY", tmp_path)
    return tmp_path


def test_shared_memory_is_offered_to_who_can_read_it(memory):
    folder = shared.SharedFolder()
    assert folder.folder is not None and folder.folder.stat().st_mode & 0o077 == 0
    path, token = shared.offered(str(folder.folder)) or pytest.fail("not offered")
    assert path == folder.folder and folder.knows(token) and not folder.knows(token[:-1]) and not folder.knows(None)
    for other in ("/etc", str(memory), str(memory / "omni_rollout-x" / ".." / ".."), str(memory / "else"), None):
        assert shared.offered(other) is None
    (folder.folder / "0123456789abcdef.safetensors").write_bytes(b"x")
    (folder.folder / "fedcba9876543210.safetensors").symlink_to("/etc/passwd")
    assert folder.file("0123456789abcdef.safetensors") is not None
    for name in ("fedcba9876543210.safetensors", "../token", "token", "/etc/passwd", "0123456789abcdee.safetensors", ""):
        assert folder.file(name) is None, name
    folder.close()
    assert not list(memory.iterdir())


def test_what_a_killed_server_leaves_is_swept_and_what_lives_stays(memory):
    lives, dead = shared.SharedFolder(), memory / "omni_rollout-dead"
    dead.mkdir()
    (dead / "lock").touch()
    (dead / "0123456789abcdef.safetensors").write_bytes(b"x" * 1000)
    young = memory / "omni_rollout-young"  # just being made: no lock yet
    young.mkdir()
    shared.sweep()
    assert not dead.exists() and young.exists() and lives.folder is not None and lives.folder.exists()
    lives.close()


def test_the_lock_goes_with_its_process(memory):
    child = os.fork()
    if not child:
        folder = shared.SharedFolder()
        os._exit(0 if folder.folder is not None else 1)
    assert os.waitpid(child, 0)[1] == 0
    (left,) = memory.iterdir()
    with (left / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    shared.sweep()
    assert not left.exists()


def test_a_picture_is_kept_once_as_long_as_someone_needs_it():
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, format="JPEG")
    content = image_bytes(base64.b64encode(buffer.getvalue()).decode(), "images.0")
    assert content == buffer.getvalue() and base64.b64encode(content).startswith(b"/9j/"), "base64 that looks like a path"
    folder = ImageFolder(64)
    one, two = folder.keep(content, "a"), folder.keep(content, "b")
    assert one == two and len(folder) == 1 and Path(one.path).read_bytes() == content
    folder.release([one])
    assert Path(one.path).exists()
    folder.release([two])
    assert not Path(one.path).exists() and not len(folder)
    with pytest.raises(BadRequest, match=r"8x8 pixels, expected at most 63"):
        ImageFolder(63).keep(content, "a")
    for wrong in ("data:image/png,abc", "/etc/passwd", "http://x/y.png", "~/x"):
        with pytest.raises(BadRequest):
            image_bytes(wrong, "images.0")
