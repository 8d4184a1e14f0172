"""Nothing is lost: killed runs, several processes, a full disk, and mutations of all that is read."""

import contextlib
import errno
import io
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image, ImageCms

import decoding
import defend
import edit
import experiment
import images
import main_defend
import main_edit
import protection
import runs
from evaluation import eval_psnr, figure, report, tables
from images import image_size, load_image
from models.loading import ROOT
from utils import UserError, temporary_name

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # the same arithmetic in every run
PORTRAIT = ROOT / "assets/portraits/mini/portrait_1000000.png"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node"]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.png"))}


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
    # an error before the work is reported once, and all processes end
    status, out, err = finish(start(tmp_path, "two", 2, *flags[:-1], str(int(seed) + 1)))
    assert status != 0 and err.count("error: ") - err.count("error: [Errno") == 1, err


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    """Each run is killed at a random moment; what is there stays whole, and is at last what it should be."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        Image.open(PORTRAIT).rotate(number).save(tmp_path / f"in/{number}.png")
    flags = ["--defend_method", "encoder", "--num_iters", "4", "--batch_size", "2"]
    assert finish(start(tmp_path, "whole", 1, *flags))[0] == 0
    whole, place = files(tmp_path / "whole/budget_0.03"), tmp_path / "killed/budget_0.03"
    draw = random.Random(0)
    for _ in range(int(os.environ.get("KILLS", "100"))):
        process = start(tmp_path, "killed", 1, *flags)
        time.sleep(draw.uniform(0, 12))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        assert finish(process)[0] in (0, 130, 143, -9, -15, -2)
        assert files(place).items() <= whole.items()
        if files(place) == whole:
            shutil.rmtree(place)
    status, out, _ = finish(start(tmp_path, "killed", 1, *flags, "--verify"))
    assert status == 0 and files(place) == whole and " 0 failed" in out
    assert set(runs.read_manifest(place)) == set(whole)
    assert all(json.loads(line) for line in (place / "manifest.jsonl").read_text().splitlines())


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


def test_odd_names_and_bad_files_in_one_directory(tmp_path, defend_flags, capsys):
    """Each good one is protected whatever its name, each bad one is reported in one line."""
    folder = tmp_path / "in"
    good = ["a b.png", "-dash.png", "neue\nzeile.png", "пример ü.png", "100%{}.png", "two.dots.png"]
    good += [f"{'x' * 247}.png", f"{'y' * 251}.png"]
    if sys.platform == "linux":
        good.append(os.fsdecode(b"latin\xe9.png"))
    folder.mkdir()
    for name in good:
        Image.fromarray(tiny.portrait(64)).save(folder / name)
    (folder / "two.dots.png").rename(folder / "two.dots.PNG")
    Image.fromarray(tiny.portrait(1)).save(folder / "one.png")
    Image.fromarray(np.zeros((10, 20_000, 3), np.uint8)).save(folder / "long.png")
    (folder / "bomb.png").write_bytes(tiny.bomb(40_000, 40_000))
    (folder / "empty.png").touch()
    (folder / ".hidden.png").write_text("x")
    for name in ("notes.txt", "a.txt", "b.mp4", "c.psd", "d", "e.raw"):
        (folder / name).write_text("x")
    for name in ("run.json", "manifest.jsonl", "report.csv", ".facelock.0.lock"):  # of a folder of our own
        (folder / name).touch()
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
    assert "6 files of other kinds are left out (a.txt, b.mp4, c.psd, d, e.raw and 1 more)" in err
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
    """The disk is full at the second portrait: it is reported, leaves nothing, and the third is made."""
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


SECONDS, MEMORY = 60, 3 * 2**20  # KiB
NUMBERS = [b"0", b"-5", b'"x"', b"[]", b"null", b"1e308", b"inf", b"NaN", b"9" * 5000, b"1000000000", b"{}"]
TEXTS = [b"\xff\xfe", b"$\\frac$", b"\x1b[2J", b"\r\n", b"\x00", b"=1+1", b"'=", b"\xe2\x80\xae", b"|"]
TEXTS.append(b"[" * 2000)


def changed(data: bytes, draw: random.Random) -> bytes:
    """Bytes mutated as in images, or a number or a text put in the place of another."""
    if draw.random() < 0.5:
        return mutated(data, draw)
    places = list(re.finditer(rb"-?\d[\d.e-]*", data)) if draw.random() < 0.7 else []
    start, end = draw.choice(places).span() if places else [draw.randrange(len(data))] * 2
    return data[:start] + draw.choice(NUMBERS if places else TEXTS) + data[end:]


class Bench:
    """Folders as a user has them, and the commands that read their files."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "in").mkdir()
        Image.open(PORTRAIT).resize((64, 64)).save(root / "in/a.png")
        (root / "precious").write_text("precious")
        (root / "prompts.txt").write_text("Let it be snowy\n\nAdd ears\n")
        shutil.copytree(ROOT / "assets/mini/editor", root / "editor")
        shutil.copytree(ROOT / "assets/mini/recognizer", root / "recognizer")
        self.quick = ["--models=mini", "--device=cpu", "--resolution=64"]
        self.noise = [*self.quick, "--defend_method=noise", f"--image_dir={root}/in"]
        self.noise.append(f"--output_dir={root}/out")
        self.edits = [*self.quick, f"--src_dir={root}/in", "--seed=0", "--num_inference_steps=1"]
        self.all = [*self.quick, f"--image_dir={root}/in", f"--output_dir={root}/all", "--methods=noise"]
        self.all += ["--prompts=0", "--num_inference_steps=1"]
        assert main_defend.main(self.noise) == 0 == experiment.main(self.all)
        shutil.copytree(root / "all/edits", root / "edits")
        edits = {"seed": 0, "prompt": [0, 1] * 3, "name": list("aabbcc"), "psnr": [20.5, 21, 22, 23, 24, 25]}
        edits = pd.concat([pd.DataFrame({"method": row, **edits}) for row in ("clean", "noise/budget_0.03")])
        tables.write_csv(root / "per_image.csv", edits)
        means = pd.DataFrame({"method": ["clean", "noise/budget_0.03"], "psnr": 135.5 / 6})
        tables.write_csv(root / "all_metric.csv", means.assign(psnr_low=20, psnr_high=24.5, psnr_n=3))
        self.sound = self.files()

    def files(self) -> dict[str, bytes]:
        """Reads all files but those of this command's own making."""
        found = [path for path in self.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in found}

    def restore(self) -> None:
        """Makes the folders what they were."""
        for name, data in self.files().items():
            if name not in self.sound:
                (self.root / name).unlink()
            elif data != self.sound[name]:
                (self.root / name).write_bytes(self.sound[name])

    def commands(self) -> list[tuple[str, Any, list[str]]]:
        """Names the file that is mutated, who reads it, and how."""
        root, vae = self.root, ["--defend_method=encoder", "--num_iters=1", f"--model_id={self.root}/editor"]
        one = [*self.quick, f"--input_path={root}/in/a.png", f"--output_path={root}/new/o.png"]
        own_prompts = f"--prompt_file={root}/prompts.txt"
        page = [f"--experiment_dir={root}", f"--output={root}/new/r.html"]
        plot = ["plot", f"--tables={root}/all_metric.csv", "--metric=psnr", f"--output={root}/new/p.png"]
        face = ["--defend_method=facelock", "--num_iters=1", f"--recognizer={root}/recognizer"]
        again = [edit, [*one, f"--model_id={root}/editor", "--prompt=x", "--num_inference_steps=1"]]
        score = ["--seed=0", f"--clean_edit_dir={root}/edits/clean", f"--output={root}/new/psnr.csv"]
        score.append(f"--defend_edit_dirs={root}/edits/noise/budget_0.03")
        places, weights = ["run.json", "manifest.jsonl"], "diffusion_pytorch_model.safetensors"
        cheap = [
            ("in/a.png", defend, [*one, "--defend_method=noise"]),
            *((f"out/budget_0.03/{name}", main_defend, self.noise) for name in [*places, "report.csv"]),
            ("per_image.csv", report, page),
            ("all_metric.csv", figure, plot),
            *((f"edits/clean/seed0/{name}", eval_psnr, score) for name in [*places, "prompt0/a.png"]),
        ]
        costly = [
            *(("editor/vae/" + name, defend, [*one, *vae]) for name in ("config.json", weights)),
            ("editor/unet/config.json", *again),
            ("editor/scheduler/scheduler_config.json", *again),
            ("editor/model_index.json", *again),
            ("recognizer/preprocessor_config.json", defend, [*one, *face, "--face_box=8,8,50,50"]),
            ("in/a.png", main_edit, [*self.edits, f"--edit_dir={root}/new", "--prompts=0"]),
            ("prompts.txt", main_edit, [*self.edits, f"--edit_dir={root}/new", own_prompts]),
            *((f"all/edits/clean/seed0/{name}", experiment, self.all) for name in [*places, "prompt0/a.png"]),
            *((f"all/{name}", experiment, self.all) for name in ("all_metric.csv", ".facelock.jsonl")),
            ("in/a.png", experiment, [*self.all, f"--output_dir={root}/new"]),
        ]
        return cheap * 6 + costly

