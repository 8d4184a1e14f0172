"""processes.py: who does what, the lock that keeps a second run out, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

import processes
from processes import LONGEST_WAIT, Team, listening, locked
from utils import UserError

ROOT = Path(processes.__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------
# the team


def test_processes_share_what_is_left_to_do():
    """Or those with finished batches alone would wait, and one could have all the work."""
    parts = [Team(rank, 2).share("aBcDeF", str.islower) for rank in range(2)]
    assert parts == [["a", "e", "B", "F"], ["c", "D"]]
    assert Team().share("aBc", str.islower) == ["a", "c", "B"]


def test_one_process_is_a_team(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    team = Team.gather("no such device")  # which is looked at where it is used
    assert team == Team() and team.is_first and not team.is_orphan
    assert team.once(lambda: 3) == 3 and team.all(4) == [4]
    with pytest.raises(UserError, match="no"):
        team.once(lambda: (_ for _ in ()).throw(UserError("no")))


def test_a_process_that_is_done_waits_long_enough(monkeypatch):
    import accelerate

    given = {}

    def state(**options):
        given.update(options)
        return SimpleNamespace(process_index=1)

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    team = Team.gather("cpu")
    assert (team.rank, team.size, team.is_first, team.is_orphan) == (1, 2, False, False)
    assert given == {"cpu": True, "timeout": LONGEST_WAIT} and LONGEST_WAIT.days >= 7
    assert Team(1, 2, parent=-1).is_orphan


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_the_first_is_everybodys_and_told_once(monkeypatch, rank):
    import accelerate.utils

    def broadcast(message):
        message[0] = (None, "no such directory")

    monkeypatch.setattr(accelerate.utils, "broadcast_object_list", broadcast)

    def work():
        assert rank == 0, "the others don't work"
        raise UserError("no such directory")

    with pytest.raises(UserError if rank == 0 else SystemExit) as caught:
        Team(rank, 2).once(work)
    assert str(caught.value) == ("no such directory" if rank == 0 else "1")


# ---------------------------------------------------------------------------------------------------------
# the lock


def test_a_second_run_is_kept_out_while_the_first_lives(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from processes import Team, locked\n"
        "with locked(Path(sys.argv[1]), Team()): print('in', flush=True); time.sleep(60)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / "out"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "in\n"
    another = pytest.raises(UserError, match=f"another run is writing into it .process {first.pid} on")
    with another, locked(tmp_path / "out", Team()):
        pytest.fail("was let in")
    assert str(first.pid) in (tmp_path / "out/.lock").read_text()  # a refused one doesn't empty it
    first.kill()
    first.communicate()
    for _ in range(2):  # it does not outlive a killed run, nor one that has ended
        with locked(tmp_path / "out", Team()):
            assert (tmp_path / "out/.lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_lock_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.lock").symlink_to(tmp_path / "precious")
    refused = pytest.raises(UserError, match="out/.lock: can't be opened as a lock")
    with refused, locked(tmp_path / "out", Team()):
        pytest.fail("was let in")
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_lock_that_is_a_directory(tmp_path):
    (tmp_path / ".lock").mkdir()
    refused = pytest.raises(UserError, match=".lock: can't be opened as a lock .Is a directory")
    with refused, locked(tmp_path, Team()):
        pytest.fail("was let in")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_disk_that_is_full_at_the_lock(tmp_path, monkeypatch):
    full = open("/dev/full", "a")  # noqa: SIM115 (closed with the lock)
    full.truncate = lambda size: None  # a device can't
    monkeypatch.setattr(os, "fdopen", lambda *_: full)
    refused = pytest.raises(UserError, match=".lock: can't be written .No space left on device")
    with refused, locked(tmp_path, Team()):
        pytest.fail("was let in")
    assert full.closed


def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(processes.fcntl, "flock", refuse)
    with locked(tmp_path, Team()):
        assert "can't be locked (Operation not supported)" in capsys.readouterr().err
    monkeypatch.setattr(processes, "fcntl", None)  # Windows
    with locked(tmp_path, Team()):
        assert (tmp_path / ".lock").exists()


# ---------------------------------------------------------------------------------------------------------
# Ctrl-C


@pytest.mark.parametrize(
    ("number", "again"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_once_is_noted_and_twice_stops_at_once(capsys, number, again):
    before = signal.getsignal(number)
    with listening() as heard:
        os.kill(os.getpid(), number)
        assert heard == [number]
        assert "stopping after this batch" in capsys.readouterr().err
        with pytest.raises(again) as caught:
            os.kill(os.getpid(), number)
            time.sleep(1)
    assert number == signal.SIGINT or caught.value.code == 143
    assert signal.getsignal(number) is before


def test_sigterm_twice_ends_with_143():
    """As a command: after Ctrl-C, too, and whatever the batch is at."""
    code = (
        "import argparse, time, utils; from processes import listening\n"
        "def run(args):\n"
        "    with listening():\n"
        "        print('in', flush=True)\n"
        "        try: time.sleep(60)\n"
        "        except Exception: pass\n"
        "        time.sleep(60)\n"
        "import sys; sys.exit(utils.run_command(run, argparse.Namespace(debug=False)))\n"
    )
    for first in (signal.SIGTERM, signal.SIGINT):
        process = subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "in\n"
        process.send_signal(first)
        assert "stopping" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
        assert process.returncode == 143 and "Traceback" not in err
