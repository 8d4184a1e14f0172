"""evaluation/purify.py: what attackers do before an edit, and the same done to edits."""

import argparse
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import main_edit
import utils
from evaluation import purify

CHAINS = ["jpeg:75", "blur:5:1.5", "rotate:10", "resize:0.5", "crop:0.9", "noise:8", "palette:16", "vae"]
CHAINS += ["denoise:0.3", "restore"]


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


@pytest.mark.parametrize("method", CHAINS)
def test_purified_files_keep_their_size_and_can_be_made_again(folder, method, edit_flags):
    with_editor = method.partition(":")[0] in purify.OF_THE_EDITOR
    flags = edit_flags[:-2] if with_editor else []  # without the sampling steps
    (folder / "in/face2.png").unlink()
    assert run_purify(folder, method, *flags) == 0
    assert run_purify(folder, method, *flags, output="again") == 0
    first, again = pixels_of(folder / "out"), pixels_of(folder / "again")
    sources = pixels_of(folder / "in")
    assert list(first) == ["face0", "face1"]
    for name, pixels in first.items():
        assert pixels.shape == (48, 64, 3) and pixels.dtype == np.uint8
        assert np.array_equal(pixels, again[name])
        assert not np.array_equal(pixels, sources[name])


def test_blur_is_a_gaussian():
    """A single bright pixel becomes the kernel: weights exp(-d^2 / 2 sigma^2) within 2 pixels."""
    pixels = np.zeros((21, 21, 3), np.uint8)
    pixels[10, 10] = 255
    weights = np.exp(-(np.arange(-2, 3) ** 2) / (2 * 1.5**2))
    kernel = np.outer(weights, weights) / weights.sum() ** 2
    found = apply("blur:5:1.5", pixels)[..., 0]
    assert np.abs(found[8:13, 8:13] - 255 * kernel).max() <= 1
    assert found.sum() - found[8:13, 8:13].sum() == 0


def test_source_and_protected_get_the_same_angle_and_noise():
    """And other stems, seeds and places in a chain get others."""
    grey, darker = np.full((64, 64, 3), 128, np.uint8), np.full((64, 64, 3), 120, np.uint8)
    torch.manual_seed(1)  # no global state has a say
    added = apply("noise:8", grey, "a").astype(int) - 128
    torch.manual_seed(0)
    assert added.std() == pytest.approx(8, rel=0.05) and abs(added.mean()) < 0.5
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
    pixels, buffer = tiny.portrait((48, 64)), io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=75)
    compressed = np.array(Image.open(buffer))
    assert np.array_equal(apply("jpeg:75+resize:0.5", pixels), apply("resize:0.5", compressed))
    assert not np.array_equal(apply("jpeg:75+resize:0.5", pixels), apply("resize:0.5+jpeg:75", pixels))


@pytest.mark.parametrize(
    ("method", "says"),
    [
        ("", "'' is none of jpeg, blur"),
        ("jpg:75", "'jpg' is none of"),
        ("jpeg", "'jpeg' is not of the form jpeg:Q"),
        ("crop:0.9:1", "'crop:0.9:1' is not of the form crop:F"),
        ("jpeg:75+b", "'b' is none of"),
        ("jpeg:7.5", "a whole number from 1 to 95"),
        ("jpeg:0", "jpeg:Q: '0' is not a whole number from 1 to 95"),
        ("blur:4:1", "blur:K:S: '4' is not an odd number from 1 to 999"),
        ("blur:5:1e-308", "blur:K:S: '1e-308' is not a number from 0.1 to 100"),
        ("resize:1e-9", "a number from 0.001 to 0.999"),
        ("rotate:1e308", "a number from 0.01 to 180"),
        ("noise:256", "a number from 0.01 to 255"),
        ("shift:0", "a whole number from 1 to 999"),
        ("gamma:x", "a number from 0.1 to 10"),
    ],
)
def test_what_is_no_purification(method, says):
    with pytest.raises(argparse.ArgumentTypeError, match=re.escape(says)):
        purify.chain(method)