@pytest.mark.slow
@pytest.mark.parametrize("count", [int(os.environ.get("MUTATIONS", "10000"))])
def test_mutations_end_in_a_result_or_one_line(tmp_path, capfd, count, fresh_loaders):
    """Of images, JSON, CSV, safetensors, prompts and names: no internal message, no hang, no 3 GB.

    Nothing changes but what was mutated, tables and records of the command's own, and new files.
    """
    bench, draw, told = Bench(tmp_path), random.Random(int(os.environ.get("SEED", count))), []
    for number, (name, script, flags) in zip(range(count), itertools.cycle(bench.commands()), strict=False):
        path = tmp_path / name
        path.write_bytes(data := changed(bench.sound[name], draw))
        if name.startswith(("editor", "recognizer")):
            tiny.forget()
        capfd.readouterr()
        with at_most(SECONDS):
            try:
                status = script.main(list(flags))
            except SystemExit as ended:
                status = ended.code
        out, err = capfd.readouterr()
        lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
        bad = status not in (0, 1) or (status and len(lines) != 1 and "failed: " not in err)
        if bad or re.search(r"\w at \w+\.py:\d|Traceback", out + err):
            told.append(f"{number} {name}: {status} {lines or err[-300:]}")
            (Path(tempfile.gettempdir()) / f"bad{number}").write_bytes(data)
        place = name.split("/")[0] + "/" if name.startswith(("out/", "all/")) else "new/"
        for other, content in bench.files().items():
            own = other.startswith((place, "new/")) and not other.endswith("a.png")
            if other != name and not own and other in bench.sound:
                assert content == bench.sound[other], (number, name, other)
        bench.restore()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not told, "\n".join(told)
    assert peak < MEMORY, peak
