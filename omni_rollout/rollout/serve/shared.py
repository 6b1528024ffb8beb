"""POSIX shared memory between a server and a client on one machine: capsules and weights that need not pass the socket.

A server has a folder of its own where Linux keeps such memory, and proves nothing by its name alone: a client that can read the
`token` in it is on the same machine and of the same user, and says so by sending the token. A capsule lies there as a file,
which the client maps, not copies, and whose name it removes at once. (`multiprocessing.shared_memory` makes the same files, but
its resource tracker also removes those that another process still needs.) The server holds a lock on its folder as long as it
lives: whoever can take it may clear the folder away, so a crash leaves nothing behind for long.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import tempfile
from pathlib import Path

MEMORY = Path("/dev/shm")
PREFIX = "omni_rollout-"
NAME = re.compile(r"[0-9a-f]{16}\.safetensors")


class SharedFolder:
    """A server's; made where there is such memory, else `folder` is None and everything passes the socket."""

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.token = secrets.token_hex(32)
        if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
            return
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=MEMORY))  # for this user alone
        self._lock = (self.folder / "lock").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.folder / "token").write_text(self.token)

    def knows(self, token: str | None) -> bool:
        return self.folder is not None and token is not None and secrets.compare_digest(token.encode(), self.token.encode())

    def new(self) -> Path:
        assert self.folder is not None
        return self.folder / new_name()

    def file(self, name: str) -> Path | None:
        """What a client has put there; None: nothing of that name."""
        path = self.folder / name if self.folder is not None and NAME.fullmatch(name) else None
        return path if path is not None and path.is_file() and not path.is_symlink() else None

    def close(self) -> None:
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._lock.close()


def new_name() -> str:
    return f"{secrets.token_hex(8)}.safetensors"


def offered(folder: str | None) -> tuple[Path, str] | None:
    """For a client: the server's folder and token, if it is one of this machine and this user."""
    if folder is None:
        return None
    path = Path(folder)
    if path.parent != MEMORY or not path.name.startswith(PREFIX):
        return None
    try:
        if path.is_symlink() or path.stat().st_uid != os.getuid():
            return None
        return path, (path / "token").read_text()
    except OSError:
        return None


def sweep() -> None:
    """Removes the folders of servers of this user that live no more."""
    for folder in MEMORY.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with (folder / "lock").open("r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
        except OSError:  # it lives, or is just being made
            continue
