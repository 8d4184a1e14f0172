"""What attackers do before an edit (purify.py), and what only looks like protection (cheats.py)."""

from __future__ import annotations

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import cheats
import numpy as np
import purify
import pytest
import tiny
import torch
from PIL import Image, ImageFilter

import main_edit
import utils

CHAINS = [
    "jpeg:75", "blur:5:1.5", "rotate:10", "resize:0.5", "crop:0.9", "noise:8", "vae", "jpeg:75+resize:0.5",
]  # fmt: skip


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny.write_portraits(tmp_path / "in", 3, (48, 64))
    return tmp_path


def run_purify(folder: Path, method: str, *more: str, output: str = "out") -> int:
    flags = f"--input_dir {folder}/in --output_dir {folder}/{output} --method {method}".split()
    return purify.main([*flags, *more])


def pixels_of(folder: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.array(Image.open(path)) for path in sorted(folder.glob("*.png"))}


def apply(method: str, pixels: np.ndarray, stem: str = "x", seed: int = 0) -> np.ndarray:
    return purify.purify(pixels, purify.chain(method), seed, stem)


# ---------------------------------------------------------------------------------------------------------
# purification


@pytest.mark.parametrize("method", CHAINS)
def test_purified_files_keep_their_size_and_can_be_made_again(folder, method, edit_flags):
    flags = edit_flags[:-2] if method == "vae" else []  # without the sampling steps
    assert run_purify(folder, method, *flags) == 0
    assert run_purify(folder, method, *flags, output="again") == 0
    first, again = pixels_of(folder / "out"), pixels_of(folder / "again")
    sources = pixels_of(folder / "in")
    assert list(first) == ["face0", "face1", "face2"]
    for name, pixels in first.items():
        assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, again[name])
        assert not np.array_equal(pixels, sources[name])


def test_jpeg_is_pillows():
    pixels = tiny.portrait((48, 64))
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=60)
    assert np.array_equal(apply("jpeg:60", pixels), np.array(Image.open(buffer)))


def test_blur_is_a_gaussian():
    """A single bright pixel becomes the kernel: weights exp(-d^2 / 2 sigma^2) within 2 pixels."""
    pixels = np.zeros((21, 21, 3), np.uint8)
    pixels[10, 10] = 255
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    found = apply("blur:5:1.5", pixels)[..., 0]
    assert np.abs(found[8:13, 8:13] - 255 * kernel).max() <= 1
    assert found.sum() - found[8:13, 8:13].sum() == 0


def test_noise_has_the_size_that_it_says():
    grey = np.full((64, 64, 3), 128, np.uint8)
    added = apply("noise:8", grey).astype(int) - 128
    assert added.std() == pytest.approx(8, rel=0.05) and abs(added.mean()) < 0.5


def test_source_and_protected_get_the_same_angle_and_noise():
    """And other stems, seeds and places in a chain get others."""
    grey, darker = np.full((64, 64, 3), 128, np.uint8), np.full((64, 64, 3), 120, np.uint8)
    added = apply("noise:8", grey, "a").astype(int) - 128
    assert np.array_equal(apply("noise:8", darker, "a").astype(int) - 120, added)
    assert not np.array_equal(apply("noise:8", grey, "b") - 128, added)
    assert not np.array_equal(apply("noise:8", grey, "a", seed=1) - 128, added)
    white = np.full((64, 64, 3), 255, np.uint8)
    corners = [apply("rotate:10", white, name)[..., 0] == 0 for name in ("a", "a", "b")]
    assert np.array_equal(corners[0], corners[1]) and not np.array_equal(corners[0], corners[2])


def test_angles_stay_within_what_is_said():
    """A horizontal line through the middle leaves the right border at 32 tan(angle)."""
    pixels = np.zeros((65, 65, 3), np.uint8)
    pixels[32] = 255
    angles = []
    for number in range(40):
        line = apply("rotate:10", pixels, str(number))[:, 60, 0].astype(float)
        angles.append(np.degrees(np.arctan2(32 - (line @ np.arange(65)) / line.sum(), 28)))
    assert max(angles) <= 10.5 and min(angles) >= -10.5
    assert max(angles) > 6 and min(angles) < -6


