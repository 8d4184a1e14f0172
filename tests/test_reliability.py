"""Nothing is lost: killed runs, several processes, locks, Ctrl-C, too little memory, hostile files."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main_defend
import runs
import utils
from utils import UserError

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same arithmetic in every run
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


def item(folder: Path, name: str) -> runs.Item:
    return runs.Item(Path("in") / name, folder / f"{name}.png", (8, 8), label=name)


def run_batches(batches, work, load=lambda one: one.label) -> runs.Summary:
    return runs.run_batches(batches, load, work, overwrite=False, debug=False, unit="x")


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ---------------------------------------------------------------------------------------------------------
# killed, locked, stopped


def start(folder: Path, output: str, processes: int = 1, *more: str) -> subprocess.Popen:
    """main_defend.py on folder/in -> folder/OUTPUT/budget_0.03, on the mini models."""
    command = [*TORCHRUN, str(processes)] if processes > 1 else [sys.executable]
    flags = f"--models mini --device cpu --image_dir {folder}/in --output_dir {folder}/{output}".split()
    return subprocess.Popen(
        [*command, "main_defend.py", *flags, *more],
        cwd=ROOT,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=1200)
    return process.returncode, out, err


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    """And ends with the files of an undisturbed one; what the killed one left aside is removed."""
    bundled = sorted((ROOT / "assets/portraits/mini").glob("*.png"))[:4]
    for path in bundled:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in")
    flags = ("--defend_method", "encoder", "--num_iters", "12", "--batch_size", "2")
    killed, whole = start(tmp_path, "killed", 1, *flags), start(tmp_path, "whole", 1, *flags)
    place = tmp_path / "killed/budget_0.03"
    while not files(place) and killed.poll() is None:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    kept = files(place)
    assert 1 <= len(kept) < 4
    (place / ".portrait_1000003.png.123.tmp").write_text("half")
    (place / ".own.tmp").write_text("not ours")
    status, out, err = finish(start(tmp_path, "killed", 1, *flags))
    assert status == 0, err
    assert f"{len(kept)} there already" in out
    assert finish(whole)[0] == 0
    assert files(place) == files(tmp_path / "whole/budget_0.03")
    assert sorted(path.name for path in place.glob(".*")) == [".lock", ".own.tmp"]


@pytest.mark.slow
def test_sixty_portraits_two_processes_ten_kills(tmp_path, capsys):
    """Killed with SIGKILL at ten random moments, launcher alone or with its workers, and resumed each time:
    the same files as those of an undisturbed single process. A moment is when so many more files are there,
    and a little later; so a fast machine, too, is killed ten times before all is done.
    """
    which = ("--first", "1000100", "--count", "60")
    write = [sys.executable, "mini/portraits.py", "--write", tmp_path / "in", *which]
    subprocess.run(write, cwd=ROOT, check=True, capture_output=True)
    flags = ("--defend_method", "encoder", "--num_iters", "40", "--batch_size", "2")
    status, _, err = finish(start(tmp_path, "whole", 1, *flags))
    assert status == 0, err
    place = tmp_path / "killed/budget_0.03"
    draw = random.Random(0)
    kills, waits, before = 0, 0, -1
    while kills < 10:
        process = start(tmp_path, "killed", 2, *flags)
        wanted = len(files(place)) + draw.randint(0, 3)
        while len(files(place)) < wanted and process.poll() is None:
            time.sleep(0.05)
        time.sleep(draw.uniform(0, 0.5))
        if process.poll() is None:
            whom = os.kill if kills % 2 else os.killpg
            whom(process.pid, signal.SIGKILL)
            process.stdout.close()
            process.stderr.close()
            process.wait()
            kills += 1
        else:  # an earlier run's workers were still at it, or all was done before ten kills
            _, out, err = finish(process)
            assert "another run is writing" in err or "60 there already" in out, err
            waits += "another run is writing" in err
            if "60 there already" in out:
                break
            time.sleep(1)
        assert len(files(place)) >= before
        before = len(files(place))
    for _ in range(60):
        status, out, err = finish(start(tmp_path, "killed", 2, *flags))
        if status == 0:
            break
        assert "another run is writing" in err, err
        time.sleep(1)
    done = files(place)
    assert status == 0 and len(done) == 60 and done == files(tmp_path / "whole/budget_0.03")
    assert not list(place.glob(".*.tmp"))
    with capsys.disabled():
        print(f"\n60 portraits, {kills} kills, {waits} times told to wait, files lost: 0")
    assert kills == 10


@pytest.mark.slow
def test_two_processes_share_the_work_and_say_it_once(tmp_path):
    for path in sorted((ROOT / "assets/portraits/mini").glob("*.png"))[:5]:
        (tmp_path / "in").mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in/broken.png").write_text("x")
    flags = ("--defend_method", "encoder", "--num_iters", "5", "--seed", "-1")
    status, out, err = finish(start(tmp_path, "two", 2, *flags))
    assert status != 0  # the broken one
    assert out.count("5 written, 0 there already, 1 failed") == 1 and out.count("seed: ") == 1
    assert err.count("failed: " + str(tmp_path / "in/broken.png")) == 2  # when it happens, and in the summary
    seed = out.split("seed: ")[1].split()[0]
    assert finish(start(tmp_path, "one", 1, *flags[:-1], seed))[0] == 1
    assert files(tmp_path / "two/budget_0.03") == files(tmp_path / "one/budget_0.03")
    # an error before the work is told once, and all processes end
    status, out, err = finish(start(tmp_path, "two", 2, *flags[:-1], str(int(seed) + 1)))
    assert status != 0 and err.count("error: ") - err.count("error: [Errno") == 1, err


def test_a_second_run_is_kept_out_while_the_first_lives(tmp_path):
    code = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import runs; from pathlib import Path\n"
        "with runs.writing(Path(sys.argv[2]), {'arguments': {}}, runs.Team()):\n"
        "    print('in', flush=True); time.sleep(60)\n"
    )
    first = subprocess.Popen(
        [sys.executable, "-c", code, ROOT, tmp_path / "out"], stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "in\n"
    told = pytest.raises(UserError, match=f"another run is writing into it .process {first.pid} on")
    with told, runs.writing(tmp_path / "out", {"arguments": {}}, runs.Team()):
        pytest.fail("got in")
    first.kill()
    first.communicate()
    for _ in range(2):  # it does not outlive a killed run, nor one that has ended
        with runs.writing(tmp_path / "out", {"arguments": {}}, runs.Team()):
            assert (tmp_path / "out/.lock").read_text().startswith(f"process {os.getpid()} on ")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_finishes_the_batch(tmp_path, capsys, number, status):
    batches = [[item(tmp_path, name) for name in pair] for pair in ("ab", "cd", "ef")]

    def work(items, loaded, wanted):
        if items[0].label == "c":
            os.kill(os.getpid(), number)
        for one in items:
            one.output.write_text(one.label)

    before = signal.getsignal(number)
    summary = run_batches(batches, work)
    assert [path.stem for path in sorted(tmp_path.glob("*.png"))] == ["a", "b", "c", "d"]
    assert signal.getsignal(number) is before
    assert runs.finish(summary, runs.Team(), tmp_path) == status
    assert "4 written, 0 there already, 0 failed; stopped" in capsys.readouterr().out


def test_a_second_interrupt_stops_at_once(tmp_path):
    def work(items, loaded, wanted):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        pytest.fail("went on")

    with pytest.raises(KeyboardInterrupt):
        run_batches([[item(tmp_path, "a")]], work)
    assert not list(tmp_path.glob("*.png"))


# ---------------------------------------------------------------------------------------------------------
# memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_too_little_memory_halves_the_batch(tmp_path, capsys, error):
    sizes = []

    def work(items, loaded, wanted):
        sizes.append(len(items))
        if len(items) > 3:
            raise error
        for one in items:
            one.output.write_text(one.label)

    batches = [[item(tmp_path, f"{k}{n}") for n in range(8)] for k in "ab"]
    summary = run_batches(batches, work)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert (summary.made, summary.failed) == (16, [])
    out = capsys.readouterr().out
    assert "out of memory with 8 at a time; going on with 4" in out and "going on with 2" in out


def test_one_alone_that_is_too_large_is_a_failure(tmp_path):
    def work(items, loaded, wanted):
        raise torch.OutOfMemoryError("CUDA out of memory")

    summary = run_batches([[item(tmp_path, "a"), item(tmp_path, "b")]], work)
    assert summary.failed == [f"{name}: OutOfMemoryError: CUDA out of memory" for name in "ab"]


# ---------------------------------------------------------------------------------------------------------
# hostile files


def mutated(data: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut off, doubled or moved."""
    changed = bytearray(data)
    for _ in range(draw.randint(1, 8)):
        place = draw.randrange(len(changed))
        kind = draw.randrange(4)
        if kind == 0:
            changed[place] = draw.randrange(256)
        elif kind == 1:
            changed = changed[: max(place, 8)]
        elif kind == 2:
            changed[place:place] = changed[place : place + draw.randint(1, 16)]
        else:
            changed[place : place + 4] = draw.randbytes(4)  # lengths and sizes stand in four bytes
    return bytes(changed)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_damaged_file_is_an_image_or_a_user_error(tmp_path, form):
    """600 mutations of a small file in each format: nothing else comes out of the loader."""
    buffer = io.BytesIO()
    Image.fromarray(tiny.portrait(24)).save(buffer, format=form)
    draw = random.Random(form)
    path = tmp_path / f"a.{form.lower()}"
    read = 0
    for _ in range(600):
        path.write_bytes(mutated(buffer.getvalue(), draw))
        try:
            portrait = utils.load_image(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
        else:
            assert portrait.pixels.dtype == np.uint8 and portrait.pixels.shape[2] == 3
            read += 1
        utils.image_size(path)
    assert 0 < read < 600


def bomb() -> bytes:
    """A PNG of 200 bytes that says it has 40,000 x 40,000 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(tiny.portrait(24)).save(buffer, format="PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = (40_000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_odd_names_and_bad_files_in_one_directory(tmp_path, defend_flags, capsys):
    """Each good one is protected whatever it is called, each bad one is told in one line."""
    folder = tmp_path / "in"
    good = ["a b.png", "-dash.png", "neue\nzeile.png", "пример ü.png", "100%{}.png", "two.dots.png"]
    if sys.platform == "linux":
        good.append(os.fsdecode(b"latin\xe9.png"))
    folder.mkdir()
    for name in good:
        Image.fromarray(tiny.portrait(64)).save(folder / name)
    Image.fromarray(tiny.portrait(1)).save(folder / "one.png")
    Image.fromarray(np.zeros((10, 20_000, 3), np.uint8)).save(folder / "long.png")
    (folder / "bomb.png").write_bytes(bomb())
    (folder / "empty.png").touch()
    (folder / ".hidden.png").write_text("x")
    (folder / "notes.txt").write_text("x")
    (folder / "deeper").mkdir()
    (tmp_path / "elsewhere").mkdir()
    Image.fromarray(tiny.portrait(64, seed=3)).save(tmp_path / "elsewhere/real.png")
    (folder / "link.png").symlink_to(tmp_path / "elsewhere/real.png")
    (folder / "broken.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "folder.png").symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").iterdir())
    flags = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method encoder".split()
    assert main_defend.main([*defend_flags, *flags]) == 1
    out, err = capsys.readouterr()
    made = {path.name for path in (tmp_path / "out/budget_0.03").glob("*.png")}
    assert made == {*good, "link.png"}
    told = [line for line in err.splitlines() if line.startswith("  failed: ")]
    assert len(told) == 5 and f"{len(made)} written, 0 there already, 5 failed" in out
    for name, why in (
        ("one.png", "too small"),
        ("long.png", "too small"),
        ("bomb.png", "exceeds limit"),
        ("empty.png", "not a readable image"),
        ("broken.png", "no such file"),
    ):
        assert sum(name in line and why in line for line in told) == 1, told
    assert "sub-directories are not searched: deeper, folder.png" in err
    assert "neue\\nzeile" in out and "neue\nzeile" not in out + err
    assert sorted((tmp_path / "elsewhere").iterdir()) == before


def test_a_file_that_vanishes_or_changes_during_the_run(tmp_path, defend_flags, monkeypatch, capsys):
    paths = tiny.write_portraits(tmp_path / "in", 4)

    def load(path, resolution, load=utils.load_portrait):
        if path == paths[0]:
            paths[1].unlink()
            Image.fromarray(tiny.portrait(72)).save(paths[2])  # of another size than its batch
        return load(path, resolution)

    monkeypatch.setattr(utils, "load_portrait", load)
    flags = f"--image_dir {tmp_path}/in --output_dir {tmp_path}/out --defend_method encoder --batch_size 2"
    assert main_defend.main([*defend_flags, *flags.split()]) == 1
    err = capsys.readouterr().err
    made = sorted(path.name for path in (tmp_path / "out/budget_0.03").glob("*.png"))
    assert "face1.png: no such file" in err and "Traceback" not in err
    assert "face0.png" in made and "face1.png" not in made
    assert len(made) + err.count("  failed: ") == 4


@pytest.mark.skipif(sys.platform != "linux", reason="finds a descriptor's file in /proc")
def test_a_full_disk(tmp_path, defend_flags, monkeypatch, capsys):
    """The second portrait finds no room: it is told, nothing is left of it, and the third is made."""
    tiny.write_portraits(tmp_path / "in", 3)

    def fsync(descriptor, sync=os.fsync):
        if "face1" in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    flags = f"--image_dir {tmp_path}/in --output_dir {tmp_path}/out --defend_method encoder"
    assert main_defend.main([*defend_flags, *flags.split()]) == 1
    assert "face1.png: can't be written (No space left on device)" in capsys.readouterr().err
    made = sorted(path.name for path in (tmp_path / "out/budget_0.03").iterdir())
    assert made == [".lock", "face0.png", "face2.png", "run.json"]
