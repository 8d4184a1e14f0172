"""Mutations of everything that is read, and kills: one line or a result, and nothing of others changed."""

from __future__ import annotations

import argparse
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
import time
from pathlib import Path

import figure
import outputs
import pandas as pd
import pytest
import report
from PIL import Image
from test_reliability import ENVIRONMENT, at_most, files, mutated

import defend
import edit
import main_defend
import runs
import utils

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
    """What is mutated: a file below `root`, and the command that reads it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "in").mkdir()
        Image.open(PORTRAIT).resize((64, 64)).save(root / "in/a.png")
        (root / "precious").write_text("precious")
        shutil.copytree(ROOT / "assets/mini/editor", root / "editor")
        shutil.copytree(ROOT / "assets/mini/recognizer", root / "recognizer")
        self.quick = ["--models=mini", "--device=cpu", "--resolution=64"]
        self.noise = [*self.quick, "--defend_method=noise", f"--image_dir={root}/in"]
        self.noise.append(f"--output_dir={root}/out")
        assert main_defend.main(self.noise) == 0
        edits = {"seed": 0, "prompt": [0, 1] * 3, "name": list("aabbcc"), "psnr": [20.5, 21, 22, 23, 24, 25]}
        edits = pd.concat([pd.DataFrame({"method": row, **edits}) for row in ("clean", "noise/budget_0.03")])
        outputs.write_csv(root / "per_image.csv", edits)
        means = pd.DataFrame({"method": ["clean", "noise/budget_0.03"], "psnr": 135.5 / 6})
        outputs.write_csv(root / "all_metric.csv", means.assign(psnr_low=20, psnr_high=24.5, psnr_n=3))
        (root / "prompts.txt").write_text("Let it be snowy\n\nAdd ears\n")
        self.result = (root / "out/budget_0.03/a.png").read_bytes()

    def commands(self) -> dict[str, list]:
        """Names the files that are mutated -> who reads them."""
        root, vae = self.root, ["--defend_method=encoder", "--num_iters=1", f"--model_id={self.root}/editor"]
        one = [*self.quick, f"--input_path={root}/in/a.png", f"--output_path={root}/o.png"]
        page = [f"--experiment_dir={root}", f"--output={root}/r.html"]
        plot = ["plot", f"--tables={root}/all_metric.csv", "--metric=psnr", f"--output={root}/p.png"]
        face = ["--defend_method=facelock", "--num_iters=1", f"--recognizer={root}/recognizer"]
        again = [edit, [*one, f"--model_id={root}/editor", "--prompt=x", "--num_inference_steps=1"]]
        return {
            "in/a.png": [defend, [*one, "--defend_method=noise"]],
            "out/budget_0.03/run.json": [main_defend, self.noise],
            "out/budget_0.03/manifest.jsonl": [main_defend, self.noise],
            "out/budget_0.03/report.csv": [main_defend, self.noise],
            "per_image.csv": [report, page],
            "all_metric.csv": [figure, plot],
            "prompts.txt": [Prompts, [str(root / "prompts.txt")]],
            "editor/vae/config.json": [defend, [*one, *vae]],
            "editor/vae/diffusion_pytorch_model.safetensors": [defend, [*one, *vae]],
            "editor/unet/config.json": again,
            "editor/scheduler/scheduler_config.json": again,
            "editor/model_index.json": again,
            "recognizer/preprocessor_config.json": [defend, [*one, *face, "--face_box=8,8,50,50"]],
        }


class Prompts:
    """Reads a prompt file as the scripts do."""

    @staticmethod
    def main(argv: list[str]) -> int:
        def run(args: argparse.Namespace) -> int:
            utils.choose_prompts(None, Path(argv[0]))
            return 0

        return utils.run_command(run, argparse.Namespace(debug=False))


@pytest.mark.slow
@pytest.mark.parametrize("count", [int(os.environ.get("MUTATIONS", "10000"))])
def test_mutations_end_in_a_result_or_one_line(tmp_path, capfd, count, fresh_loaders):
    """Of images, JSON, CSV, safetensors, prompts and names: no internal message, no hang, no 3 GB."""
    bench, draw, told = Bench(tmp_path), random.Random(count), []
    sound = {name: (tmp_path / name).read_bytes() for name in bench.commands()}
    costly = [name for name in sound if name.startswith(("editor", "recognizer"))]
    names = [name for name in sound if name not in costly] * 6 + costly
    for number, name in zip(range(count), itertools.cycle(names), strict=False):
        script, flags = bench.commands()[name]
        path = tmp_path / name
        path.write_bytes(data := changed(sound[name], draw))
        forget()
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
            (tmp_path / f"bad{number}").write_bytes(data)
        assert (tmp_path / "precious").read_text() == "precious"
        for other, content in sound.items():  # what was not mutated is as it was; results are made again
            if other != name and not (other.startswith("out/") and name.startswith("out/")):
                assert (tmp_path / other).read_bytes() == content, (number, name, other)
        if name.startswith("out/"):
            shutil.rmtree(tmp_path / "out")
            main_defend.main(bench.noise)
        else:
            path.write_bytes(sound[name])
        assert (tmp_path / "out/budget_0.03/a.png").read_bytes() == bench.result
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not told, "\n".join(told)
    assert peak < MEMORY, peak


def forget() -> None:
    """Forgets what a process has loaded: the files are others now."""
    from models import editors, loading, recognizers, vaes

    for loader in (vaes.load_vae, editors._load_pipeline, recognizers.load_recognizer, loading.recorded):
        loader.cache_clear()
    runs._digest.cache_clear()


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
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=quiet, stderr=quiet)
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