def test_crop_and_resize():
    ramp = np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 4, (64, 1, 3))
    middle = apply("crop:0.5", ramp)[32, :, 0].astype(int)
    assert middle[0] == pytest.approx(64, abs=4) and middle[-1] == pytest.approx(188, abs=4)
    for period, kept in ((2, False), (8, True)):  # half the pixels can show the second
        stripes = np.zeros((64, 64, 3), np.uint8)
        stripes[:, np.arange(64) % period < period // 2] = 255
        spread = float(apply("resize:0.5", stripes)[32, 8:-8].std())
        assert spread > 90 if kept else spread < 12


def test_a_chain_is_its_steps_in_order():
    pixels = tiny.portrait((48, 64))
    assert np.array_equal(apply("jpeg:75+resize:0.5", pixels), apply("resize:0.5", apply("jpeg:75", pixels)))
    assert not np.array_equal(apply("jpeg:75+resize:0.5", pixels), apply("resize:0.5+jpeg:75", pixels))


def test_what_is_no_purification():
    wrong = "jpg:75 jpeg jpeg:96 jpeg:7.5 blur:4:1 blur:5 resize:1 crop:x noise:0 vae:1 + jpeg:75+b"
    for method in ["", *wrong.split()]:
        with pytest.raises(argparse.ArgumentTypeError):
            purify.chain(method)


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("blur:5:1e-308", "blur:K:S: '1e-308' is not a number from 0.1 to 100"),
        ("blur:4:1", "blur:K:S: '4' is not an odd number from 1 to 999"),
        ("blur:5:nan", "a number from 0.1 to 100"),
        ("jpeg:0", "jpeg:Q: '0' is not a whole number from 1 to 95"),
        ("resize:1e-9", "a number from 0.001 to 0.999"),
        ("rotate:1e308", "a number from 0.01 to 180"),
        ("noise:256", "a number from 0.01 to 255"),
        ("crop:0.9:1", "'crop:0.9:1' is not of the form crop:F"),
    ],
)
def test_numbers_of_a_purification_have_ranges(method, says):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(says)):
        purify.chain(method)


def test_purify_refuses_other_arguments_in_the_same_place(folder, capsys):
    assert run_purify(folder, "jpeg:75") == 0
    assert run_purify(folder, "jpeg:60") == 1
    assert "method: 'jpeg:75' there, 'jpeg:60' now" in capsys.readouterr().err
    assert run_purify(folder, "jpeg:75") == 0
    assert "0 written, 3 there already" in capsys.readouterr().out
    assert run_purify(folder, "jpeg:75", output="in") == 1
    assert run_purify(folder, "blur:99:9", output="big") == 1  # no room for that kernel
    record = json.loads((folder / "out/run.json").read_text())
    assert (record["arguments"]["method"], record["seed"]) == ("jpeg:75", 0)
    assert run_purify(folder, "jpeg:75", "--seed", "1") == 1
    shutil.copytree(folder / "in", folder / "foreign")
    assert run_purify(folder, "jpeg:75", output="foreign") == 1
    assert "no run.json that says what made them" in capsys.readouterr().err
    assert run_purify(folder, "jpeg:75", "--resolution", "64", output="new") == 1


def test_purified_files_belong_to_their_sources(folder, capsys):
    assert run_purify(folder, "jpeg:75") == 0
    Image.fromarray(tiny.portrait((48, 64), seed=9)).save(folder / "in/face1.png")
    assert run_purify(folder, "jpeg:75") == 1
    assert "face1.png: its source has changed" in capsys.readouterr().err
    assert run_purify(folder, "jpeg:75", "--overwrite") == 0
    assert "1 written, 2 there already" in capsys.readouterr().out


def test_the_seed_decides_about_noise(folder):
    assert run_purify(folder, "noise:8", output="a") == 0
    assert run_purify(folder, "noise:8", "--seed", "3", output="b") == 0
    assert not np.array_equal(pixels_of(folder / "a")["face0"], pixels_of(folder / "b")["face0"])
    assert np.array_equal(
        pixels_of(folder / "b")["face0"], apply("noise:8", pixels_of(folder / "in")["face0"], "face0", seed=3)
    )


def test_purify_goes_on_past_a_bad_file(folder, capsys):
    (folder / "in/broken.png").write_text("x")
    assert run_purify(folder, "jpeg:75") == 1
    assert "broken.png: not a readable image" in capsys.readouterr().err
    assert len(pixels_of(folder / "out")) == 3


# ---------------------------------------------------------------------------------------------------------
# cheats


@pytest.fixture
def edited(folder, edit_flags) -> Path:
    flags = f"--src_dir {folder}/in --edit_dir {folder}/clean --seed 4 --prompts 0,13".split()
    assert main_edit.main([*edit_flags, *flags]) == 0
    return folder


def run_cheats(folder: Path, flags: list[str], *more: str, output: str = "cheats") -> int:
    given = f"--src_dir {folder}/in --clean_edit_dir {folder}/clean --output_dir {folder}/{output} --seed 4"
    return cheats.main([*flags, *given.split(), *more])


