"""Several processes at one directory: who does what, the lock that keeps a second run out, and Ctrl-C."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from utils import UserError, pick_device, warn

try:
    import fcntl
except ImportError:  # Windows: no lock there
    fcntl = None

T = TypeVar("T")

LONGEST_WAIT = datetime.timedelta(days=30)  # of a process that is done for one that is not


@dataclass(frozen=True)
class Team:
    """The processes that share a run: one, or those that torchrun or accelerate launch started."""

    rank: int = 0
    size: int = 1
    parent: int = 0  # the launcher's process number

    @classmethod
    def gather(cls, device: str) -> Team:
        """Joins the other processes, if a launcher started any. Raises UserError for a device not there."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        from accelerate import PartialState

        # Without cpu=, processes on CPUs don't see each other. Without a timeout of ours, one that is done
        # waits for half an hour (on GPUs ten minutes), and then all are stopped.
        state = PartialState(cpu=pick_device(device).type == "cpu", timeout=LONGEST_WAIT)
        return cls(state.process_index, size, os.getppid())

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    @property
    def is_orphan(self) -> bool:
        """Whether the launcher is gone: then nobody waits for this process any more."""
        return self.size > 1 and os.getppid() != self.parent

    def share(self, batches: Sequence[T], is_done: Callable[[T], bool]) -> list[T]:
        """Gives this process's part: what is to be done is dealt out evenly, and so is what is done."""
        finished = [batch for batch in batches if is_done(batch)]
        waiting = [batch for batch in batches if not is_done(batch)]
        return [*finished[self.rank :: self.size], *waiting[self.rank :: self.size]]

    def once(self, work: Callable[[], T]) -> T:
        """Does it in the first process, for all; a UserError there ends all, with one line and status 1."""
        if self.size == 1:
            return work()
        from accelerate.utils import broadcast_object_list

        message: list[Any] = [None]
        if self.is_first:
            try:
                message = [(work(), None)]
            except UserError as error:
                message = [(None, str(error))]
        broadcast_object_list(message)
        made, error = message[0]
        if error is None:
            return made
        if self.is_first:
            raise UserError(error)
        sys.exit(1)

    def all(self, mine: T) -> list[T]:
        """Gathers one value per process, ordered by rank."""
        if self.size == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])


@contextlib.contextmanager
def locked(directory: Path, team: Team) -> Iterator[None]:
    """Keeps a second run out of a directory while any process of the first one lives; every process calls it.

    A shared flock on DIRECTORY/.lock, once an exclusive one has shown that nobody has it: the system ends it
    with the process, however that ends. Raises UserError if another run is at work there.
    """
    path = directory / ".lock"
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # a link would lead to somebody's file, which the lock then empties
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
        file = os.fdopen(os.open(path, flags, 0o644), "a+")
    except OSError as error:
        raise UserError(f"{path}: can't be opened as a lock ({error.strerror})") from None

    def lock(exclusive: bool) -> None:
        try:
            if fcntl:
                fcntl.flock(file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            who = f"another run is writing into it ({', '.join(file.read().splitlines())})"
            raise UserError(f"{directory}: {who}; wait for its end, or stop it") from None
        except OSError as error:  # some network file systems have no locks
            warn(f"{path} can't be locked ({error.strerror})")

    def begin() -> None:
        lock(exclusive=True)
        file.truncate(0)
        lock(exclusive=False)

    try:
        team.once(begin)
        lock(exclusive=False)
        try:
            print(f"process {os.getpid()} on {socket.gethostname()}", file=file, flush=True)
        except OSError as error:
            raise UserError(f"{path}: can't be written ({error.strerror})") from None
        team.all(None)  # nobody goes on before all have it
        yield
    finally:
        with contextlib.suppress(OSError):  # on a full disk, closing fails once more
            file.close()


@contextlib.contextmanager
def listening() -> Iterator[list[int]]:
    """Gives the signals heard: Ctrl-C or SIGTERM once, to end after the current batch; again ends at once."""
    heard: list[int] = []

    def hear(number: int, _: Any) -> None:
        if heard and number == signal.SIGTERM:
            sys.exit(128 + number)
        if heard:
            raise KeyboardInterrupt
        heard.append(number)
        print("stopping after this batch (once more: at once)", file=sys.stderr)

    before = {number: signal.signal(number, hear) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield heard
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
