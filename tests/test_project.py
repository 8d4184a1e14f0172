"""The project's own files: environment, CI, README, bundled portraits and models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import cheats
import check
import eval_all
import eval_facial
import eval_psnr
import figure
import numpy as np
import portraits
import purify
import pytest
import torch
import yaml
from PIL import Image

import bench
import defend
import edit
import main_defend
import main_edit
import models
import utils

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = sorted((ROOT / "assets/portraits/mini").glob("*.png"))
README = (ROOT / "README.md").read_text()


def requirements(name: str) -> dict[str, str]:
    """Package -> version range of a requirements file, without what it includes."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [re.fullmatch(r"([\w-]+)(.*)", line) for line in lines if line and not line.startswith("-r")]
    return {match[1]: match[2] for match in found}


def test_environment_installs_the_requirements():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "facelock"
    (pip,) = [entry for entry in environment["dependencies"] if isinstance(entry, dict)]
    assert pip == {"pip": ["-r requirements.txt"]}  # versions stand there, and only there
    assert "python>=3.11,<3.14" in environment["dependencies"]


def test_every_requirement_has_a_range():
    needed = requirements("requirements.txt")
    assert needed["facenet-pytorch"] == "==2.5.3"
    assert {"torch", "torchvision", "diffusers", "transformers", "lpips", "scikit-image"} <= needed.keys()
    of_tests = requirements("requirements-dev.txt")
    assert all("<" in wanted or "==" in wanted for wanted in [*needed.values(), *of_tests.values()])
    assert not needed.keys() & of_tests.keys()


def test_ci_calls_make_test():
    assert "\nmake test\n" in (ROOT / ".ci/run").read_text()


def test_make_table_runs_every_method():
    (line,) = re.findall(r"^METHODS \?= (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert sorted(line.split()) == sorted(utils.METHOD_NAMES)


def test_make_experiment_has_every_part():
    """All prompts at 0.06, six at 0.03, the cheats, the paper's purifiers; what it would run, not the run."""
    told = subprocess.run(["make", "-n", "experiment"], cwd=ROOT, capture_output=True, text=True, check=True)
    for part in ("BUDGETS=0.06 PROMPTS= ", "BUDGETS=0.03 PROMPTS=0,4,11,13,19,23 ", "evaluation/cheats.py"):
        assert part in told.stdout
    assert "for method in none jpeg:90 jpeg:75 jpeg:60 blur:5:1.5 rotate:10; do" in told.stdout
    assert told.stdout.count("--first 1002000 --count 20") == 1


@pytest.mark.slow
def test_make_table_is_the_whole_experiment(tmp_path):
    """One bundled portrait, the control and one method; run again, it has nothing left to make."""
    source = tmp_path / "portraits/portrait_1000000.png"
    source.parent.mkdir()
    source.write_bytes(BUNDLED[0].read_bytes())
    (tmp_path / "venv/bin").mkdir(parents=True)
    for name in ("bin/python", "installed"):  # that of this run stands in, and nothing is installed
        (tmp_path / "venv" / name).touch()
    make = ["make", "table", f"VENV={tmp_path}/venv", f"RUN={sys.executable}", "METHODS=noise encoder"]
    make += [f"IMAGES={source.parent}", f"TABLE={tmp_path}/table", "BUDGETS=0.06 0.030", "PROMPTS=0,13"]
    outputs = [
        subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)
    ]
    rows = (tmp_path / "table/all_metric.csv").read_text().splitlines()[1:]
    places = [f"{method}/budget_{budget}" for budget in ("0.06", "0.03") for method in ("noise", "encoder")]
    assert [row.split(",")[0] for row in rows] == ["clean", *(f"{tmp_path}/table/edits/{p}" for p in places)]
    assert (tmp_path / "table/figure.png").stat().st_size > 10_000
    assert outputs[0].count(" 0 there already, 0 failed") == 1 + 2 * len(places)
    assert outputs[1].count(": 0 written") == 1 + 2 * len(places)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_readme_links_lead_somewhere(link):
    if link.startswith("#"):
        headings = re.findall(r"^#+ (.+)$", README, re.MULTILINE)
        places = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
        assert link[1:] in places
    else:
        assert (ROOT / link).exists()


@pytest.fixture
def flags_of(capsys):
    """Script (and figure.py's kind) -> the flags that its --help names."""
    scripts = (bench, defend, edit, main_defend, main_edit, eval_all, eval_facial, eval_psnr, purify, cheats)
    commands = {script.__name__: (script.parse_args, []) for script in scripts}
    commands |= {f"figure {kind}": (figure.parse_args, [kind]) for kind in ("grid", "plot")}
    commands |= {"portraits": (portraits.main, []), "check": (check.main, [])}
    found = {}
    for name, (parse, arguments) in commands.items():
        with pytest.raises(SystemExit):
            parse([*arguments, "--help"])
        found[name] = set(re.findall(r"--\w+", capsys.readouterr().out))
    return found


