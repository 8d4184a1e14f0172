"""Keeps the files of visitors to the page of app.py: one folder per visit, deleted when the visit ends.

A server's folder contains a lock, which the system releases when the process ends, however it ends. So the
next server recognises what a killed one has left, and deletes it.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from utils import UserError

if TYPE_CHECKING:
    from models.faces import Box

try:
    import fcntl
except ImportError:  # Windows has no such lock: folders of killed servers stay
    fcntl = None

PREFIX, MARK = "facelock-", ".facelock-page"  # of a server's folder, and its lock
MINUTE, HOUR = 60, 3600  # s: between sweeps, and until an idle visit ends
MOST_VISITS = 50
MOST_WAITING = 8  # uploads
UPLOAD = "upload/"  # prefix of an upload's token


class Cancelled(Exception):
    """Signals that what is being made is no longer wanted."""


@dataclass(eq=False)
class Picture:
    """Holds a portrait with its faces, and its protected version."""

    source: Path | None = None
    boxes: list[Box] = field(default_factory=list)  # of faces, in the source's pixels
    chosen: list[Box] = field(default_factory=list)  # those that the protected picture was made for
    protected: Path | None = None


@dataclass(eq=False)
class Job:
    """Describes a requested protection of one picture."""

    picture: Picture
    settings: dict[str, Any]  # replace the page's own
    faces: list[Box]


@dataclass(eq=False)
class Visit:
    """Holds what belongs to one open page: its files, a picture, and a job, which ends with the picture."""

    folder: Path
    files: dict[str, Path] = field(default_factory=dict)  # by kind
    coming: Picture | None = None  # the one being examined
    picture: Picture | None = None
    job: Job | None = None
    corner: tuple[int, int] | None = None  # the first of two clicks
    is_over: bool = False
    used: float = field(default_factory=time.monotonic)
    lock: Any = field(default_factory=threading.RLock)

    def place(self, kind: str, name: str) -> Path:
        """Deletes the last file of a kind -> a new path for the next, as browsers cache by address."""
        with self.lock:
            if self.is_over:
                raise Cancelled
            self.drop(kind)
            with storing(name):
                self.files[kind] = Path(tempfile.mkdtemp(dir=self.folder)) / name
            return self.files[kind]

    def drop(self, kind: str) -> None:
        """Deletes the file of a kind."""
        if last := self.files.pop(kind, None):
            shutil.rmtree(last.parent, ignore_errors=True)

    def write(self, path: Path, data: bytes) -> None:
        """Writes to a path that `place` gave, and makes no folder. Raises Cancelled if it was dropped."""
        with self.lock:
            if path not in self.files.values():
                raise Cancelled
            with storing(path.name):
                path.write_bytes(data)

    def expect(self, picture: Picture | None) -> None:
        """Drops the picture, its job and its files for another picture; a source that both share stays."""
        with self.lock:
            for kind, path in list(self.files.items()):
                if picture is None or path != picture.source:
                    self.drop(kind)
            self.coming, self.picture, self.job, self.corner = picture, None, None, None

    def show(self, picture: Picture) -> None:
        """Makes the expected picture the current one. Raises Cancelled if another is expected by now."""
        with self.lock:
            if self.coming is not picture:
                raise Cancelled
            self.picture = picture

    @contextlib.contextmanager
    def making(self, is_wanted: Callable[[], bool]) -> Iterator[None]:
        """Raises Cancelled in place of a block's result or error, if it is no longer wanted."""
        try:
            yield
        except Exception:
            if is_wanted():
                raise
        if not is_wanted():
            raise Cancelled

    @contextlib.contextmanager
    def doing(self, job: Job) -> Iterator[None]:
        """Ends a job at the block's end. Raises Cancelled if the visitor has already ended it."""
        try:
            with self.making(lambda: self.job is job):
                yield
        finally:
            if self.job is job:
                self.job = None

    def end(self) -> None:
        """Deletes everything; thanks to the lock, a writer has either finished or writes nothing."""
        with self.lock:
            self.expect(None)
            self.is_over = True
            self.files.clear()
            shutil.rmtree(self.folder, ignore_errors=True)


