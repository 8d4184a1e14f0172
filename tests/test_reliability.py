"""Nothing is lost: killed runs, several processes, hostile files, a full disk."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
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
import pandas as pd
import pytest
import tiny
from PIL import Image, ImageCms

import decoding
import images
import main_defend
import protection
from images import image_size, load_image
from utils import UserError, temporary_name

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same arithmetic in every run
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


# ---------------------------------------------------------------------------------------------------------
# killed


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


@pytest.mark.slow
def test_two_processes_share_the_work_say_it_once_and_lose_nothing(tmp_path):
    """Also where both are killed and others go on."""
    (tmp_path / "in").mkdir()
    for path in sorted((ROOT / "assets/portraits/mini").glob("*.png"))[:5]:
        shutil.copy(path, tmp_path / "in")
    (tmp_path / "in/broken.png").write_text("x")
    flags = ("--defend_method", "encoder", "--num_iters", "5", "--seed", "-1")
    status, out, err = finish(start(tmp_path, "two", 2, *flags))
    assert status != 0  # the broken one
    assert out.count("5 written, 0 there already, 1 failed") == 1 and out.count("seed: ") == 1
    assert err.count("failed: " + str(tmp_path / "in/broken.png")) == 2  # when it happens, and in the summary
    seed = out.split("seed: ")[1].split()[0]
    assert finish(start(tmp_path, "one", 1, *flags[:-1], seed))[0] == 1
    one, killed = files(tmp_path / "one/budget_0.03"), tmp_path / "killed/budget_0.03"
    assert files(tmp_path / "two/budget_0.03") == one
    process = start(tmp_path, "killed", 2, *flags[:-1], seed)
    while not files(killed):
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    finish(start(tmp_path, "killed", 2, *flags[:-1], seed))
    assert files(killed) == one and not list(killed.glob(".*.tmp"))
    # an error before the work is told once, and all processes end
    status, out, err = finish(start(tmp_path, "two", 2, *flags[:-1], str(int(seed) + 1)))
    assert status != 0 and err.count("error: ") - err.count("error: [Errno") == 1, err


# ---------------------------------------------------------------------------------------------------------
# hostile files


def originals() -> dict[str, bytes]:
    """One small file of each format that is read, and of what PNGs carry beside pixels."""
    plain = Image.fromarray(tiny.portrait(24))
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    deep = Image.fromarray(np.arange(576, dtype=np.uint16).reshape(24, 24) * 100)
    forms = {
        "a.png": (plain, {}),
        "b.png": (plain.convert("RGBA"), {"exif": exif, "icc_profile": profile}),
        "c.png": (plain.quantize(16), {"transparency": 0}),
        "d.png": (deep, {}),
        "a.jpg": (plain, {"exif": exif, "icc_profile": profile}),
        "b.jpg": (plain.convert("CMYK"), {"progressive": True}),
        "a.webp": (plain, {"exif": exif}),
        "a.gif": (plain, {"save_all": True, "append_images": [plain.rotate(90)]}),
        "a.tif": (plain, {"compression": "tiff_lzw", "exif": exif}),
        "b.tif": (deep, {}),
        "a.bmp": (plain, {}),
        "a.ppm": (plain, {}),
        "a.tga": (plain, {"compression": "tga_rle"}),
        "a.jp2": (plain, {}),
        "a.avif": (plain, {}),
    }
    found = {}
    for name, (image, options) in forms.items():
        buffer = io.BytesIO()
        image.save(buffer, format=decoding.FORMATS[Path(name).suffix], **options)
        found[name] = buffer.getvalue()
    return found


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


class Hang(BaseException):
    """What no `except Exception` takes for a broken file."""


@contextlib.contextmanager
def at_most(seconds: float):
    """Raises Hang in what takes longer, and for what has taken longer where nothing could be raised."""

    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    begun = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - begun < seconds


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_a_damaged_file_is_an_image_or_a_user_error(tmp_path, count):
    """So many mutations, of all formats in turn: nothing else comes out of the loader, and nothing hangs."""
    sound, draw = originals(), random.Random(count)
    read = dict.fromkeys(sound, 0)
    for name, data in sound.items():
        (tmp_path / name).write_bytes(data)
        assert load_image(tmp_path / name).size == image_size(tmp_path / name) == (24, 24)
    for _, name in zip(range(count), itertools.cycle(sound), strict=False):
        path = tmp_path / name
        path.write_bytes(mutated(sound[name], draw))
        with at_most(10):
            try:
                portrait = load_image(path)
            except UserError as error:
                assert str(path) in str(error) and "\n" not in str(error)
            else:
                assert portrait.pixels.dtype == np.uint8 and portrait.pixels.shape[2] == 3
                read[name] += 1
            image_size(path)
    assert 0 < sum(read.values()) < count
    assert count < 10_000 or min(read.values()) > 0, read


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
    good += [f"{'x' * 247}.png", f"{'y' * 251}.png"]
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
    assert "1 files of other kinds are left out (notes.txt)" in err
    report = tmp_path / "out/budget_0.03/report.csv"
    table = pd.read_csv(report, dtype={"name": str}, encoding_errors="replace")
    assert len(table) == len(made) and {"neue\nzeile", "'-dash"} < set(table["name"])
    assert "neue\\nzeile" in out and "neue\nzeile" not in out + err
    assert sorted((tmp_path / "elsewhere").iterdir()) == before


def test_a_file_that_vanishes_or_changes_during_the_run(tmp_path, defend_flags, monkeypatch, capsys):
    paths = tiny.write_portraits(tmp_path / "in", 4)

    def load(path, *more, load=images.load_image):
        if path == paths[0]:
            paths[1].unlink()
            Image.fromarray(tiny.portrait(72)).save(paths[2])  # of another size than its batch
        return load(path, *more)

    monkeypatch.setattr(protection, "as_portrait", load)
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

    full = temporary_name(Path("face1.png")).name

    def fsync(descriptor, sync=os.fsync):
        if full in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        return sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    flags = f"--image_dir {tmp_path}/in --output_dir {tmp_path}/out --defend_method encoder"
    assert main_defend.main([*defend_flags, *flags.split()]) == 1
    assert "face1.png: can't be written (No space left on device)" in capsys.readouterr().err
    made = sorted(path.name for path in (tmp_path / "out/budget_0.03").iterdir())
    beside = [".facelock.0.lock", ".facelock.jsonl", "manifest.jsonl", "report.csv", "run.json"]
    assert made == sorted(["face0.png", "face2.png", *beside])
    monkeypatch.undo()
    assert main_defend.main([*defend_flags, *flags.split()]) == 0
    assert "1 written, 2 there already, 0 failed" in capsys.readouterr().out
