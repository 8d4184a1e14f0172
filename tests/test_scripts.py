"""edit.py, defend.py and their batch forms as a person meets them: flags, files, messages, exit status."""

import contextlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import load_file

import defend
import edit
import main_defend
import main_edit
import protection
import utils
from images import linf, load_image
from methods import METHODS
from models.config import resolve
from models.editors import InstructPix2Pix
from models.loading import ROOT
from protection import Protector, methods_for

pytestmark = pytest.mark.usefixtures("whole_images")

SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
)


@pytest.fixture
def call(capsys, defend_flags, edit_flags):
    """Runs a script's main -> status, out, err, its error lines and its warnings.

    `line` is the command, {} filled in.
    """

    def run(script, line: str, *more, **names) -> SimpleNamespace:
        flags = defend_flags if script in (defend, main_defend) else edit_flags
        given = [word.format(**names) for word in line.split()]
        capsys.readouterr()
        try:
            status = script.main([*flags, *given, *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        lines = re.split(r"[\r\n]+", err)
        errors = [text for text in lines if "error:" in text]
        warnings = [text.removeprefix("warning: ") for text in lines if text.startswith("warning: ")]
        return SimpleNamespace(status=status, out=out, err=err, errors=errors, warnings=warnings)

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three portraits."""
    tiny.write_portraits(tmp_path / "in", 3)
    return tmp_path / "in"


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def levels(a: Path, b: Path) -> int:
    """The largest difference of two files in 8-bit levels."""
    return int(np.abs(pixels(a).astype(int) - pixels(b)).max())


def tree(directory: Path) -> dict[str, bytes | None]:
    """Every path below a directory, with the files' bytes."""
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else None
        for path in directory.rglob("*")
    }


HELP = """
import contextlib, io, json, runpy, sys
shown, path = {}, sys.path[1:]
for script in sys.argv[1:]:
    sys.argv, sys.path[:] = [script, "--help"], [script.rpartition("/")[0], *path]
    sys.modules.pop("_path", None)
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        runpy.run_path(script, run_name="__main__")
    loaded = {"torch", "diffusers", "transformers"} & set(sys.modules)
    shown[script] = out.getvalue() + " ".join(f"LOADED {name}" for name in loaded)
print(json.dumps(shown))
"""


def test_help_answers_without_torch():
    in_folders_first = sorted(SCRIPTS, key=lambda script: "/" not in script)  # they have to find the others
    command = [sys.executable, "-c", HELP, *(f"{ROOT}/{script}" for script in in_folders_first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    for script, text in json.loads(done.stdout).items():
        assert text.startswith("usage:") and Path(script).name in text and "LOADED" not in text, script
        assert "default: None" not in text and "==SUPPRESS==" not in text, script


def test_defaults_are_the_releases():
    (protect, edits), line = (defend, edit), "--input_path=a"
    found = vars(Protector(defend.settings_of(protect.parse_args([line]))).run)
    assert (found["budget"], found["step_size"], found["num_iters"]) == (0.03, 0.01, 100)
    given = edits.parse_args([line, "--prompt=b"])
    assert (given.seed, given.models, given.model) == (-1, "full", "instruct-pix2pix")


# ---------------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize(
    ("method", "budget", "allowed"),
    [
        *(("facelock", *size) for size in ((0.008, 1), (0.02, 2))),
        *((method, 0.03, 3) for method in methods_for(InstructPix2Pix)),
    ],
)
def test_a_protected_file_differs_and_stays_in_the_budget(call, portrait, method, budget, allowed):
    done = call(defend, f"--input_path {portrait} --defend_method {method} --attack_budget {budget}")
    protected = portrait.with_name("protected_mini_face0.png")
    assert done.status == 0 and done.errors == []
    assert 1 <= levels(portrait, protected) <= allowed
    found = re.search(r"L-infinity ([\d.]+) \(budget ([\d.]+)\), PSNR ([\d.]+) dB", done.out)
    assert float(found[1]) == pytest.approx(levels(portrait, protected) * 2 / 255, abs=1e-4)
    assert float(found[2]) == budget and float(found[3]) > 30
    reported = re.search(r"recognizer (-?[\d.]+) -> (-?[\d.]+), judge (-?[\d.]+) -> (-?[\d.]+)", done.out)
    assert (reported is not None) == method.startswith("facelock")


@pytest.mark.parametrize(("faces", "count"), [("largest", 1), ("all", 2)])
def test_faces_are_found_or_given_in_the_inputs_pixels(tmp_path, protector, faces, count):
    (path,) = tiny.write_portraits(tmp_path, 1, 128)
    tool = protector(f"--faces {faces}")
    tool.detector = lambda pixels: [(20, 40, 120, 110), (0, 2, 30, 128)]
    assert tool.load(path).boxes == [(20, 40, 120, 110), (0, 2, 30, 128)][:count]
    assert tool.load(path, [(100, 0, 200, 64)]).boxes == [(100, 0, 128, 64)]
    with pytest.raises(utils.UserError, match="face0.png: the face is too small to be worked on at 64x64"):
        tool.load(path, [(0, 0, 1, 1)])
    subject = tool.load(path, [(0, 0, 1, 1), (20, 40, 120, 110)])
    assert subject.boxes == [(20, 40, 120, 110)] and subject.n_found == 2


@pytest.mark.parametrize(("script", "more"), [(defend, "--defend_method noise"), (edit, "--prompt hat")])
def test_a_file_may_be_named_by_a_word_alone(call, portrait, script, more):
    for line in (f"{portrait} {more}", f"{more} {portrait}", f"{more} --input_path {portrait}"):
        assert call(script, f"{line} --seed 0 --output_path {portrait.with_name('out.png')}").status == 0
    for line in (f"{portrait} --input_path {portrait} {more}", more):
        done = call(script, line)
        assert done.status == 2 and "--input_path" in done.errors[0]


def test_a_protection_ends_in_a_verdict_and_so_does_its_edit(call, portrait, tmp_path):
    """By each judge, with the numbers of the report above it; the stand-ins say last what they are."""
    flags = f"--judge {ROOT}/assets/mini/judge dlib"
    done = call(defend, f"{portrait} {flags} --output_path {tmp_path}/p.png")
    lines = done.out.splitlines()
    assert done.status == 0 and "stand-ins" in lines[-1] and "larger budget" not in done.out
    for name in ("judge", "dlib"):
        (said,) = [line for line in lines if line.startswith(f"  {name}")]
        assert re.search(r"can't judge this face|held: .* the same above", said)
    assert "in this round trip" in done.out
    line = f"{tmp_path}/p.png --source {portrait} --prompt x --seed 0 {flags} --output_path {tmp_path}/e.png"
    done = call(edit, f"{line} --comparison {tmp_path}/c.png")
    assert done.status == 0 and "in this edit" in done.out and "stand-ins" in done.out.splitlines()[-1]
    sources = [pixels(path) for path in (portrait, tmp_path / "p.png")]
    shown = pixels(tmp_path / "c.png")
    assert np.array_equal(shown[:, :64], sources[0]) and np.array_equal(shown[:, 72:136], sources[1])
    assert np.array_equal(shown[:, -64:], pixels(tmp_path / "e.png"))
    again = call(edit, f"{portrait} --prompt x --seed 0 --output_path {tmp_path}/clean.png")
    assert again.status == 0 and np.array_equal(shown[:, 144:208], pixels(tmp_path / "clean.png"))
    (other,) = tiny.write_portraits(tmp_path / "other", 1, (64, 48))
    done = call(edit, f"{tmp_path}/p.png --source {other} --prompt hat")
    assert done.status == 1 and "differs in size" in done.errors[0]


def test_when_all_were_attacked_the_edit_is_made_and_nobody_judges(
    portrait, tiny_models, defend_flags, edit_flags, whole_images, tmp_path, capsys
):
    """One line says so, and how to name a judge."""
    place = defend_flags.index("--judge")
    of_defense = defend_flags[:place] + defend_flags[place + 2 :]
    named = ["--recognizer", str(tiny_models.recognizer), f"{ROOT}/assets/mini/judge", "dlib"]
    protected, edited = tmp_path / "p.png", tmp_path / "e.png"
    edits = [*edit_flags, f"{protected}", f"--source={portrait}", "--prompt=hat", "--seed=0"]
    for script, line, made in ((defend, [*of_defense, f"{portrait}"], protected), (edit, edits, edited)):
        assert script.main([*line, *named, f"--output_path={made}"]) == 0 and made.exists()
        (told,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("No verdict")]
        assert "attacked every recogniser that is named (recognizer, judge, dlib)" in told
        assert "--judge" in told


def test_an_edit_is_made_without_the_weights_of_a_judge_too(call, portrait):
    out = portrait.with_name("e.png")
    done = call(edit, f"{portrait} --source {portrait} --prompt x --seed 0 --judge /none --output_path {out}")
    assert done.status == 0 and out.exists() and "No verdict on this edit: no judge can be loaded" in done.out
    assert any("none left out: " in text for text in done.warnings)


def test_faces_that_are_left_out_are_counted(call, portrait, monkeypatch):
    class Two(tiny.WholeImage):
        def __call__(self, pixels):
            return [(0, 0, 40, 40), (40, 40, 64, 64)]

    monkeypatch.setattr(protection, "FaceDetector", Two)
    assert "2 faces found, 1 protected; for all: --faces all" in call(defend, f"{portrait}").out
    assert "faces found" not in call(defend, f"{portrait} --faces all").out
    assert "2 faces found, 1 measured" in call(defend, f"{portrait} --defend_method vae --check").out


@pytest.mark.parametrize("size", [64, 128])
def test_all_weights_that_are_missing_are_named_at_once(call, tmp_path, monkeypatch, size):
    """With size and place; the stand-ins are offered for a picture of theirs alone."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (path,) = tiny.write_portraits(tmp_path, 1, size)
    line = f"{path} --models full --model_id timbrooks/instruct-pix2pix --lpips alex --device auto"
    done = call(defend, f"{line} --recognizer vggface2 --judge casia-webface")
    assert done.status == 1 and "4 networks are missing" in done.errors[0]
    assert '0.3 GB, hf download timbrooks/instruct-pix2pix --include "vae/*"' in done.err
    assert len(re.findall(rf"0.\d GB, https://\S+ into {tmp_path}", done.err)) == 3
    assert "HF_ENDPOINT" in done.err and "docs/models.md" in done.err
    assert ("--models mini" in done.err) == (size == 128)
    if not torch.cuda.is_available():
        assert [text for text in done.warnings if "no GPU found" in text]


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(tiny.portrait((45, 70))).save(path, exif=exif, quality=95)


def with_alpha(path: Path) -> None:
    alpha = np.arange(4096).reshape(64, 64) % 256
    Image.fromarray(np.dstack([tiny.portrait(), alpha]).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("name", "write", "size"), [("rotated.jpg", exif_rotated, (45, 70)), ("alpha.png", with_alpha, (64, 64))]
)
def test_an_image_keeps_its_size_orientation_and_alpha(call, tmp_path, name, write, size):
    source, output, edited = tmp_path / name, tmp_path / "out.png", tmp_path / "edited.png"
    write(source)
    call(defend, f"--input_path {source} --defend_method encoder --output_path {output}")
    call(edit, f"--input_path {source} --prompt hat --seed 0 --output_path {edited}")
    clean = load_image(source)
    for path in (output, edited):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == size and not image.getexif()
            assert image.mode == ("RGB" if clean.alpha is None else "RGBA")
            if clean.alpha is not None:
                assert np.array_equal(np.asarray(image)[..., 3], clean.alpha)
    assert 1 <= round(linf(load_image(output).pixels, clean.pixels) * 255 / 2) <= 3


DRAWN = [(defend, f"--defend_method {name}") for name in ("noise", "encoder", "cw")]
DRAWN += [(edit, "--prompt hat")]


@pytest.mark.parametrize(("script", "line"), DRAWN)
def test_a_result_is_the_same_for_a_seed_and_another_for_another(call, portrait, script, line):
    outputs = [portrait.with_name(f"out{number}.png") for number in range(3)]
    for output, seed in zip(outputs, (0, 0, 1), strict=True):
        assert call(script, f"{portrait} {line} --seed {seed} --output_path {output}").status == 0
    first, again, other = (path.read_bytes() for path in outputs)
    assert first == again != other


def test_a_drawn_seed_is_printed_and_repeats_the_edit(call, portrait):
    drawn = call(edit, f"--input_path {portrait} --prompt hat")  # -1 is the default
    seed = re.search(r"^seed: (\d+)$", drawn.out, re.MULTILINE)[1]
    written = portrait.with_name("edit_face0.png")
    first = written.read_bytes()
    written.unlink()
    call(edit, f"--input_path {portrait} --prompt hat --seed {seed}")
    assert written.read_bytes() == first
    assert f"edit_face0.png: 'hat', seed {seed}" in drawn.out


def test_the_start_depends_on_seed_and_name_alone(call, folder, tmp_path):
    alone = tmp_path / "elsewhere" / "face1.png"
    alone.parent.mkdir()
    alone.write_bytes((folder / "face1.png").read_bytes())
    for number, flags in enumerate((f"{folder}", f"{folder} --batch_size 3", f"{alone.parent}")):
        line = f"--defend_method noise --output_dir {tmp_path}/{number} --image_dir {flags}"
        assert call(main_defend, line).status == 0
    made = [tmp_path / f"{number}/budget_0.03/face1.png" for number in range(3)]
    renamed = shutil.copy(alone, alone.with_name("other.png"))
    for path in (alone, renamed):
        assert call(defend, f"--defend_method noise --input_path {path}").status == 0
    single, other = (path.with_name(f"protected_mini_{path.name}") for path in (alone, renamed))
    assert all(np.array_equal(pixels(path), pixels(single)) for path in made)
    assert not np.array_equal(pixels(other), pixels(single))


# ---------------------------------------------------------------------------------------------------------
# the batch scripts give what the single ones give


def test_main_defend_gives_what_defend_gives(call, folder, tmp_path):
    done = call(main_defend, f"--image_dir {folder} --output_dir {tmp_path}/out")
    made = tmp_path / "out" / "budget_0.03"
    assert done.status == 0 and "3 written, 0 there already, 0 failed" in done.out
    for name in ("face0", "face2"):
        call(defend, f"--input_path {folder}/{name}.png --output_path {tmp_path}/{name}.png")
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), pixels(made / f"{name}.png"))
    record = json.loads((made / "run.json").read_text())
    assert record["seed"] == 0 and record["arguments"]["defend_method"] == "facelock"


def test_main_edit_gives_what_edit_gives(call, folder, tmp_path):
    done = call(main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 5 --prompts 0,3")
    made = tmp_path / "out" / "seed5"
    assert done.status == 0 and "6 written" in done.out
    assert len([*made.glob("prompt[03]/face[012].png")]) == 6
    line = f"--input_path {folder}/face1.png --output_path {tmp_path}/single.png --seed 5 --prompt"
    call(edit, line, utils.edit_prompts[3])
    assert (tmp_path / "single.png").read_bytes() == (made / "prompt3/face1.png").read_bytes()
    record = json.loads((made / "run.json").read_text())
    assert record["prompts"] == {str(i): utils.edit_prompts[i] for i in (0, 3)}
    call(main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 5 --prompts 7")
    assert sorted(json.loads((made / "run.json").read_text())["prompts"]) == ["0", "3", "7"]


def test_own_instructions(call, folder, tmp_path):
    (tmp_path / "mine.txt").write_text("wear a hat\n\nbe blue\n")
    line = f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 5 --prompt_file {tmp_path}/mine.txt"
    assert call(main_edit, line).status == 0
    made = tmp_path / "out/seed5"
    assert sorted(path.name for path in made.glob("prompt*")) == ["prompt0", "prompt2"]
    assert json.loads((made / "run.json").read_text())["prompts"] == {"0": "wear a hat", "2": "be blue"}


# ---------------------------------------------------------------------------------------------------------
# resume


@pytest.fixture
def finished(call, folder, tmp_path) -> SimpleNamespace:
    """A finished run of main_defend: its directory and the line that made it."""
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method encoder --batch_size 2"
    assert call(main_defend, line).status == 0
    made = tmp_path / "out" / "budget_0.03"
    return SimpleNamespace(line=line, made=made, files=tree(made))


def test_a_folder_from_before_vae_was_named_so_is_known(call, finished, tiny_models):
    """Its run.json calls the flag vae_ids; what was attacked through several editors is another result."""
    path = finished.made / "run.json"
    record = json.loads(path.read_text())
    del record["arguments"]["vae"]
    path.write_text(json.dumps(record))
    assert "0 written, 3 there already" in call(main_defend, finished.line).out
    record["arguments"]["vae_ids"] = [f"instruct-pix2pix={tiny_models.editor}, 64 px"]
    path.write_text(json.dumps(record))
    done = call(main_defend, finished.line)
    assert done.status == 1 and "vae_ids" in done.errors[0]


def test_another_version_of_a_method_is_another_setting(call, finished, monkeypatch):
    """And of no other method's."""
    monkeypatch.setitem(METHODS, "facelock", METHODS["facelock"]._replace(version=9))
    assert call(main_defend, finished.line).status == 0
    monkeypatch.setitem(METHODS, "encoder", METHODS["encoder"]._replace(version=9))
    done = call(main_defend, finished.line)
    assert done.status == 1 and "method_version: 1 there, 9 now" in done.errors[0]
    assert tree(finished.made) == finished.files


def test_an_edit_of_what_was_protected_otherwise_since_is_refused(call, folder, tmp_path):
    """The worst there was: edits of noise under the name of encoder, without a word."""
    protect = f"--image_dir {folder} --output_dir {tmp_path}/protected --overwrite"
    edits = f"--src_dir {tmp_path}/protected/budget_0.03 --edit_dir {tmp_path}/edits --seed 0 --prompts 0,3"
    assert call(main_defend, f"{protect} --defend_method noise").status == 0
    assert call(main_edit, edits).status == 0
    assert call(main_defend, f"{protect} --defend_method encoder").status == 0
    before = tree(tmp_path / "edits")
    done = call(main_edit, edits)
    assert done.status == 1 and len(done.errors) == 1 and tree(tmp_path / "edits") == before
    assert "prompt0/face0.png: its source has changed" in done.errors[0] and "and 1 more" in done.errors[0]
    assert "6 written, 0 there already" in call(main_edit, edits, "--overwrite").out
    after = tree(tmp_path / "edits")
    assert all(after[name] != before[name] for name in after if name.endswith(".png"))
    assert "0 written, 6 there already" in call(main_edit, edits, "--verify").out


def test_budget_folders_are_named_as_the_releases(call, folder, tmp_path):
    budget, out = 8 / 255, tmp_path / "out"
    line = f"--image_dir {folder} --output_dir {out} --defend_method noise --attack_budget"
    assert call(main_defend, f"{line} {budget}").status == 0
    (out / "budget_0.03137254901960784").rename(out / "budget_0.0313725")
    done = call(main_defend, f"{line} {budget}")  # as this project called them before
    assert "0 written, 3 there already" in done.out
    assert call(main_defend, f"{line} 0.03137250000001").status == 0  # another of the same short name
    assert {path.name for path in out.iterdir()} == {"budget_0.0313725", "budget_0.03137250000001"}


def test_main_defend_draws_a_seed_only_for_a_new_directory_and_main_edit_a_new_one(call, folder, tmp_path):
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method noise --seed -1"
    seed = int(re.search(r"^seed: (\d+)$", call(main_defend, line).out, re.MULTILINE)[1])
    assert json.loads((tmp_path / "out/budget_0.03/run.json").read_text())["seed"] == seed
    again = call(main_defend, line)
    assert again.status == 1 and len(again.errors) == 1 and f"--seed {seed}" in again.errors[0]
    assert call(main_defend, line, "--seed", seed).status == 0
    line = f"--src_dir {folder} --edit_dir {tmp_path}/edits --prompts 0"
    seeds = [re.search(r"^seed: (\d+)$", call(main_edit, line).out, re.MULTILINE)[1] for _ in range(2)]
    assert {path.name for path in (tmp_path / "edits").iterdir()} == {f"seed{seed}" for seed in seeds}


# ---------------------------------------------------------------------------------------------------------
# bad input: one line, exit status, nothing written


@pytest.fixture
def bad(tmp_path) -> Path:
    """A directory with everything that can be wrong."""
    root = tmp_path / "bad"
    tiny.write_portraits(root / "good", 2)
    Image.new("RGB", (64, 64), "grey").save(root / "grey.png")
    Image.fromarray(tiny.portrait()).save(root / "whole.jpg")
    (root / "text.png").write_text("no image")
    (root / "empty.txt").write_text(" \n\n")
    (root / "texts").mkdir()
    (root / "texts" / "notes.txt").write_text("hello")
    (root / "file").write_text("not a directory")
    tiny.write_portraits(root / "protected" / "budget_0.03", 1)
    tiny.write_portraits(root / "budget_0.03", 1)
    (root / "null.png").symlink_to("/dev/null")
    (root / "link.png").symlink_to(root / "good/face0.png")
    (root / "folder.png").mkdir()
    os.mkfifo(root / "pipe.png")
    for folder in ("budget_0.03", "seed0/prompt2"):  # as the authors' release leaves them
        (root / "release" / folder).mkdir(parents=True)
        (root / "release" / folder / "p0.jpg").write_bytes((root / "whole.jpg").read_bytes())
    tiny.write_portraits(root / "twins", 1)
    Image.fromarray(tiny.portrait()).save(root / "twins" / "face0.jpg")
    return root


ONE, MANY = "--input_path {bad}/good/face0.png", "--image_dir {bad}/good --output_dir {bad}/out"
EDIT, EDITS = f"{ONE} --prompt x --seed 0", "--src_dir {bad}/good --edit_dir {bad}/out --seed 0 --prompts 0"
BAD_INPUTS = [  # what, script, command, exit status, what the line says
    ("missing", defend, "--input_path {bad}/none.png", 1, "bad/none.png: no such file"),
    ("directory", defend, "--input_path {bad}/good", 1, "bad/good: not a file"),
    ("text", defend, "--input_path {bad}/text.png", 1, "bad/text.png: not a readable image"),
    ("no-images", main_defend, "--image_dir {bad}/texts --output_dir {bad}/out",
        1, "bad/texts: no image files"),
    ("no-directory", main_edit, "--src_dir {bad}/file --edit_dir {bad}/out", 1, "bad/file: not a directory"),
    ("twins", main_defend, "--image_dir {bad}/twins --output_dir {bad}/out", 1, "face0.jpg=face0.png"),
    ("method", defend, f"{ONE} --defend_method magic", 2, "invalid choice: 'magic'"),
    ("above", defend, f"{ONE} --attack_budget 8", 2, "8 in [-1, 1] is 1020/255; for 8/255 give 0.0627"),
    ("no-number", defend, f"{ONE} --step_size 0", 2, "--step_size: '0' is not a number above 0"),
    ("empty-path", defend, "--input_path=", 2, "--input_path: an empty path"),
    ("no-device", defend, f"{ONE} --device cuda:99", 1, "--device cuda:99 can't be used"),
    ("no-device", defend, f"{ONE} --device meta:x", 1, "--device meta:x can't be used"),
    ("no-id", defend, f"{ONE} --model_id=", 1, "--model_id: an empty name"),
    ("no-id", defend, f"{ONE} --judge=", 1, "--judge: an empty name"),
    ("unwritable", defend, f"{ONE} --output_path {{bad}}/file/out.png", 1, "bad/file: is not a directory"),
    ("unwritable", main_defend, "--image_dir {bad}/good --output_dir {bad}/file",
        1, "bad/file: is not a directory"),
    ("model", defend, f"{ONE} --model_id {{bad}}/none", 1, "bad/none' can't be loaded (no such directory)"),
    ("jpg", defend, f"{ONE} --output_path {{bad}}/out.jpg",
        1, "out.jpg: JPEG and other lossy formats would destroy the perturbation; ask for a .png"),
    ("jpg", edit, f"{EDIT} --output_path {{bad}}/out.jpg",
        1, "out.jpg: an edit is measured pixel by pixel, and JPEG and other lossy formats change"),
    ("budgets", main_edit, "--src_dir {bad}/protected --edit_dir {bad}/out", 1, "it holds budget_{B}"),
    ("over-itself", main_defend, "--image_dir {bad}/budget_0.03 --output_dir {bad}", 1, "overwrite the"),
    ("release", main_defend, "--image_dir {bad}/good --output_dir {bad}/release", 1, "but no run.json that"),
    ("release", main_edit, f"{EDITS} --edit_dir {{bad}}/release", 1, "but no run.json that says"),
    ("itself", defend, f"{ONE} --output_path {{bad}}/good/face0.png", 1, "would overwrite the input"),
    ("link", defend, f"{ONE} --output_path {{bad}}/link.png", 1, "would overwrite the input"),
    ("link", edit, f"{EDIT} --output_path {{bad}}/null.png", 1, "null.png: is not a regular file"),
    ("folder", defend, f"{ONE} --output_path {{bad}}/folder.png", 1, "folder.png: is a directory"),
    ("pipe", edit, f"{EDIT} --output_path {{bad}}/pipe.png", 1, "pipe.png: is not a regular file"),
    ("suffix", defend, f"{ONE} --output_path {{bad}}/out", 1, "ask for a .png"),
    ("both", defend, f"{ONE} --compile --checkpointing", 1, "--checkpointing don't go together"),
    ("box-unread", defend, f"{ONE} --defend_method vae --face_box 1,1,9,9", 1, "vae ignores faces"),
    ("no-face", defend, "--input_path {bad}/grey.png --models full", 1, "--face_box"),
    ("box-outside", defend, f"{ONE} --face_box 64,0,80,20",
        1, "face0.png: the face box (64, 0, 80, 20) is outside"),
    ("box-empty", defend, f"{ONE} --face_box 9,9,5,5", 2, "not a box"),
    ("tiny", defend, "--input_path {bad}/good/face0.png --resolution 31", 1, "face0.png"),
    ("steps", edit, f"{EDIT} --model stable-diffusion --strength 0.1", 1, "2 steps at strength 0.1 are less"),
    ("prompts", main_edit, f"{EDITS} --prompts 3,99", 1, "--prompts 99: choose from 0 to 24"),
    ("prompt-file", main_edit, f"{EDITS} --prompt_file {{bad}}/none.txt",
        1, "bad/none.txt: not a readable text"),
    ("prompt-file", main_edit, f"{EDITS} --prompt_file {{bad}}/grey.png", 1, "not a readable text file"),
    ("prompt-file", main_edit, f"{EDITS} --prompt_file {{bad}}/empty.txt", 1, "no instructions in it"),
    ("no-prompt", edit, ONE, 2, "required: --prompt"),
]  # fmt: skip


@pytest.mark.parametrize(("what", "script", "line", "status", "says"), BAD_INPUTS)
def test_bad_input_is_one_line_and_nothing_is_written(call, bad, what, script, line, status, says):
    before = tree(bad)
    done = call(script, line, bad=bad)
    assert done.status == status and not re.search("invalid (?!choice|start byte)", done.err)
    assert len(done.errors) == 1 and says in done.errors[0], done.err
    assert "Traceback" not in done.err and "Error at " not in done.err
    assert tree(bad) == before


def test_defend_as_a_command_from_another_directory(portrait, defend_flags):
    command = [sys.executable, ROOT / "defend.py", *defend_flags, portrait.name, "--defend_method=noise"]
    done = subprocess.run(command, cwd=portrait.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert 1 <= levels(portrait, portrait.with_name("protected_mini_face0.png")) <= 3
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr  # of the libraries'


@pytest.mark.parametrize(("method", "runs_in"), [("cw", torch.float32), ("encoder", torch.bfloat16)])
def test_cw_runs_in_float32(protector, capsys, method, runs_in):
    """And says so where it was asked for something else."""
    tool = protector(f"--defend_method {method} --dtype bf16")
    assert tool.config.load_vae().vae.dtype == runs_in
    assert ("cw runs in fp32" in capsys.readouterr().err) == (method == "cw")
    protector(f"--defend_method {method} --dtype auto")
    assert capsys.readouterr().err == ""


def test_compile_is_for_the_attack_alone(tmp_path, defend_flags, fresh_loaders, monkeypatch, capsys):
    seen: list[str] = []
    note = lambda network, **_: seen.append(type(network).__name__)
    monkeypatch.setattr(torch.nn.Module, "compile", note)
    (source,) = tiny.write_portraits(tmp_path, 1)
    for method, count in (("encoder", 2), ("facelock", 4)):
        line = ["--input_path", str(source), "--defend_method", method, "--compile"]
        assert defend.main([*line, *defend_flags]) == 0
        assert len(seen) == count and seen[:2] == ["Encoder", "Decoder"]
    assert not resolve(defend.settings_of(defend.parse_args([*line, *defend_flags]))).compile


IGNORED = [
    (defend, f"{ONE} --defend_method cw --num_iters 2 --clamp_min=0", "change nothing"),
    (defend, f"{ONE} --defend_method vae --clamp_min=-1 --clamp_max=1", "change nothing"),
    (defend, f"{ONE} --targeted", "--targeted is ignored: facelock has no such knob, unlike encoder, cw, "),
    (main_defend, f"{MANY} --defend_method noise --lr 0.1", "--lr is ignored: noise has no such knob"),
    (main_edit, f"{EDITS} --strength 0.5", "--strength is ignored: instruct-pix2pix has no such knob"),
]


@pytest.mark.parametrize(("script", "line", "told"), IGNORED)
def test_a_flag_that_is_not_read_is_ignored_with_a_warning(call, bad, script, line, told):
    done = call(script, line, bad=bad)
    assert done.status == 0 and done.errors == []
    assert sum(told in warning for warning in done.warnings) == 1
    for path in bad.rglob("run.json"):
        record = json.loads(path.read_text())["arguments"]
        assert not {"strength", "lr", "c", "targeted", "clamp_min", "clamp_max"} & record.keys()


def test_the_report_is_a_table(call, folder, tmp_path):
    """pandas reads it, with names as text; it holds what was said, also of files that were there already."""
    for old, new in (("face0.png", "007.png"), ("face1.png", "=1+1.png"), ("face2.png", "../face2.png")):
        (folder / old).rename(folder / new)
    line = f"--image_dir {folder} --output_dir {tmp_path}/out"
    assert call(main_defend, line).status == 0
    (tmp_path / "face2.png").rename(folder / "face2.png")
    done = call(main_defend, line)
    assert "1 written, 2 there already" in done.out
    table = pd.read_csv(tmp_path / "out/budget_0.03/report.csv", dtype={"name": str}).set_index("name")
    assert list(table.index) == ["'=1+1", "007", "face2"]  # no formula for a spreadsheet
    numbers = ["linf", "psnr"]
    numbers += [f"{who}_{when}" for who in ("recognizer", "judge") for when in ("before", "after")]
    assert list(table) == ["method", "budget", *numbers]
    assert (table["method"] == "facelock").all() and (table["budget"] == 0.03).all()
    row = table.loc["face2"]
    assert f"face2.png: L-infinity {row['linf']:.4f} (budget 0.03), PSNR {row['psnr']:.1f} dB" in done.out
    assert f"recognizer {row['recognizer_before']:.2f} -> {row['recognizer_after']:.2f}" in done.out


def test_each_images_line_is_out_before_the_next_is_begun(folder, tmp_path, defend_flags, monkeypatch):
    """A pipe would keep it back till the end."""
    out, seen = tmp_path / "out.txt", []
    save = Protector.save

    def saved(self, *args, **more):
        seen.append(out.read_text().count("PSNR"))
        return save(self, *args, **more)

    monkeypatch.setattr(Protector, "save", saved)
    with open(out, "w") as file, contextlib.redirect_stdout(file):
        line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method noise"
        assert main_defend.main([*defend_flags, *line.split()]) == 0
    assert seen == [0, 1, 2] and out.read_text().count("PSNR") == 3


def test_control_characters_of_names_do_not_reach_the_terminal(call, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    name = "a\x1b[2J\nb\u202e.png"
    Image.fromarray(tiny.portrait()).save(folder / name)
    (folder / "bad\x1b]0;x\x07.png").write_text("x")
    (folder / "notes\x1b[31m.txt").write_text("x")
    for script, line in (
        (main_defend, f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method noise"),
        (main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/edits --seed 0 --prompts 0"),
    ):
        done = call(script, line)
        assert done.status == 1 and "1 written, 0 there already, 1 failed" in done.out
        for text in (done.out, done.err):
            assert not re.search("\x1b(?!\\[A)|[\x07\u202e]", text), text  # tqdm moves the cursor with \x1b[A
    prompt = ["--prompt", "a\x1bb", "--seed", "0"]
    for script, more in ((defend, ["--defend_method", "noise"]), (edit, prompt)):
        done = call(script, "--input_path", folder / name, *more)
        assert done.status == 0 and "a\\x1b[2J\\nb\\u202e" in done.out
        assert not re.search("\x1b(?!\\[A)", done.out + done.err)


def as_variant(path: Path) -> None:
    path.rename(path.with_suffix(".fp16.safetensors"))


def as_pickle(path: Path) -> None:
    name = "pytorch_model.bin" if path.stem == "model" else f"{path.stem}.bin"
    torch.save(load_file(path), path.with_name(name))
    path.unlink()


def name_what_is_not_there(path: Path) -> None:
    """Has model_index.json name parts, as the published editors' do, that nobody downloaded."""
    index = path.parent.parent / "model_index.json"
    parts = json.loads(index.read_text())
    parts["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    parts["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(parts))


@pytest.mark.parametrize("change", [as_variant, as_pickle, name_what_is_not_there])
def test_an_editor_is_loaded_in_any_of_its_forms_and_quietly(
    call, portrait, tiny_models, tmp_path, caplog, change
):
    line = f"--input_path {portrait} --prompt hat --seed 0 --output_path {tmp_path}"
    assert call(edit, f"{line}/expected.png").status == 0
    for path in shutil.copytree(tiny_models.editor, tmp_path / "editor").glob("*/*.safetensors"):
        change(path)
    loggers = [logging.getLogger(name) for name in ("diffusers", "transformers", "huggingface_hub")]
    for logger in loggers:
        logger.addHandler(caplog.handler)
    done = call(edit, f"{line}/out.png --model_id {tmp_path}/editor")
    for logger in loggers:
        logger.removeHandler(caplog.handler)
    assert done.status == 0 and not caplog.records
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