def test_readme_commands_have_flags_that_exist(flags_of):
    """Each of its own script."""
    blocks = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(python [^`\n]+)`", README)
    seen = 0
    for line in [line for text in [*blocks, *inline] for line in text.replace("\\\n", " ").splitlines()]:
        for script, rest in re.findall(r"(?:\w+/)?(\w+)\.py\b([^#;)]*)", line):
            if script == "figure":
                script += f" {rest.split()[0]}"
            named = set(re.findall(r"(?<!\S)--\w+", rest))
            assert named <= flags_of[script], line
            seen += len(named)
    assert seen > 90


def test_readme_names_flags_that_exist(flags_of):
    known = set().union(*flags_of.values())
    foreign = {"--include"}  # of hf
    # of accelerate, torchrun and SLURM
    foreign |= {"--num_processes", "--num_machines", "--machine_rank", "--main_process_ip"}
    foreign |= {"--main_process_port", "--nproc_per_node", "--shutdown_timeout"}
    foreign |= {"--nodes", "--ntasks", "--gpus"}
    named = set(re.findall(r"(?<![-\w])--\w+", README)) - foreign
    assert len(named) > 45 and named <= known


# ---------------------------------------------------------------------------------------------------------
# the bundled portraits and models


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.stem)
def test_bundled_portraits_are_the_generators(path):
    """And so nobody changes, unseen, the people that the bundled models were trained on."""
    identity = int(path.stem.removeprefix("portrait_"))
    assert identity >= portraits.TEST_FROM
    made, there = np.asarray(portraits.portrait(identity)), utils.load_image(path).pixels
    assert made.shape == (128, 128, 3)
    assert np.abs(made.astype(int) - there).max() <= 1  # another build of the renderer may round otherwise


def test_there_are_twelve_bundled_portraits_and_two_photographs():
    assert len(BUNDLED) == 12
    for name, size in (("astronaut.png", (512, 512)), ("grace_hopper.jpg", (600, 512))):
        assert utils.load_image(ROOT / "assets/portraits" / name).size == size


def test_the_bundled_models_are_small_and_no_pickles():
    files = [path for path in models.MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}


def test_the_bundled_editor_is_a_plain_diffusers_directory():
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(models.MINI / "editor")
    pipeline.set_progress_bar_config(disable=True)
    with Image.open(BUNDLED[0]) as portrait:
        (image,) = pipeline("Let it be snowy", portrait, num_inference_steps=2, guidance_scale=1).images
    assert image.size == (128, 128)
    assert json.loads((models.MINI / "editor/model_index.json").read_text())["safety_checker"] == [None, None]


def test_facelock_moves_the_face_and_noise_does_not(tmp_path, capsys):
    """On the bundled models: 20 iterations, after a VAE round trip. Nothing is said of real photos."""
    after = {}
    for method in ("facelock", "noise"):
        arguments = (
            f"--models mini --input_path {BUNDLED[2]} --output_path {tmp_path}/{method}.png --check "
            f"--defend_method {method} --attack_budget 0.06 --num_iters 20 --device cpu"
        )
        assert defend.main(arguments.split()) == 0
        shown = capsys.readouterr().out
        after[method] = {
            name: float(value) for name, value in re.findall(r"(recognizer|judge) \S+ -> (\S+?),?\s", shown)
        }
    assert after["noise"]["recognizer"] > 0.9 and after["noise"]["judge"] > 0.9
    assert after["facelock"]["recognizer"] < after["noise"]["recognizer"] - 0.2
    assert after["facelock"]["judge"] < after["noise"]["judge"] - 0.02


def test_mini_says_what_a_photograph_is_worth(tmp_path, capsys):
    """The main job runs on a real photograph, too, and says that it means nothing."""
    arguments = (
        f"--models mini --input_path {ROOT}/assets/portraits/grace_hopper.jpg "
        f"--output_path {tmp_path}/out.png --num_iters 2 --device cpu"
    )
    assert defend.main(arguments.split()) == 0
    assert "says nothing about how well a real photo is protected" in capsys.readouterr().err
    assert utils.load_image(tmp_path / "out.png").size == (600, 512)


def test_mini_editing_is_the_same_in_batches():
    chosen = models.MODEL_SETS["mini"]
    editor = models.load_editor(
        models.dataclasses.replace(chosen, num_inference_steps=3),
        "instruct-pix2pix",
        torch.device("cpu"),
        torch.float32,
        progress=False,
    )
    images = utils.to_tensor(np.stack([utils.load_image(path).pixels for path in BUNDLED[:2]]))
    prompts = ["Let it be snowy", "Turn the person into a zombie"]
    together = editor(images, prompts, seed=0)
    alone = torch.cat([editor(images[i : i + 1], prompts[i : i + 1], seed=0) for i in range(2)])
    torch.testing.assert_close(together, alone, atol=5e-3, rtol=0)
    assert (together[0] - together[1]).abs().mean() > 0.05
