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

Made = TypeVar("Made")
Batch = TypeVar("Batch")

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

    def share(self, batches: Sequence[Batch], is_done: Callable[[Batch], bool]) -> list[Batch]:
        """Gives this process's part: what is to be done is dealt out evenly, and so is what is done."""
        finished = [batch for batch in batches if is_done(batch)]
        waiting = [batch for batch in batches if not is_done(batch)]
        return [*finished[self.rank :: self.size], *waiting[self.rank :: self.size]]

    def once(self, work: Callable[[], Made]) -> Made:
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

    def all(self, mine: Made) -> list[Made]:
        """Gathers one value per process, ordered by rank."""
        if self.size == 1:
            return [mine]
        from accelerate.utils import gather_object

        return gather_object([mine])


class Lock:
    """Keeps a second run out of a directory while any process of the first one lives.

    A shared flock on DIRECTORY/.lock, once an exclusive one has shown that nobody else has it: the system
    gives it up when a process ends, however it ends. The file says who they are.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / ".lock"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # a link would lead to somebody's file, which the lock then empties
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
            self.file = os.fdopen(os.open(self.path, flags, 0o644), "a+")
        except OSError as error:
            raise UserError(f"{self.path}: can't be opened as a lock ({error.strerror})") from None

    def take(self, team: Team) -> None:
        """Takes the lock; to be called by every process. Raises UserError if another run is at work there."""
        team.once(self._begin)
        if not team.is_first:
            self._flock(exclusive=False)
        try:
            print(f"process {os.getpid()} on {socket.gethostname()}", file=self.file, flush=True)
        except OSError as error:
            raise UserError(f"{self.path}: can't be written ({error.strerror})") from None
        team.all(None)  # nobody goes on before all have it

    def release(self) -> None:
        """Gives the lock up."""
        with contextlib.suppress(OSError):  # on a full disk, closing fails once more
            self.file.close()

    def _begin(self) -> None:
        self._flock(exclusive=True)
        self.file.truncate(0)
        self._flock(exclusive=False)

    def _flock(self, exclusive: bool) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            who = f"another run is writing into it ({', '.join(self.file.read().splitlines())})"
            raise UserError(f"{self.path.parent}: {who}; wait for its end, or stop it") from None
        except OSError as error:  # some network file systems have no locks
            warn(f"{self.path} can't be locked ({error.strerror})")


class Stop:
    """Ctrl-C or SIGTERM once: the current batch is finished and saved. Again: at once."""

    def __init__(self) -> None:
        self.signal = 0

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Hears signals for as long as it lasts."""
        before = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _hear(self, number: int, _: Any) -> None:
        if self.signal and number == signal.SIGTERM:
            sys.exit(128 + number)
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("stopping after this batch (once more: at once)", file=sys.stderr)