def test_cheats_look_like_edits(edited, edit_flags):
    """In the directories' form, of the edits' size, the same when made again."""
    assert run_cheats(edited, edit_flags, "--shift", "3") == 0
    assert run_cheats(edited, edit_flags, "--shift", "3", output="again") == 0
    found = {path.relative_to(edited / "cheats"): path for path in (edited / "cheats").rglob("*.png")}
    assert len(found) == len(cheats.NAMES) * 2 * 3
    for place, path in found.items():
        edit = np.array(Image.open(edited / "clean" / place.relative_to(place.parts[0])))
        pixels = np.array(Image.open(path))
        assert pixels.shape == edit.shape and not np.array_equal(pixels, edit), place
        assert np.array_equal(pixels, np.array(Image.open(edited / "again" / place)))
    place = Path("seed4/prompt13/face1.png")
    edit = np.array(Image.open(edited / "clean" / place))
    made = {name: np.array(Image.open(edited / "cheats" / name / place)) for name in cheats.NAMES}
    assert np.array_equal(made["mirrored"], edit[:, ::-1])
    assert np.array_equal(made["shifted"][3:, 3:], edit[:-3, :-3])
    assert np.array_equal(made["source"], np.array(Image.open(edited / "in/face1.png")))
    assert np.abs(made["gamma"] - 255 * (edit / 255) ** (1 / 1.5)).max() <= 0.5
    spread = [np.ptp(pixels.astype(float), axis=-1).mean() for pixels in (made["saturated"], edit)]
    assert spread[0] > 1.5 * spread[1]  # of the channels
    of_pillow = Image.fromarray(edit).filter(ImageFilter.GaussianBlur(2))
    assert np.array_equal(made["blurred"], np.array(of_pillow))


def test_reseeded_is_the_edit_with_another_seed(edited, edit_flags):
    assert run_cheats(edited, edit_flags, "--cheats", "reseeded", "--other_seed", "9") == 0
    flags = f"--src_dir {edited}/in --edit_dir {edited}/other --seed 9 --prompts 13".split()
    assert main_edit.main([*edit_flags, *flags]) == 0
    one, other = (
        np.array(Image.open(edited / place))
        for place in ("cheats/reseeded/seed4/prompt13/face0.png", "other/seed9/prompt13/face0.png")
    )
    assert np.array_equal(one, other)
    record = json.loads((edited / "cheats/reseeded/seed4/run.json").read_text())
    assert (record["seed"], record["prompts"]["13"]) == (9, utils.edit_prompts[13])


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--other_seed", "4"], "own noise"),
        (["--prompts", "7"], "prompt7"),
        (["--guidance_scale", "3"], "were made with --guidance_scale 1.0, not 3.0"),
    ],
)
def test_what_cheats_refuse(edited, edit_flags, capsys, flags, says):
    assert run_cheats(edited, edit_flags, *(flag.format(edited) for flag in flags)) == 1
    assert says in capsys.readouterr().err
    assert not (edited / "cheats/reseeded").exists()


def test_cheats_of_other_edits_are_refused(edited, edit_flags, capsys):
    assert run_cheats(edited, edit_flags, "--cheats", "mirrored", "shifted") == 0
    assert run_cheats(edited, edit_flags, "--cheats", "shifted", "--shift", "9") == 1
    shutil.copytree(edited / "clean", edited / "other")
    more = ["--cheats", "mirrored", "--clean_edit_dir", f"{edited}/other"]
    assert run_cheats(edited, edit_flags, *more) == 0  # the same pictures in another place
    (edited / "other/seed4/prompt0/face1.png").write_bytes((edited / "in/face1.png").read_bytes())
    capsys.readouterr()
    assert run_cheats(edited, edit_flags, *more) == 1
    assert "prompt0/face1.png: its source has changed" in capsys.readouterr().err
    (edited / "clean").rename(edited / "cheats/source")
    more = ["--clean_edit_dir", f"{edited}/cheats/source"]
    assert run_cheats(edited, edit_flags, *more) == 1
    assert "would be overwritten" in capsys.readouterr().err


def test_cheats_name_an_edit_that_is_missing(edited, edit_flags, capsys):
    (edited / "clean/seed4/prompt13/face1.png").unlink()
    assert run_cheats(edited, edit_flags) == 1
    assert "face1" in capsys.readouterr().err


def test_noise_depends_on_no_global_state(folder):
    torch.manual_seed(0)
    first = apply("noise:8", tiny.portrait((48, 64)))
    torch.manual_seed(1)
    assert np.array_equal(apply("noise:8", tiny.portrait((48, 64))), first)