def test_purify_refuses_other_arguments_in_the_same_place(folder, capsys):
    shutil.copytree(folder / "in", folder / "foreign")
    assert run_purify(folder, "jpeg:75") == 0
    record = json.loads((folder / "out/run.json").read_text())
    assert (record["arguments"]["method"], record["seed"]) == ("jpeg:75", 0)
    for method, flags, output, says in (
        ("jpeg:60", [], "out", "method: 'jpeg:75' there, 'jpeg:60' now"),
        ("jpeg:75", ["--seed", "1"], "out", "seed: 0 there, 1 now"),
        ("jpeg:75", [], "in", "would overwrite the inputs"),
        ("jpeg:75", [], "foreign", "no run.json that says what made them"),
        ("jpeg:75", ["--resolution", "64"], "new", "are for 'vae'"),
        ("vae", ["--vae", "me/a", "me/b"], "new", "goes through one autoencoder"),
        ("blur:99:9", [], "big", "the image's side is only 48 px"),
    ):
        assert run_purify(folder, method, *flags, output=output) == 1
        assert says in capsys.readouterr().err
    assert run_purify(folder, "jpeg:75") == 0
    assert "0 written, 3 there already" in capsys.readouterr().out
    Image.fromarray(tiny.portrait((48, 64), seed=9)).save(folder / "in/face1.png")
    assert run_purify(folder, "jpeg:75") == 1
    assert "face1.png: its source has changed" in capsys.readouterr().err
    assert run_purify(folder, "jpeg:75", "--overwrite") == 0
    assert "1 written, 2 there already" in capsys.readouterr().out


def test_the_seed_decides_about_noise_and_a_bad_file_stops_nothing(folder, capsys):
    (folder / "in/broken.png").write_text("x")
    assert run_purify(folder, "noise:8", "--seed", "3") == 1
    assert "broken.png: not a readable image" in capsys.readouterr().err
    (folder / "in/broken.png").unlink()
    sources, found = pixels_of(folder / "in"), pixels_of(folder / "out")
    assert len(found) == 3
    assert np.array_equal(found["face0"], apply("noise:8", sources["face0"], "face0", seed=3))


def test_purified_edits_keep_their_layout_and_instructions_and_belong_to_their_edits(
    folder, edit_flags, capsys
):
    flags = f"--src_dir {folder}/in --edit_dir {folder}/clean --seed 4 --prompts 0,13".split()
    assert main_edit.main([*edit_flags, *flags]) == 0
    shutil.copytree(folder / "clean/seed4", folder / "clean/seed5")
    line = f"--input_dir {folder}/clean --output_dir {folder}/out --method shift:3".split()
    assert purify.main(line) == 0
    places = {path.relative_to(folder / "clean") for path in (folder / "clean").rglob("*.png")}
    assert {path.relative_to(folder / "out") for path in (folder / "out").rglob("*.png")} == places
    for place in places:
        edit, purified = (np.array(Image.open(folder / name / place)) for name in ("clean", "out"))
        assert np.array_equal(purified, apply("shift:3", edit))
    record = json.loads((folder / "out/seed4/run.json").read_text())
    assert record["prompts"] == {number: utils.edit_prompts[int(number)] for number in ("0", "13")}
    assert purify.main(line) == 0 and "0 written, 6 there already" in capsys.readouterr().out
    (folder / "clean/seed4/prompt0/face1.png").write_bytes((folder / "in/face1.png").read_bytes())
    assert purify.main(line) == 1
    assert "prompt0/face1.png: its source has changed" in capsys.readouterr().err


def test_what_keeps_the_person():
    """The person is still there in each: a metric that rewards one of them can be gamed."""
    pixels = tiny.portrait((48, 64))
    assert np.array_equal(apply("mirror", pixels), pixels[:, ::-1])
    shifted = apply("shift:3", pixels)
    assert np.array_equal(shifted[3:, 3:], pixels[:-3, :-3])
    assert (shifted[:3, 3:] == pixels[0, :-3]).all() and shifted.shape == pixels.shape
    assert (apply("shift:999", pixels) == pixels[0, 0]).all()
    assert np.abs(apply("gamma:1.5", pixels) - 255 * (pixels / 255) ** (1 / 1.5)).max() <= 0.5
    pairs = (apply("saturate:2", pixels), pixels)
    colour = [np.ptp(picture.astype(float), axis=-1).mean() for picture in pairs]
    assert colour[0] > 1.5 * colour[1]
    assert np.ptp(apply("saturate:0", pixels), axis=-1).max() == 0
