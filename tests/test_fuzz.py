"""Mutations of everything that is read, and kills: one line or a result, and nothing of others changed."""

from __future__ import annotations

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

import pandas as pd
import pytest
import tiny
from PIL import Image
from test_reliability import ENVIRONMENT, at_most, files, mutated

import defend
import edit
import experiment
import main_defend
import main_edit
import runs
from evaluation import eval_psnr, figure, report, tables

ROOT = Path(runs.__file__).resolve().parent
SECONDS, MEMORY = 60, 3 * 2**20  # KiB
PORTRAIT = ROOT / "assets/portraits/mini/portrait_1000000.png"
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
        page = [f"--experiment_dir={root}", f"--output={root}/new/r.html"]
        plot = ["plot", f"--tables={root}/all_metric.csv", "--metric=psnr", f"--output={root}/new/p.png"]
        face = ["--defend_method=facelock", "--num_iters=1", f"--recognizer={root}/recognizer"]
        again = [edit, [*one, f"--model_id={root}/editor", "--prompt=x", "--num_inference_steps=1"]]
        score = ["--seed=0", f"--clean_edit_dir={root}/edits/clean", f"--output={root}/new/psnr.csv"]
        score.append(f"--defend_edit_dirs={root}/edits/noise/budget_0.03")
        places = ["run.json", "manifest.jsonl"]
        cheap = [
            ("in/a.png", defend, [*one, "--defend_method=noise"]),
            *((f"out/budget_0.03/{name}", main_defend, self.noise) for name in [*places, "report.csv"]),
            ("per_image.csv", report, page),
            ("all_metric.csv", figure, plot),
            *((f"edits/clean/seed0/{name}", eval_psnr, score) for name in [*places, "prompt0/a.png"]),
        ]
        costly = [
            *(("editor/vae/" + name, defend, [*one, *vae]) for name in ("config.json", WEIGHTS)),
            ("editor/unet/config.json", *again),
            ("editor/scheduler/scheduler_config.json", *again),
            ("editor/model_index.json", *again),
            ("recognizer/preprocessor_config.json", defend, [*one, *face, "--face_box=8,8,50,50"]),
            ("in/a.png", main_edit, [*self.edits, f"--edit_dir={root}/new", "--prompts=0"]),
            ("prompts.txt", main_edit, [*self.edits, f"--edit_dir={root}/new", *self.own_prompts]),
            *((f"all/edits/clean/seed0/{name}", experiment, self.all) for name in [*places, "prompt0/a.png"]),
            *((f"all/{name}", experiment, self.all) for name in ("all_metric.csv", ".facelock.jsonl")),
            ("in/a.png", experiment, [*self.all, f"--output_dir={root}/new"]),
        ]
        return cheap * 6 + costly

    @property
    def own_prompts(self) -> list[str]:
        return [f"--prompt_file={self.root}/prompts.txt"]


WEIGHTS = "diffusion_pytorch_model.safetensors"


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


@pytest.mark.slow
def test_names_of_all_kinds(tmp_path):
    """Random bytes as the names of portraits and folders: a result, or one line."""
    draw = random.Random(0)
    for number in range(int(os.environ.get("MUTATIONS", "10000")) // 100):
        length = draw.choice([1, 3, 10, 200, 255])
        name = bytes(draw.choice([*range(1, 256)]) for _ in range(length)).replace(b"/", b"_")[:251]
        folder = tmp_path / str(number) / os.fsdecode(name)
        folder.mkdir(parents=True)
        shutil.copy(PORTRAIT, folder / os.fsdecode(name[:251] + b".png"))
        flags = ["--models=mini", "--device=cpu", "--defend_method=noise", f"--image_dir={folder}"]
        assert main_defend.main([*flags, f"--output_dir={folder}/out"]) in (0, 1)


def hear_ctrl_c() -> None:
    """Undoes what a shell does to what it starts in the background, which ignores Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path):
    """Each run is killed at a random moment; what is there stays whole, and is at last what it should be."""
    (tmp_path / "in").mkdir()
    for number in range(12):
        Image.open(PORTRAIT).rotate(number).save(tmp_path / f"in/{number}.png")
    flags = ["--models=mini", "--device=cpu", "--defend_method=encoder", "--num_iters=4", "--batch_size=2"]
    flags.append(f"--image_dir={tmp_path}/in")
    command = [sys.executable, "main_defend.py", *flags]
    subprocess.run([*command, f"--output_dir={tmp_path}/whole"], cwd=ROOT, env=ENVIRONMENT, check=True)
    whole, place = files(tmp_path / "whole/budget_0.03"), tmp_path / "killed/budget_0.03"
    draw, quiet, kills = random.Random(0), subprocess.DEVNULL, 0
    command.append(f"--output_dir={tmp_path}/killed")
    wanted = int(os.environ.get("KILLS", "100"))
    while kills < wanted:
        where = {"cwd": ROOT, "env": ENVIRONMENT, "stdout": quiet, "stderr": quiet}
        process = subprocess.Popen(command, preexec_fn=hear_ctrl_c, **where)  # noqa: PLW1509
        time.sleep(draw.uniform(0, 12))
        process.send_signal(draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
        assert process.wait(timeout=SECONDS) in (0, 130, 143, -9, -15, -2)
        kills += 1
        assert files(place).items() <= whole.items()
        if files(place) == whole:
            shutil.rmtree(place)
    done = subprocess.run([*command, "--verify"], cwd=ROOT, env=ENVIRONMENT, capture_output=True, check=True)
    assert files(place) == whole and b" 0 failed" in done.stdout
    assert set(runs.read_manifest(place)) == set(whole)
    assert all(json.loads(line) for line in (place / "manifest.jsonl").read_text().splitlines())