class Visits:
    """Keeps a server's visits, by Gradio's session names, and the uploads that wait for a visit."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.visits: dict[str, Visit] = {}
        self.waiting: dict[str, tuple[str, BinaryIO, float]] = {}
        self.is_over = False
        self.lock = threading.RLock()

    def open(self, session: str) -> Visit:
        """Begins a visit. Raises UserError if there are too many."""
        with self.lock:
            self.close(self.visits.get(session))
            if self.is_over or len(self.visits) >= MOST_VISITS:
                raise UserError("too many people have this page open: try again later")
            visit = self.visits[session] = Visit(Path(tempfile.mkdtemp(dir=self.folder)))
            return visit

    def close(self, visit: Visit | None) -> None:
        """Ends a visit and deletes its files."""
        if visit is not None:
            with self.lock:
                kept = {session: other for session, other in self.visits.items() if other is not visit}
                self.visits = kept
            visit.end()

    def find(self, session: str | None) -> Visit:
        """Finds a session's visit and restarts its hour. Raises UserError if the visit has ended."""
        if visit := self.visits.get(session):
            visit.used = time.monotonic()
            return visit
        text = "this page's hour is over, app.py has restarted, or too many pages are open: reload it"
        raise UserError(text)

    def has(self, path: str) -> bool:
        """Returns whether a path is exactly that of a file of some visit."""
        visits = list(self.visits.values())
        return any(path == str(file) for visit in visits for file in list(visit.files.values()))

    def wait(self, name: str, file: BinaryIO) -> str:
        """Keeps an upload, an open file without a name, until a visit takes it -> its token."""
        token = UPLOAD + secrets.token_urlsafe()
        with self.lock:
            self.waiting[token] = name, file, time.monotonic()
        return token

    def take(self, visit: Visit, token: str) -> Path:
        """Moves an upload to a visit, once. Raises UserError if no upload waits under this token."""
        with self.lock:
            if token not in self.waiting:
                raise UserError("this upload is gone: choose the file again")
            name, file, _ = self.waiting.pop(token)
        path = visit.place("source", name)
        with file:
            visit.write(path, file.read())
        return path

    def sweep(self) -> None:
        """Ends idle visits; deletes files that belong to no visit, and the folders of killed servers."""
        now = time.monotonic()
        with self.lock:
            self.waiting = {key: one for key, one in self.waiting.items() if now - one[2] < MINUTE}
            for visit in list(self.visits.values()):
                if now - visit.used > HOUR:
                    self.close(visit)
            clear(self.folder, {visit.folder for visit in self.visits.values()})
        clear_dead(self.folder.parent)

    def end(self) -> None:
        """Ends all visits and opens no more."""
        with self.lock:
            self.is_over = True
            for visit in list(self.visits.values()):
                self.close(visit)


@contextlib.contextmanager
def storing(name: str) -> Iterator[None]:
    """Turns a full disk, or a folder that somebody deleted, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: can't be stored ({error.strerror})") from None


@contextlib.contextmanager
def server_folder() -> Iterator[Path]:
    """Makes a server's folder and deletes it at the end; deletes those of killed servers first."""
    clear_dead(Path(tempfile.gettempdir()))
    folder = Path(tempfile.mkdtemp(prefix=PREFIX))
    with (folder / "lock").open("w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
            os.rename(file.name, folder / MARK)  # visible to others only once it is locked
        try:
            yield folder
        finally:
            delete(folder)


def clear_dead(directory: Path) -> None:
    """Deletes this user's server folders in a directory, if nobody holds their lock."""
    for mark in directory.glob(f"{PREFIX}*/{MARK}") if fcntl else ():
        with contextlib.suppress(OSError):  # BlockingIOError: its server is alive
            folder = mark.parent.lstat()
            if stat.S_ISDIR(folder.st_mode) and folder.st_uid == os.getuid():
                with os.fdopen(os.open(mark, os.O_RDWR | os.O_NOFOLLOW), "w") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    delete(mark.parent)


def delete(folder: Path) -> None:
    """Deletes a server's folder, its mark last: if this is interrupted, the next server finishes it."""
    clear(folder, set())
    shutil.rmtree(folder, ignore_errors=True)


def clear(folder: Path, kept: set[Path]) -> None:
    """Deletes what is in a server's folder, except its mark and `kept`."""
    for path in set(folder.glob("*")) - kept - {folder / MARK}:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
