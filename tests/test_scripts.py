"""The four scripts as a person meets them: flags, files, messages, exit status."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import defend
import edit
import main_defend
import main_edit
import utils

ROOT = Path(defend.__file__).resolve().parent
SCRIPTS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("evaluation/*.py"))
    if 'if __name__ == "__main__"' in path.read_text()
)


@pytest.fixture
def call(capsys, defend_flags, edit_flags):
    """Runs a script's main -> status, out, err, and the error lines. `line` is the command, {} filled in."""

    def run(script, line: str, *more, **names) -> SimpleNamespace:
        flags = defend_flags if script in (defend, main_defend) else edit_flags
        given = [word.format(**names) for word in line.split()]
        capsys.readouterr()
        try:
            status = script.main([*flags, *given, *map(str, more)])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        errors = [text for text in re.split(r"[\r\n]+", err) if "error:" in text]
        return SimpleNamespace(status=status, out=out, err=err, errors=errors)

    return run


@pytest.fixture
def face(tmp_path) -> Path:
    (path,) = tiny.write_portraits(tmp_path, 1)
    return path


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


# ---------------------------------------------------------------------------------------------------------
# --help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_torch(script):
    code = (
        "import runpy, sys\n"
        "script = sys.argv[1]\n"
        "sys.argv = [script, '--help']\n"
        "sys.path.insert(0, script.rpartition('/')[0])\n"
        "try: runpy.run_path(script, run_name='__main__')\n"
        "finally: print('LOADED', *sorted({'torch', 'diffusers', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    text, loaded = done.stdout.split("LOADED")
    assert loaded.strip() == ""
    assert text.startswith("usage:") and script.rpartition("/")[2] in text
    assert "default: None" not in text and "==SUPPRESS==" not in text


def test_the_four_scripts_have_help():
    assert {"edit.py", "defend.py", "main_edit.py", "main_defend.py"} <= set(SCRIPTS)


@pytest.mark.parametrize(
    ("script", "line", "defaults"),
    [
        (
            defend,
            "--input_path=a --defend_method=facelock",
            {
                "attack_budget": 0.03,
                "step_size": 0.01,
                "num_iters": 100,
                "seed": 0,
                "model": "instruct-pix2pix",
            },
        ),
        (
            main_defend,
            "--image_dir=a --output_dir=b --defend_method=cw",
            {
                "attack_budget": 0.03,
                "step_size": 0.01,
                "num_iters": 100,
                "seed": 0,
                "models": "full",
                "batch_size": 1,
            },
        ),
        (edit, "--input_path=a --prompt=b", {"seed": -1, "strength": None, "models": "full"}),
        (
            main_edit,
            "--src_dir=a --edit_dir=b",
            {"seed": -1, "strength": None, "prompts": None, "overwrite": False},
        ),
    ],
)
def test_defaults_are_the_releases(script, line, defaults):
    given = vars(script.parse_args(line.split()))
    assert {name: given[name] for name in defaults} == defaults


# ---------------------------------------------------------------------------------------------------------
# what is written


@pytest.mark.parametrize("method", utils.METHOD_NAMES)
@pytest.mark.parametrize(("budget", "allowed"), [(0.008, 1), (0.02, 2), (0.03, 3)])
def test_a_protected_file_differs_and_stays_in_the_budget(call, face, method, budget, allowed):
    done = call(defend, f"--input_path {face} --defend_method {method} --attack_budget {budget}")
    protected = face.with_name("protected_face0.png")
    assert done.status == 0 and done.errors == []
    assert 1 <= levels(face, protected) <= allowed
    found = re.search(r"L-infinity ([\d.]+) \(budget ([\d.]+)\), PSNR ([\d.]+) dB", done.out)
    assert float(found[1]) == pytest.approx(levels(face, protected) * 2 / 255, abs=1e-4)
    assert float(found[2]) == budget and float(found[3]) > 30
    reported = re.search(r"recognizer (-?[\d.]+) -> (-?[\d.]+), judge (-?[\d.]+) -> (-?[\d.]+)", done.out)
    assert (reported is not None) == (method == "facelock")


@pytest.mark.parametrize(
    ("size", "working"),
    [((98, 98), (64, 64)), ((103, 70), (64, 43)), ((187, 161), (64, 55)), ((40, 64), (40, 64))],
)
def test_a_whole_image_is_a_whole_working_image(tmp_path, defend_flags, size, working):
    (path,) = tiny.write_portraits(tmp_path, 1, size)
    args = defend.parse_args([*defend_flags, "--input_path", str(path)])
    assert defend.load_subject(path, args, defend.Tools(args)).boxes == [(0, 0, working[1], working[0])]


@pytest.mark.parametrize(("faces", "count"), [("largest", 1), ("all", 2)])
def test_faces_are_scaled_to_the_working_size(tmp_path, defend_flags, faces, count):
    (path,) = tiny.write_portraits(tmp_path, 1, 128)
    args = defend.parse_args([*defend_flags, "--input_path", str(path), "--faces", faces])
    tools = defend.Tools(args)
    tools.detector = lambda pixels: [(20, 40, 120, 110), (0, 2, 30, 128)]
    assert defend.load_subject(path, args, tools).boxes == [(10, 20, 60, 55), (0, 1, 15, 64)][:count]
    assert defend.load_subject(path, args, tools, (100, 0, 200, 64)).boxes == [(50, 0, 64, 32)]


def test_a_method_loads_only_what_it_needs(call, face, tiny_models):
    (face.parent / "models").mkdir()
    (face.parent / "models" / "vae").symlink_to(tiny_models.editor / "vae")
    nothing = "--recognizer /none --judge /none --lpips /none"
    line = f"--input_path {face} --defend_method encoder {nothing} --model_id {face.parent}/models"
    assert call(defend, line).status == 0
    assert call(defend, f"--input_path {face} --defend_method noise {nothing} --model_id /none").status == 0


def test_a_check_without_weights_says_so_and_keeps_the_file(call, face):
    line = f"--input_path {face} --defend_method noise --check --model_id /none --judge /none"
    done = call(defend, line)
    assert done.status == 0 and "judge not measured" in done.out
    assert (face.parent / f"protected_{face.name}").exists()


def test_check_reports_similarity_for_any_method(call, face):
    done = call(defend, f"--input_path {face} --defend_method vae --check")
    assert re.search(r"recognizer -?[\d.]+ -> -?[\d.]+, judge -?[\d.]+ -> ", done.out)


def test_default_outputs_are_beside_the_input(call, folder):
    call(defend, f"--input_path {folder}/face0.png --defend_method noise")
    done = call(edit, f"--input_path {folder}/face1.png --prompt hat --seed 3")
    names = ["edit_face1.png", "face0.png", "face1.png", "face2.png", "protected_face0.png"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert done.out == f"{folder}/edit_face1.png: 'hat', seed 3\n"


def exif_rotated(path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    Image.fromarray(tiny.portrait((45, 70))).save(path, exif=exif, quality=95)


def sixteen_bit(path: Path) -> None:
    Image.fromarray(np.linspace(0, 65535, 64 * 48).reshape(48, 64).astype(np.uint16)).save(path)


KINDS = {  # name -> (writes it, upright size (W, H))
    "rotated.jpg": (exif_rotated, (45, 70)),
    "palette.png": (lambda path: Image.fromarray(tiny.portrait((45, 70))).quantize(16).save(path), (70, 45)),
    "deep.png": (sixteen_bit, (64, 48)),
    "alpha.png": (
        lambda path: Image.fromarray(
            np.dstack([tiny.portrait(), np.arange(4096).reshape(64, 64) % 256]).astype("u1")
        ).save(path),
        (64, 64),
    ),
    "large.webp": (
        lambda path: Image.fromarray(tiny.portrait((97, 131))).save(path, lossless=True),
        (131, 97),
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_any_image_keeps_its_size_orientation_and_alpha(call, tmp_path, name):
    write, size = KINDS[name]
    source, output, edited = tmp_path / name, tmp_path / "out.png", tmp_path / "edited.png"
    write(source)
    call(defend, f"--input_path {source} --defend_method encoder --output_path {output}")
    call(edit, f"--input_path {source} --prompt hat --seed 0 --output_path {edited}")
    clean = utils.load_image(source)
    for path in (output, edited):
        with Image.open(path) as image:
            assert image.format == "PNG" and image.size == size and not image.getexif()
            assert image.mode == ("RGB" if clean.alpha is None else "RGBA")
            if clean.alpha is not None:
                assert np.array_equal(np.asarray(image)[..., 3], clean.alpha)
    assert 1 <= round(utils.linf(utils.load_image(output).pixels, clean.pixels) * 255 / 2) <= 3


def test_the_alpha_and_the_depth_of_the_inputs_are_what_the_tests_think(tmp_path):
    for name, (write, _) in KINDS.items():
        write(tmp_path / name)
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    assert np.ptp(utils.load_image(tmp_path / "deep.png").pixels) == 255
    assert np.ptp(utils.load_image(tmp_path / "alpha.png").alpha) == 255


def test_img2img_edits_too(call, face, tiny_models):
    kind = f"--model stable-diffusion --model_id {tiny_models.img2img} --num_inference_steps 4"
    outputs = []
    for strength in (0.25, 1.0):
        outputs.append(face.with_name(f"{strength}.png"))
        done = call(
            edit,
            f"{kind} --input_path {face} --prompt hat --seed 0 --strength {strength}",
            "--output_path",
            outputs[-1],
        )
        assert done.status == 0
    assert levels(*outputs) > 0


def test_warning_about_what_mini_models_were_not_made_for(call, face, tmp_path):
    for script, line in (
        (defend, f"--input_path {face} --defend_method noise"),
        (edit, f"--input_path {face} --prompt x --seed 0"),
    ):
        err = call(script, line).err
        assert "warning: the mini models were made for 128x128" in err and "64x64" in err
    (right,) = tiny.write_portraits(tmp_path / "right", 1, 128)
    assert "warning" not in call(defend, f"--input_path {right} --defend_method noise").err


# ---------------------------------------------------------------------------------------------------------
# seeds


@pytest.mark.parametrize("method", ["noise", "encoder", "cw"])
def test_a_defence_is_the_same_for_a_seed_and_another_for_another(call, face, method):
    outputs = []
    for number, seed in enumerate((0, 0, 1)):
        outputs.append(face.with_name(f"out{number}.png"))
        call(
            defend,
            f"--input_path {face} --defend_method {method} --seed {seed}",
            "--output_path",
            outputs[-1],
        )
    first, again, other = (path.read_bytes() for path in outputs)
    assert first == again != other


def test_an_edit_is_the_same_for_a_seed_and_another_for_another(call, face):
    outputs = []
    for number, seed in enumerate((0, 0, 1)):
        outputs.append(face.with_name(f"out{number}.png"))
        call(edit, f"--input_path {face} --prompt hat --seed {seed} --output_path", outputs[-1])
    first, again, other = (path.read_bytes() for path in outputs)
    assert first == again != other


def test_a_drawn_seed_is_printed_and_repeats_the_edit(call, face):
    drawn = call(edit, f"--input_path {face} --prompt hat")  # -1 is the default
    seed = re.search(r"^seed: (\d+)$", drawn.out, re.MULTILINE)[1]
    written = face.with_name("edit_face0.png")
    first = written.read_bytes()
    written.unlink()
    call(edit, f"--input_path {face} --prompt hat --seed {seed}")
    assert written.read_bytes() == first
    assert f"seed {seed}" in drawn.out.splitlines()[-1]


def test_the_start_depends_on_seed_and_name_alone(call, folder, tmp_path):
    def protected(script, line: str, result: Path) -> np.ndarray:
        assert call(script, line).status == 0
        return pixels(result)

    alone = tmp_path / "elsewhere" / "face1.png"
    alone.parent.mkdir()
    alone.write_bytes((folder / "face1.png").read_bytes())
    noise = "--defend_method noise"
    expected = protected(
        main_defend,
        f"{noise} --image_dir {folder} --output_dir {tmp_path}/a",
        tmp_path / "a/budget_0.03/face1.png",
    )
    for found in (
        protected(
            main_defend,
            f"{noise} --image_dir {folder} --output_dir {tmp_path}/b --batch_size 3",
            tmp_path / "b/budget_0.03/face1.png",
        ),
        protected(
            main_defend,
            f"{noise} --image_dir {alone.parent} --output_dir {tmp_path}/c",
            tmp_path / "c/budget_0.03/face1.png",
        ),
        protected(defend, f"{noise} --input_path {alone}", alone.with_name("protected_face1.png")),
    ):
        assert np.array_equal(found, expected)
    renamed = alone.rename(alone.with_name("other.png"))
    other = protected(defend, f"{noise} --input_path {renamed}", alone.with_name("protected_other.png"))
    assert not np.array_equal(other, expected)


# ---------------------------------------------------------------------------------------------------------
# the batch scripts give what the single ones give


@pytest.mark.parametrize("method", ["encoder", "facelock"])
def test_main_defend_gives_what_defend_gives(call, folder, tmp_path, method):
    done = call(main_defend, f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method {method}")
    made = tmp_path / "out" / "budget_0.03"
    assert done.status == 0 and "3 written, 0 there already, 0 failed" in done.out
    found = sorted(path.name for path in made.iterdir())
    assert found == [".lock", "face0.png", "face1.png", "face2.png", "run.json"]
    for name in ("face0", "face2"):
        call(
            defend,
            f"--input_path {folder}/{name}.png --output_path {tmp_path}/{name}.png --defend_method {method}",
        )
        assert np.array_equal(pixels(tmp_path / f"{name}.png"), pixels(made / f"{name}.png"))
    record = json.loads((made / "run.json").read_text())
    assert record["seed"] == 0 and record["arguments"]["defend_method"] == method


def test_main_edit_gives_what_edit_gives(call, folder, tmp_path):
    done = call(main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 5 --prompts 0,3")
    made = tmp_path / "out" / "seed5"
    assert done.status == 0 and "6 written" in done.out
    files = {f"prompt{i}/face{n}.png" for i in (0, 3) for n in range(3)}
    assert set(tree(made)) == files | {".lock", "run.json", "prompt0", "prompt3"}
    call(
        edit,
        f"--input_path {folder}/face1.png --output_path {tmp_path}/single.png --seed 5 --prompt",
        utils.edit_prompts[3],
    )
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
    assert json.loads((made / "run.json").read_text())["prompts"] == {"0": "wear a hat", "1": "be blue"}
    done = call(
        main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 5 --prompts 0"
    )  # another text
    assert done.status == 1 and "wear a hat" in done.errors[0] and len(done.errors) == 1


# ---------------------------------------------------------------------------------------------------------
# resume


def times(directory: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in directory.glob("*.png")}


@pytest.fixture
def finished(call, folder, tmp_path) -> SimpleNamespace:
    """A finished run of main_defend: its directory and the line that made it."""
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method encoder --batch_size 2"
    assert call(main_defend, line).status == 0
    made = tmp_path / "out" / "budget_0.03"
    return SimpleNamespace(line=line, made=made, files=tree(made), times=times(made))


def test_a_second_run_skips(call, finished):
    done = call(main_defend, finished.line, "--batch_size", 3)  # which may differ
    assert done.status == 0 and "0 written, 3 there already" in done.out
    assert times(finished.made) == finished.times


def test_a_resumed_run_makes_the_same_file(call, finished):
    (finished.made / "face1.png").unlink()
    done = call(main_defend, finished.line)
    assert "1 written, 2 there already" in done.out
    assert tree(finished.made) == finished.files
    after = times(finished.made)
    assert {name: after[name] == finished.times[name] for name in after} == {
        "face0.png": True,
        "face1.png": False,
        "face2.png": True,
    }


def test_a_changed_argument_is_refused_and_listed(call, finished):
    done = call(main_defend, finished.line, "--step_size", 0.003, "--overwrite")
    assert done.status == 1 and len(done.errors) == 1
    assert "step_size: 0.01 there, 0.003 now" in done.errors[0] and str(finished.made) in done.errors[0]
    assert tree(finished.made) == finished.files and times(finished.made) == finished.times


@pytest.mark.parametrize(
    ("method", "first", "then"),
    [
        ("encoder", "", "--check --faces all"),
        ("cw", "--num_iters 2", "--num_iters 2 --step_size 0.003"),
        ("noise", "", "--num_iters 7 --step_size 0.003"),
    ],
)
def test_flags_that_the_method_does_not_read_may_differ(call, folder, tmp_path, method, first, then):
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method {method}"
    assert call(main_defend, f"{line} {first}").status == 0
    done = call(main_defend, f"{line} {then}")
    assert done.status == 0 and "0 written, 3 there already" in done.out
    assert call(main_defend, f"{line} {then} --seed 1").status == 1


def test_overwrite_makes_all_again(call, finished):
    assert "3 written" in call(main_defend, finished.line, "--overwrite").out
    after = tree(finished.made)
    assert all(after[name] == finished.files[name] for name in finished.times)
    assert all(time > finished.times[name] for name, time in times(finished.made).items())


def test_main_defend_draws_a_seed_only_for_a_new_directory(call, folder, tmp_path):
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method noise --seed -1"
    drawn = call(main_defend, line)
    seed = int(re.search(r"^seed: (\d+)$", drawn.out, re.MULTILINE)[1])
    assert json.loads((tmp_path / "out/budget_0.03/run.json").read_text())["seed"] == seed
    again = call(main_defend, line)
    assert again.status == 1 and len(again.errors) == 1 and f"--seed {seed}" in again.errors[0]
    assert call(main_defend, line, "--seed", seed).status == 0


def test_main_edit_starts_a_new_folder_for_each_drawn_seed(call, folder, tmp_path):
    line = f"--src_dir {folder} --edit_dir {tmp_path}/out --prompts 0"
    seeds = [re.search(r"^seed: (\d+)$", call(main_edit, line).out, re.MULTILINE)[1] for _ in range(2)]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        f"seed{seed}" for seed in seeds
    )


def test_a_drawn_seed_is_not_one_that_has_a_folder(tmp_path, monkeypatch):
    (tmp_path / "seed5").mkdir()
    drawn = iter([5, 6])
    monkeypatch.setattr(utils, "draw_seed", lambda seed: next(drawn))
    tiny.write_portraits(tmp_path / "in", 1)
    args = main_edit.parse_args(["--src_dir", str(tmp_path / "in"), "--edit_dir", str(tmp_path)])
    assert main_edit.prepare(args)[1] == 6


def test_a_bad_file_among_good_ones(call, folder, tmp_path):
    (folder / "face1.png").write_text("no image")
    (folder / "small.png").write_bytes(b"")
    Image.new("RGB", (64, 8)).save(folder / "thin.png")
    for script, line, made in (
        (
            main_defend,
            f"--image_dir {folder} --output_dir {tmp_path}/out --defend_method encoder",
            "budget_0.03",
        ),
        (main_edit, f"--src_dir {folder} --edit_dir {tmp_path}/out --seed 1 --prompts 2", "seed1/prompt2"),
    ):
        done = call(script, f"{line} --batch_size 4")
        assert done.status == 1 and "2 written, 0 there already, 3 failed" in done.out
        listed = re.findall(r"^  failed: (.*)$", done.err, re.MULTILINE)
        assert [Path(line.split(":")[0]).name for line in listed] == ["face1.png", "small.png", "thin.png"]
        assert "too small" in listed[2] and "Traceback" not in done.err
        assert sorted(path.name for path in (tmp_path / "out" / made).glob("*.png")) == [
            "face0.png",
            "face2.png",
        ]


# ---------------------------------------------------------------------------------------------------------
# bad input: one line, exit status, nothing written


@pytest.fixture
def bad(tmp_path) -> Path:
    """A directory with something wrong of every kind."""
    root = tmp_path / "bad"
    tiny.write_portraits(root / "good", 2)
    Image.new("RGB", (64, 64), "grey").save(root / "grey.png")
    Image.fromarray(tiny.portrait()).save(root / "whole.jpg")
    (root / "cut.jpg").write_bytes((root / "whole.jpg").read_bytes()[:900])
    (root / "text.png").write_text("no image")
    (root / "empty").mkdir()
    (root / "texts").mkdir()
    (root / "texts" / "notes.txt").write_text("hello")
    (root / "file").write_text("not a directory")
    tiny.write_portraits(root / "twins", 1)
    Image.fromarray(tiny.portrait()).save(root / "twins" / "face0.jpg")
    return root


ONE, MANY = "--input_path {bad}/good/face0.png", "--image_dir {bad}/good --output_dir {bad}/out"
EDIT, EDITS = f"{ONE} --prompt x --seed 0", "--src_dir {bad}/good --edit_dir {bad}/out --seed 0 --prompts 0"
BAD_INPUTS = [
    # what, script, command, exit status, what the line says
    ("missing", defend, "--input_path {bad}/none.png", 1, "bad/none.png: no such file"),
    ("missing", edit, "--input_path {bad}/none.png --prompt x", 1, "bad/none.png: no such file"),
    ("directory", defend, "--input_path {bad}/good", 1, "bad/good: not a file"),
    ("text", defend, "--input_path {bad}/text.png", 1, "bad/text.png: not a readable image"),
    ("text", edit, "--input_path {bad}/text.png --prompt x", 1, "bad/text.png: not a readable image"),
    ("truncated", defend, "--input_path {bad}/cut.jpg", 1, "bad/cut.jpg: not a readable image"),
    ("truncated", edit, "--input_path {bad}/cut.jpg --prompt x", 1, "bad/cut.jpg: not a readable image"),
    ("empty", main_defend, "--image_dir {bad}/empty --output_dir {bad}/out", 1, "bad/empty: no image files"),
    ("empty", main_edit, "--src_dir {bad}/empty --edit_dir {bad}/out", 1, "bad/empty: no image files"),
    (
        "no-images",
        main_defend,
        "--image_dir {bad}/texts --output_dir {bad}/out",
        1,
        "bad/texts: no image files",
    ),
    ("no-images", main_edit, "--src_dir {bad}/texts --edit_dir {bad}/out", 1, "bad/texts: no image files"),
    (
        "no-directory",
        main_defend,
        "--image_dir {bad}/none --output_dir {bad}/out",
        1,
        "none: no such directory",
    ),
    ("no-directory", main_edit, "--src_dir {bad}/file --edit_dir {bad}/out", 1, "file: not a directory"),
    ("twins", main_defend, "--image_dir {bad}/twins --output_dir {bad}/out", 1, "face0.jpg=face0.png"),
    ("method", defend, f"{ONE} --defend_method magic", 2, "invalid choice: 'magic'"),
    ("method", main_defend, f"{MANY} --defend_method magic", 2, "invalid choice: 'magic'"),
    ("negative", defend, f"{ONE} --attack_budget -0.03", 2, "--attack_budget"),
    ("low", defend, f"{ONE} --attack_budget 0.005", 2, "0.005 is below 2/255"),
    ("low", main_defend, f"{MANY} --attack_budget 0.005", 2, "0.005 is below 2/255"),
    ("nan", defend, f"{ONE} --attack_budget nan", 2, "--attack_budget"),
    ("iterations", defend, f"{ONE} --num_iters 0", 2, "--num_iters"),
    ("unwritable", defend, f"{ONE} --output_path {{bad}}/file/out.png", 1, "bad/file: is not a directory"),
    ("unwritable", edit, f"{EDIT} --output_path {{bad}}/file/out.png", 1, "bad/file: is not a directory"),
    (
        "unwritable",
        main_defend,
        "--image_dir {bad}/good --output_dir {bad}/file",
        1,
        "bad/file: is not a directory",
    ),
    ("unwritable", main_edit, f"{EDITS} --edit_dir {{bad}}/file", 1, "bad/file: is not a directory"),
    ("model", defend, f"{ONE} --model_id {{bad}}/none", 1, "bad/none' can't be loaded (no such directory)"),
    ("model", edit, f"{EDIT} --model_id {{bad}}/none", 1, "bad/none' can't be loaded (no such directory)"),
    ("model", main_defend, f"{MANY} --model_id {{bad}}/none", 1, "bad/none' can't be loaded"),
    ("model", main_edit, f"{EDITS} --model_id {{bad}}/none", 1, "bad/none' can't be loaded"),
    ("recognizer", defend, f"{ONE} --recognizer {{bad}}/none", 1, "face recogniser"),
    ("lpips", defend, f"{ONE} --lpips {{bad}}/none", 1, "LPIPS"),
    ("device", edit, f"{EDIT} --device warp9", 1, "--device warp9 can't be used"),
    (
        "jpg",
        defend,
        f"{ONE} --output_path {{bad}}/out.jpg",
        1,
        "JPEG compression would destroy the perturbation",
    ),
    ("jpg", edit, f"{EDIT} --output_path {{bad}}/out.jpg", 1, "JPEG"),
    ("itself", defend, f"{ONE} --output_path {{bad}}/good/face0.png", 1, "would overwrite the input"),
    ("c", defend, f"{ONE} --defend_method facelock --c 0.1", 1, "--c is for cw; facelock has no such knob"),
    ("lr", main_defend, f"{MANY} --defend_method vae --lr 0.1", 1, "--lr is for cw; vae has no such knob"),
    ("compile", defend, f"{ONE} --defend_method cw --compile", 1, "--compile is for encoder and vae and"),
    ("both", defend, f"{ONE} --compile --checkpointing", 1, "--checkpointing don't go together"),
    (
        "untargeted",
        defend,
        f"{ONE} --defend_method vae --untargeted",
        1,
        "--untargeted is for encoder and cw; vae",
    ),
    (
        "targeted",
        defend,
        f"{ONE} --defend_method noise --targeted",
        1,
        "--targeted is for encoder and cw; noise",
    ),
    ("no-face", defend, "--input_path {bad}/grey.png --models full", 1, "bad/grey.png: no face found"),
    ("no-face", defend, "--input_path {bad}/grey.png --models full", 1, "--face_box"),
    (
        "box-outside",
        defend,
        f"{ONE} --face_box 64,0,80,20",
        1,
        "face0.png: the face box (64, 0, 80, 20) is outside",
    ),
    ("box-empty", defend, f"{ONE} --face_box 9,9,5,5", 2, "not a box"),
    ("tiny", defend, "--input_path {bad}/good/face0.png --resolution 31", 1, "face0.png"),
    ("tiny", edit, f"{EDIT} --resolution 31", 1, "too small"),
    ("no-editor", edit, f"{EDIT} --model stable-diffusion --model_id=", 1, "no stable-diffusion editor"),
    ("strength", edit, f"{EDIT} --strength 1.5", 2, "--strength"),
    ("strength", edit, f"{EDIT} --strength 0.5", 1, "--strength: instruct-pix2pix has no such knob"),
    ("prompts", main_edit, f"{EDITS} --prompts 3,99", 1, "--prompts 99: only 0 to 24"),
    (
        "prompt-file",
        main_edit,
        f"{EDITS} --prompt_file {{bad}}/none.txt",
        1,
        "bad/none.txt: not a readable text",
    ),
]


@pytest.mark.parametrize(
    ("script", "line", "status", "says"),
    [
        pytest.param(*case, id=f"{script.__name__}-{what}")
        for what, *case in BAD_INPUTS
        for script in case[:1]
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(call, bad, script, line, status, says):
    before = tree(bad)
    done = call(script, line, bad=bad)
    assert done.status == status
    assert len(done.errors) == 1 and says in done.errors[0], done.err
    assert "Traceback" not in done.err and "Error at " not in done.err
    assert tree(bad) == before


def test_a_face_box_makes_up_for_a_face_that_is_not_found(call, bad):
    done = call(defend, "--input_path {bad}/grey.png --models full --face_box 10,10,50,60", bad=bad)
    assert done.status == 0 and (bad / "protected_grey.png").exists()


def test_debug_raises(call, bad):
    with pytest.raises(utils.UserError, match="no such file"):
        call(defend, "--input_path {bad}/none.png --debug", bad=bad)


def test_an_unforeseen_error_is_one_line_too(call, face, monkeypatch):
    monkeypatch.setattr(utils, "save_png", lambda *_: 1 / 0)
    done = call(defend, f"--input_path {face} --defend_method noise")
    assert done.status == 1 and len(done.errors) == 1
    assert "ZeroDivisionError at test_scripts.py:" in done.errors[0] and "--debug" in done.errors[0]


def test_a_missing_judge_ends_nothing(call, folder, tmp_path, monkeypatch):
    line = f"--image_dir {folder} --output_dir {tmp_path}/out --judge {tmp_path}/none"
    done = call(main_defend, line)
    assert done.status == 0 and "3 written" in done.out
    shown = done.out + done.err
    assert len(re.findall(r"recognizer -?[\d.]+ -> -?[\d.]+, judge not measured", shown)) == 3
    assert shown.count("judge not measured: the face recogniser") == 1  # the reason is said once


# ---------------------------------------------------------------------------------------------------------
# as commands


def run(script: str, flags: list[str], *given) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / script, *flags, *map(str, given)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_defend_as_a_command_from_another_directory(face, defend_flags, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("defend.py", defend_flags, "--input_path", face.name)
    assert done.returncode == 0, done.stderr
    assert 1 <= levels(face, face.with_name("protected_face0.png")) <= 3
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr  # of the libraries'


def test_bad_input_as_a_command(tmp_path, edit_flags):
    done = run("edit.py", edit_flags, "--input_path", tmp_path / "none.png", "--prompt", "x")
    assert done.returncode == 1
    assert done.stderr == f"error: {tmp_path}/none.png: no such file\n" and done.stdout == ""


@pytest.mark.parametrize(
    ("method", "dtype", "runs_in", "told"),
    [
        ("cw", "auto", torch.float32, False),
        ("cw", "bf16", torch.float32, True),
        ("encoder", "bf16", torch.bfloat16, False),
    ],
)
def test_cw_runs_in_float32(defend_flags, capsys, method, dtype, runs_in, told):
    line = ["--input_path", "x", "--defend_method", method, "--dtype", dtype]
    tools = defend.Tools(defend.parse_args([*line, *defend_flags]))
    assert (tools.dtype, tools.vae.vae.dtype) == (runs_in, runs_in)
    assert ("cw runs in fp32" in capsys.readouterr().err) is told


def test_compile_reaches_the_method(tmp_path, defend_flags, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda function, **more: seen.append(more) or function)
    (source,) = tiny.write_portraits(tmp_path, 1)
    line = ["--input_path", str(source), "--defend_method", "encoder", "--compile"]
    assert defend.main([*line, *defend_flags]) == 0
    assert seen == [{"fullgraph": True, "dynamic": False}]
