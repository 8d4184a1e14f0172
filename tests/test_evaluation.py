"""Evaluation: finding and pairing edits, the metrics, the tables, the figure."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import eval_all
import eval_clip_i
import eval_clip_s
import eval_facial
import eval_lpips
import eval_psnr
import eval_ssim
import figure
import numpy as np
import pairing
import pandas as pd
import pytest
import scoring
import tables
import tiny
import torch
import views
from PIL import Image
from scipy import stats

import utils
from images import load_image, to_tensor
from models.clip import Clip, load_clip
from models.config import resolve
from models.perceptual import load_perceptual
from models.recognizers import Recognizer, Strangers, load_recognizer

ROOT = Path(__file__).resolve().parent.parent

NAMES = ("anna", "ben", "cleo")


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def shifted(pixels: np.ndarray, levels: int) -> np.ndarray:
    """All pixels `levels` away, without clipping."""
    return np.where(pixels > 127, pixels - levels, pixels + levels).astype(np.uint8)


@pytest.fixture
def world(tmp_path, monkeypatch) -> Path:
    """portraits/, edits/clean and edits/facelock/budget_{0.02,0.03}, prompts 0 and 3, seed 5; run in out/."""
    for number, name in enumerate(NAMES):
        source = tiny.portrait(32, seed=number)
        write(tmp_path / "portraits" / f"{name}.png", source)
        for prompt in (0, 3):
            place = Path("seed5") / f"prompt{prompt}" / f"{name}.png"
            write(tmp_path / "edits/clean" / place, source)
            for levels, folder in ((1 + number, "budget_0.02"), (8, "budget_0.03")):
                write(tmp_path / "edits/facelock" / folder / place, shifted(source, levels + prompt))
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(tables, "FEWEST", 2)  # so that three images have an interval
    monkeypatch.setattr(views, "FaceDetector", tiny.WholeImage)
    return tmp_path


def psnr_args(world: Path, *more: str) -> list[str]:
    edits = world / "edits"
    return f"--clean_edit_dir {edits}/clean --defend_edit_dirs {edits}/facelock --seed 5".split() + [*more]


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def level_psnr(levels: float) -> float:
    """PSNR of two 8-bit images that differ by `levels` everywhere."""
    return 20 * math.log10(255 / levels)


# ---------------------------------------------------------------------------------------------------------
# PSNR and its table


def test_psnr_of_known_differences():
    a = torch.zeros(3, 3, 8, 8)
    b = torch.stack([a[0], a[0] + 0.2, a[0] - 2 / 255])
    values = eval_psnr.psnr(b, a)
    assert values.shape == (3,)
    assert math.isinf(values[0])
    assert values[1].item() == pytest.approx(20.0, abs=1e-4)
    assert values[2].item() == pytest.approx(level_psnr(1), abs=1e-3)


def test_psnr_table(world, capsys):
    assert eval_psnr.main(psnr_args(world, "--per_image", "each.csv")) == 0
    rows = table(Path("psnr_metric.csv"))
    assert list(rows[0]) == ["method", "prompt0", "prompt3", "mean", "ci_low", "ci_high", "n", "n_inf"]
    facelock = world / "edits/facelock"
    assert [row["method"] for row in rows] == [f"{facelock}/budget_0.02", f"{facelock}/budget_0.03"]
    of_images = [(level_psnr(1 + i) + level_psnr(4 + i)) / 2 for i in range(3)]
    first, second = rows
    assert float(first["prompt0"]) == pytest.approx(np.mean([level_psnr(1 + i) for i in range(3)]), abs=1e-3)
    assert float(first["mean"]) == pytest.approx(np.mean(of_images), abs=1e-3)
    assert min(of_images) - 1e-3 <= float(first["ci_low"]) < float(first["mean"]) < float(first["ci_high"])
    assert (first["n"], first["n_inf"]) == ("3", "0")
    # three equal images: nothing to resample
    assert (second["ci_low"], second["ci_high"], second["n"]) == ("", "", "3")
    each = table(Path("each.csv"))
    assert len(each) == 2 * 2 * 3
    assert set(each[0]) == {"method", "seed", "prompt", "name", "value"}
    assert "budget_0.02" in capsys.readouterr().out


def test_identical_edits_are_counted_and_left_out(world):
    write(world / "edits/facelock/budget_0.02/seed5/prompt0/anna.png", tiny.portrait(32, seed=0))
    assert eval_psnr.main(psnr_args(world, "--prompts", "0", "--output", "t.csv")) == 0
    row = table(Path("t.csv"))[0]
    assert (row["n"], row["n_inf"]) == ("2", "1")
    assert float(row["mean"]) == pytest.approx((level_psnr(2) + level_psnr(3)) / 2, abs=1e-3)


@pytest.mark.parametrize("given", ["edits/facelock/budget_0.03", "edits/facelock/budget_0.03/seed5"])
def test_a_directory_may_be_given_in_several_ways(world, given):
    args = psnr_args(world)
    args[args.index("--defend_edit_dirs") + 1] = str(world / given)
    assert eval_psnr.main(args) == 0
    (row,) = table(Path("psnr_metric.csv"))
    assert row["method"] == str(world / given)
    assert float(row["prompt0"]) == pytest.approx(level_psnr(8), abs=1e-3)


def test_the_clean_edits_must_be_one_directory(world, capsys):
    args = psnr_args(world)
    args[args.index("--clean_edit_dir") + 1] = str(world / "edits/facelock")
    assert eval_psnr.main(args) == 1
    assert "which are the clean edits?" in capsys.readouterr().err


def test_pairing_is_by_stem(world):
    """A renamed file is paired by its name even where sorting would put it elsewhere,
    and by stem, not suffix.
    """
    for directory in ("edits/clean", "edits/facelock/budget_0.02", "edits/facelock/budget_0.03"):
        folder = world / directory / "seed5/prompt0"
        suffix = ".png" if directory == "edits/clean" else ".bmp"
        Image.open(folder / "anna.png").save(folder / f"zoe{suffix}")
        (folder / "anna.png").unlink()
    assert eval_psnr.main(psnr_args(world, "--prompts", "0", "--per_image", "each.csv")) == 0
    values = {row["name"]: float(row["value"]) for row in table(Path("each.csv"))[:3]}
    assert values["zoe"] == pytest.approx(level_psnr(1), abs=1e-3)


@pytest.mark.parametrize(
    ("break_it", "flags", "says"),
    [
        (lambda w: (w / "edits/facelock/budget_0.03/seed5/prompt3/ben.png").unlink(), [], ["prompt3", "ben"]),
        (lambda w: (w / "edits/clean/seed5/prompt0/cleo.png").unlink(), [], ["clean/seed5/prompt0", "cleo"]),
        (lambda w: None, ["--prompts", "0,9"], ["prompt9", "clean/seed5"]),
        (lambda w: write(w / "edits/clean/seed5/prompt0/ben.png", tiny.portrait(40)), [], ["40x40", "32x32"]),
        (lambda w: (w / "edits/clean/seed5").rename(w / "edits/clean/seed6"), [], ["no seed5"]),
        (
            lambda w: Image.open(w / "edits/clean/seed5/prompt0/ben.png").save(
                w / "edits/clean/seed5/prompt0/ben.bmp"
            ),
            [],
            ["ben.bmp=ben.png", "same stem"],
        ),
        (lambda w: None, ["--baseline", "vae"], ["--baseline vae", "budget_0.02"]),
        (lambda w: None, ["--baseline", "facelock"], ["2 rows"]),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(world, capsys, break_it, flags, says):
    break_it(world)
    assert eval_psnr.main(psnr_args(world, *flags)) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith("error:") and error.count("\n") == 0
    assert all(text in error for text in says), error
    assert not list(Path().iterdir())


def test_common_scores_what_all_have_and_names_the_rest(world, capsys):
    (world / "edits/facelock/budget_0.03/seed5/prompt3/ben.png").unlink()
    assert eval_psnr.main(psnr_args(world, "--common")) == 0
    assert [row["n"] for row in table(Path("psnr_metric.csv"))] == ["2", "2"]
    assert "ben" in capsys.readouterr().err


def test_a_damaged_edit_is_left_out_of_every_row_alike(world, capsys):
    (world / "edits/facelock/budget_0.03/seed5/prompt3/ben.png").write_text("x")
    assert eval_psnr.main(psnr_args(world, "--per_image", "each.csv")) == 1
    error = capsys.readouterr().err
    assert f"damaged: {world}/edits/facelock/budget_0.03/seed5/prompt3/ben.png: not a" in error
    assert "1 of 6 edits are left out of every row" in error
    each = table(Path("each.csv"))
    assert len(each) == 2 * 5
    assert not [row for row in each if (row["prompt"], row["name"]) == ("3", "ben")]
    assert [row["n"] for row in table(Path("psnr_metric.csv"))] == ["3", "3"]


def test_nothing_but_damaged_edits_is_an_error(world, capsys):
    for path in (world / "edits/clean/seed5").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    assert eval_psnr.main(psnr_args(world)) == 1
    assert "nothing could be scored" in capsys.readouterr().err
    assert not Path("psnr_metric.csv").exists()


def test_the_clean_edits_may_lie_beside_the_others(world):
    edits = world / "edits"
    (edits / "facelock/budget_0.03").rename(edits / "vae")
    args = f"--clean_edit_dir {edits}/clean --defend_edit_dirs {edits} --seed 5".split()
    assert eval_psnr.main(args) == 0
    rows = [row["method"] for row in table(Path("psnr_metric.csv"))]
    assert rows == [f"{edits}/facelock/budget_0.02", f"{edits}/vae"]
    args[args.index(str(edits))] = str(edits / "clean")  # asked for, it is compared with itself
    assert eval_psnr.main(args) == 0
    (row,) = table(Path("psnr_metric.csv"))
    assert (row["mean"], row["n"], row["n_inf"]) == ("", "0", "6")


def test_a_directory_called_clean_is_no_clean_row(world, all_args, monkeypatch):
    (world / "edits/facelock/budget_0.03").rename(world / "edits/facelock/clean")
    monkeypatch.chdir(world / "edits/facelock")
    args = list(all_args)
    args[args.index("--defend_edit_dirs") + 1] = "clean"
    assert eval_all.main([*args, "--output", "t.csv"]) == 0
    first, second = table(Path("t.csv"))
    assert (first["method"], first["psnr"], second["method"]) == ("clean", "", "./clean")
    assert float(second["psnr"]) < 40 and first["facial"] != second["facial"]


def test_a_directory_named_twice_is_one_row(world):
    args = psnr_args(world, "--prompts", "0")
    place = f"{world}/edits/facelock"
    args[args.index("--defend_edit_dirs") + 1 : args.index("--seed")] = [
        place, f"{place}/budget_0.02/seed5", f"{place}/../facelock"
    ]  # fmt: skip
    assert eval_psnr.main(args) == 0
    assert len(table(Path("psnr_metric.csv"))) == 2


def test_rows_are_found_two_levels_below_and_no_further(world, capsys):
    args = psnr_args(world)
    place = args.index("--defend_edit_dirs") + 1
    args[place] = str(world / "edits")
    assert eval_psnr.main(args) == 0
    rows = [row["method"] for row in table(Path("psnr_metric.csv"))]
    assert rows == [f"{world}/edits/facelock/budget_{budget}" for budget in ("0.02", "0.03")]
    args[place] = str(world)
    (world / "edits/clean").rename(world / "clean")
    args[args.index("--clean_edit_dir") + 1] = str(world / "clean")
    assert eval_psnr.main(args) == 1
    assert "no edits in it but the clean ones" in capsys.readouterr().err
    args[place] = str(world / "portraits")
    assert eval_psnr.main(args) == 1
    assert "portraits: no seed5 in it or in its sub-directories" in capsys.readouterr().err


def test_several_seeds_are_one_mean(world, capsys):
    for directory, levels in (("edits/clean", 0), ("edits/facelock/budget_0.02", 4)):
        for prompt in (0, 3):
            for number, name in enumerate(NAMES):
                place = f"{directory}/seed6/prompt{prompt}/{name}.png"
                write(world / place, shifted(tiny.portrait(32, seed=number), levels))
    args = psnr_args(world, "--prompts", "0", "--output", "t.csv")
    args[args.index("--defend_edit_dirs") + 1] += "/budget_0.02"
    args.insert(args.index("5") + 1, "6")
    assert eval_psnr.main(args) == 0
    (row,) = table(Path("t.csv"))
    of_images = [(level_psnr(1 + i) + level_psnr(4)) / 2 for i in range(3)]
    assert float(row["mean"]) == pytest.approx(np.mean(of_images), abs=1e-3)
    (world / "edits/facelock/budget_0.02/seed6/prompt0").rename(world / "elsewhere")
    assert eval_psnr.main(args) == 1
    assert "budget_0.02/seed6: prompt0" in capsys.readouterr().err
    (world / "edits/facelock/budget_0.02/seed6").rename(world / "seed6")
    args[args.index("--defend_edit_dirs") + 1] = str(world / "edits/facelock")
    assert eval_psnr.main(args) == 1
    error = capsys.readouterr().err
    assert "budget_0.02: no seed6 (there are seed5)" in error and "budget_0.03: no seed6" in error
    args.remove("6")
    args[args.index("5")] = "7"
    assert eval_psnr.main(args) == 1


def test_the_baseline_is_compared_in_pairs(world, capsys):
    assert eval_psnr.main(psnr_args(world, "--baseline", "budget_0.03", "--prompts", "0")) == 0
    first, second = table(Path("psnr_metric.csv"))
    expected = np.mean([level_psnr(1 + i) - level_psnr(8) for i in range(3)])
    assert float(first["diff"]) == pytest.approx(expected, abs=1e-3)
    assert float(first["diff_low"]) < float(first["diff"]) < float(first["diff_high"])
    assert (first["diff_n"], second["diff"]) == ("3", "")
    assert f"{expected:+.3f}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_table_is_the_same_in_every_process(world):
    """Whatever order sets of names have there."""
    for number, name in enumerate("abcdefgh"):
        for prompt in (0, 3):
            place = Path("seed5") / f"prompt{prompt}" / f"{name}.png"
            source = tiny.portrait(32, seed=number)
            write(world / "edits/clean" / place, source)
            write(world / "edits/facelock/budget_0.02" / place, shifted(source, 1 + number))
            write(world / "edits/facelock/budget_0.03" / place, shifted(source, 9 - number))
    tables = []
    for seed in ("1", "2"):
        out = world / f"{seed}.csv"
        args = psnr_args(world, "--output", str(out), "--baseline", "budget_0.03")
        command = [sys.executable, ROOT / "evaluation/eval_psnr.py", *args]
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(command, env=environment, check=True, capture_output=True)
        tables.append(out.read_text())
    assert tables[0] == tables[1]


def test_differences_are_of_the_pairs_that_both_have():
    found = tables.differences(
        pd.concat(
            [values("x", a=[1.0], b=[5.0], c=[math.inf]), values("base", a=[3.0], c=[1.0])], ignore_index=True
        ),
        "base",
    )
    (line,) = found.itertuples()
    assert (line.Index, line.mean, line.n) == (("x", "psnr"), -2.0, 1)


def test_an_instruction_must_be_the_same_in_every_row(world, capsys):
    record = {"seed": 5, "arguments": {"guidance_scale": 7.5}, "prompts": {"0": "Turn it red"}}
    places = [world / "edits" / name / "seed5/run.json" for name in ("clean", "facelock/budget_0.03")]
    places[0].write_text(json.dumps(record))
    places[1].write_text(json.dumps(record | {"arguments": {"guidance_scale": 1.0}}))
    assert eval_psnr.main(psnr_args(world)) == 0
    warning = capsys.readouterr().err
    assert "--guidance_scale was 7.5" in warning and "1.0 for" in warning
    places[1].write_text(json.dumps(record | {"prompts": {"0": "Turn it blue"}}))
    assert eval_psnr.main(psnr_args(world)) == 1
    error = capsys.readouterr().err
    assert "Turn it red" in error and "Turn it blue" in error
    assert eval_psnr.main(psnr_args(world, "--prompts", "3")) == 0  # 0 isn't asked for
    (world / "own.txt").write_text("Turn it green\n")
    assert eval_psnr.main(psnr_args(world, "--prompt_file", str(world / "own.txt"))) == 1
    assert "Turn it green" in capsys.readouterr().err
    for broken in ({"prompts": ["a"]}, {"prompts": {"first": "a"}}):
        places[1].write_text(json.dumps(record | broken))
        assert eval_psnr.main(psnr_args(world)) == 1
        assert "not a record of a run (its prompts are " in capsys.readouterr().err


def test_every_seed_has_its_record(world, capsys):
    """The second seed's texts are compared, too."""
    for name in ("clean", "facelock/budget_0.02"):
        shutil.copytree(world / "edits" / name / "seed5", world / "edits" / name / "seed6")
    for seed, text in ((5, "a"), (6, "b")):
        record = {"seed": seed, "arguments": {}, "prompts": {"0": text}}
        (world / f"edits/clean/seed{seed}/run.json").write_text(json.dumps(record))
    args = psnr_args(world)
    args.insert(args.index("5") + 1, "6")
    args[args.index("--defend_edit_dirs") + 1] += "/budget_0.02"
    assert eval_psnr.main(args) == 1
    assert "prompt0 is 'a'" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# the other metrics


@pytest.fixture(scope="module")
def real_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Two bundled portraits and a photograph, and the same with noise: (3, 3, 96, 96)."""
    generator = np.random.default_rng(0)
    assets = ROOT / "assets/portraits"
    files = [*sorted((assets / "mini").glob("*.png"))[:2], assets / "astronaut.png"]
    images = np.stack([load_image(path).pixels[:96, :96] for path in files])
    noisy = np.clip(images + generator.normal(0, [[[[4]]], [[[12]]], [[[30]]]], images.shape), 0, 255)
    return to_tensor(images), to_tensor(noisy.round().astype(np.uint8))


def test_psnr_agrees_with_torchmetrics(real_pairs):
    from torchmetrics.image import PeakSignalNoiseRatio

    images, noisy = real_pairs
    found = eval_psnr.psnr(noisy, images)
    for k in range(len(images)):
        unit = (noisy[k : k + 1] + 1) / 2, (images[k : k + 1] + 1) / 2
        assert found[k] == pytest.approx(PeakSignalNoiseRatio(data_range=1.0)(*unit).item(), abs=1e-3)


def test_ssim_is_that_of_the_formula(real_pairs):
    """Wang et al. 2004 on [0, 1], in float64: windows that lie inside the image, as in the release."""
    offsets = np.arange(-5, 6)
    line = np.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.from_numpy(np.outer(line, line) / line.sum() ** 2)[None, None]

    def windowed(pixels: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.conv2d(pixels[:, None], window)[:, 0]  # no border

    a, b = ((batch.double().flatten(0, 1) + 1) / 2 for batch in real_pairs)  # (B * 3, H, W)
    mean_a, mean_b = windowed(a), windowed(b)
    var_a, var_b = windowed(a * a) - mean_a**2, windowed(b * b) - mean_b**2
    covariance = windowed(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    map_ = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    map_ /= (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    expected = map_.view(len(real_pairs[0]), -1).mean(dim=1)
    assert eval_ssim.ssim(real_pairs[1], real_pairs[0]).tolist() == pytest.approx(
        expected.tolist(), abs=1e-10
    )
    assert 0.1 < expected.min() and expected.max() < 0.99


def test_ssim_of_known_pairs():
    image = to_tensor(tiny.portrait(32))
    assert eval_ssim.ssim(image, image).item() == pytest.approx(1.0)
    a, b = torch.full((1, 3, 16, 16), -0.2), torch.full((1, 3, 16, 16), 0.4)  # in [0, 1]: 0.4 and 0.7
    expected = (2 * 0.4 * 0.7 + 1e-4) / (0.4**2 + 0.7**2 + 1e-4)  # of constant images, C1 = 0.01^2
    assert eval_ssim.ssim(a, b).item() == pytest.approx(expected, abs=1e-6)


def test_images_that_are_too_small_for_a_metric_are_named(world, capsys):
    for path in world.rglob("edits/*/**/ben.png"):
        write(path, tiny.portrait(10))
    assert eval_psnr.main(psnr_args(world)) == 0
    assert eval_ssim.main(psnr_args(world)) == 1
    assert "ben.png is 10x10; sides of at least 11 px" in capsys.readouterr().err


def test_lpips_is_that_of_the_library(world, tiny_models, real_pairs):
    network = load_perceptual(str(tiny_models.perceptual), torch.device("cpu"), torch.float32)
    images, noisy = real_pairs
    values = eval_lpips.lpips_distance(network, noisy, images)
    assert values.tolist() == pytest.approx([network(a, b).item() for a, b in zip(noisy, images)], rel=1e-4)
    assert eval_lpips.lpips_distance(network, images, images).tolist() == [0, 0, 0]
    flags = ["--models", "mini", "--lpips", str(tiny_models.perceptual), "--device", "cpu"]
    assert eval_lpips.main(psnr_args(world, *flags)) == 0
    (_, row) = table(Path("lpips_metric.csv"))
    assert float(row["mean"]) > 0 and "n_inf" not in row


def test_clip_metrics_by_hand():
    """Edits and sources in a plane, the instruction along the first axis."""
    edits = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0], [1.0, 1.0 + 1e-7]])
    sources = torch.tensor([[0.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0], [0.0, 1.0]])
    assert eval_clip_i.clip_i(edits, sources).tolist() == pytest.approx([4 / 5, 0.5**0.5, 1.0, 1.0])
    assert eval_clip_s.clip_s(edits, sources, texts).tolist() == pytest.approx([3 / 13**0.5, -1.0, 1.0, 0.0])


@pytest.fixture
def clip_args(world, tiny_models) -> list[str]:
    return (
        f"--src_dir {world}/portraits --clean_edit_dir {world}/edits/clean "
        f"--defend_edit_dirs {world}/edits/facelock --seed 5 --models mini --device cpu "
        f"--clip_id {tiny_models.clip}"
    ).split()


def test_clip_scripts(world, clip_args, tiny_models):
    assert eval_clip_i.main([*clip_args, "--per_image", "i.csv"]) == 0
    assert eval_clip_s.main([*clip_args, "--per_image", "s.csv"]) == 0
    rows = table(Path("clip_i_metric.csv"))
    assert rows[0]["method"] == "clean"
    assert float(rows[0]["mean"]) == pytest.approx(1, abs=1e-5)  # the clean edits here are the sources
    assert len(table(Path("clip_s_metric.csv"))) == 3
    clip = load_clip(str(tiny_models.clip), torch.device("cpu"), torch.float32)
    source = tiny.portrait(32, seed=1)
    edit = np.array(Image.open(world / "edits/facelock/budget_0.03/seed5/prompt3/ben.png"))
    a, b = clip.embed_images(np.stack([source, edit]))
    text = clip.embed_texts([utils.edit_prompts[3]])[0]
    expected = {"i": torch.cosine_similarity(a, b, dim=0), "s": torch.cosine_similarity(b - a, text, dim=0)}
    for metric, value in expected.items():
        (row,) = [
            row
            for row in table(Path(f"{metric}.csv"))
            if row["method"].endswith("0.03") and row["name"] == "ben" and row["prompt"] == "3"
        ]
        assert float(row["value"]) == pytest.approx(value.item(), abs=1e-4)


def test_clip_s_scores_the_instructions_that_were_used(world, clip_args, capsys):
    """In the edits' run.json, in --prompt_file, or else the paper's; an unknown one is no number at all."""
    values = []
    own = world / "own.txt"
    own.write_text("a\nb\nc\nLet there be light\n")
    for case in ("paper", "file", "record"):
        if case == "record":
            record = {"seed": 5, "arguments": {}, "prompts": {"0": "a", "3": "Let there be light"}}
            (world / "edits/clean/seed5/run.json").write_text(json.dumps(record))
        flags = ["--prompt_file", str(own)] if case == "file" else []
        assert eval_clip_s.main([*clip_args, *flags]) == 0
        values.append(table(Path("clip_s_metric.csv"))[2]["prompt3"])
    assert values[0] != values[1] == values[2]
    own.write_text("a\n")
    (world / "edits/clean/seed5/run.json").unlink()
    capsys.readouterr()
    assert eval_clip_s.main([*clip_args, "--prompt_file", str(own)]) == 1
    assert "prompt3" in capsys.readouterr().err


def test_a_missing_source_is_named(world, clip_args, capsys):
    (world / "portraits/cleo.png").unlink()
    assert eval_clip_i.main(clip_args) == 1
    assert f"cleo in {world}/portraits" in capsys.readouterr().err


def test_edits_of_several_sizes_have_their_source_in_each(world, clip_args, capsys):
    """A size of its own for prompt 3, in all rows alike; in a single row it is an error."""
    (row,) = (world / "edits/facelock/budget_0.03").glob("*")
    for path in (row / "prompt3").iterdir():
        Image.open(path).resize((40, 48)).save(path)
    flags = ["--per_image", "each.csv"]
    assert eval_clip_i.main([*clip_args, *flags]) == 1
    assert "is 40x48, but" in capsys.readouterr().err
    without_clean = list(clip_args)
    del without_clean[2:4]
    assert eval_clip_i.main([*without_clean, *flags]) == 1
    assert "is 40x48, but" in capsys.readouterr().err
    for path in (world / "edits").rglob("prompt3/*.png"):
        Image.open(path).resize((40, 48)).save(path)
    assert eval_clip_i.main([*clip_args, *flags]) == 0
    assert len(table(Path("each.csv"))) == 18


def test_sources_of_another_size_are_brought_to_the_edits(world, clip_args):
    assert eval_clip_i.main(clip_args) == 0
    before = [float(row["mean"]) for row in table(Path("clip_i_metric.csv"))]
    for name in NAMES:
        path = world / f"portraits/{name}.png"
        Image.open(path).resize((64, 64), Image.Resampling.NEAREST).save(path.with_suffix(".bmp"))
        path.unlink()
    assert eval_clip_i.main(clip_args) == 0
    after = [float(row["mean"]) for row in table(Path("clip_i_metric.csv"))]
    assert after == pytest.approx(before, abs=0.02) and after != before


# ---------------------------------------------------------------------------------------------------------
# all at once


@pytest.fixture
def all_args(clip_args, tiny_models) -> list[str]:
    more = {name: str(getattr(tiny_models, name)) for name in ("recognizer", "judge")}
    more["lpips"] = str(tiny_models.perceptual)
    return [*clip_args, *(part for name, path in more.items() for part in (f"--{name}", path))]


def test_eval_all_says_what_the_single_scripts_say(world, all_args, capsys):
    assert eval_all.main([*all_args, "--per_image", "each.csv"]) == 0
    shown = capsys.readouterr().out
    text = Path("all_metric.md").read_text()
    assert text.strip() in shown
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    titles = [[cell.strip() for cell in head.strip("|").split("|")] for head in heads]
    panel = ["left, hardest judge ↓", "recognised, any judge ↓", "identified (rank-1), any judge ↓"]
    others = ["no face (FDFR)", "CLIP-S ↓", "PSNR ↓", "SSIM ↓", "LPIPS ↑", "CLIP-I ↓"]
    of_judge = [f"{what}, judge ↓" for what in ("FR", "left", "recognised", "identified (rank-1)")]
    of_attacked = ["FR ↓", "recognised ↓", "identified (rank-1) ↓"]
    assert titles == [["method", *some, "n"] for some in (panel + others, of_judge, of_attacked)]
    assert "intervals are approximate" in text
    together = table(Path("all_metric.csv"))
    assert [row["method"].split("/")[-1] for row in together] == ["clean", "budget_0.02", "budget_0.03"]
    assert (together[0]["psnr"], together[1]["psnr_n_inf"]) == ("", "0")

    def flags(*names: str) -> list[str]:
        cut = list(all_args)
        for name in ("--src_dir", "--clip_id", "--lpips", "--recognizer", "--judge", "--models", "--device"):
            if name not in names:
                del cut[cut.index(name) : cut.index(name) + 2]
        return cut

    loads = ("--models", "--device")
    faces = flags("--src_dir", "--recognizer", "--judge", *loads)
    singles = [
        ("psnr", eval_psnr, flags()),
        ("ssim", eval_ssim, flags()),
        ("lpips", eval_lpips, flags("--lpips", *loads)),
        ("clip_s", eval_clip_s, flags("--src_dir", "--clip_id", *loads)),
        ("clip_i", eval_clip_i, flags("--src_dir", "--clip_id", *loads)),
        ("facial", eval_facial, [*faces, "--by", "recognizer"]),
        ("facial_judge", eval_facial, [*faces, "--by", "judge"]),
        ("identified_judge", eval_facial, [*faces, "--by", "judge", "--what", "identified"]),
        ("left", eval_facial, [*faces, "--by", "judge", "--what", "left"]),
    ]
    for metric, script, argv in singles:
        assert script.main(argv) == 0
        single = {row["method"]: row for row in table(Path(f"{metric}_metric.csv"))}
        for row in together:
            if row["method"] in single:
                own = single[row["method"]]
                for ours, theirs in ((metric, "mean"), (f"{metric}_low", "ci_low"), (f"{metric}_n", "n")):
                    assert row[ours] == own[theirs] or float(row[ours]) == pytest.approx(
                        float(own[theirs]), abs=2e-5
                    )
    each = table(Path("each.csv"))
    assert len(each) == 3 * 2 * 3
    assert {metric.name for metric in eval_all.METRICS} < {*each[0]} > {"left", "facial_judge", "facial"}
    for row in together:
        mine = [float(line["facial"]) for line in each if line["method"] == row["method"]]
        assert np.mean(mine) == pytest.approx(float(row["facial"]), abs=2e-6)


def test_eval_all_reads_and_embeds_every_file_once(world, all_args, monkeypatch):
    decoded, embedded = [], {"clip": 0, "faces": 0}

    def counted(path):
        decoded.append(path)
        return load_image(path)

    def embed_images(self, images, embed=Clip.embed_images):
        embedded["clip"] += len(images)
        return embed(self, images)

    def embed(self, images, boxes, embed=Recognizer.embed):
        embedded["faces"] += len(images)
        return embed(self, images, boxes)

    monkeypatch.setattr(scoring, "load_image", counted)
    monkeypatch.setattr(Clip, "embed_images", embed_images)
    monkeypatch.setattr(Recognizer, "embed", embed)
    assert eval_all.main(all_args) == 0
    files = [*(world / "portraits").rglob("*.png"), *(world / "edits").rglob("*.png")]
    assert sorted(decoded) == sorted(files)
    assert embedded == {"clip": len(files), "faces": 2 * len(files)}  # by the recogniser and by the judge


def test_batch_size_order_and_suffixes_change_nothing(world, all_args, monkeypatch):
    assert eval_all.main([*all_args, "--per_image", "a.csv", "--batch_size", "1"]) == 0
    for path in (world / "edits/facelock").rglob("*.png"):
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    for path in (world / "portraits").iterdir():
        Image.open(path).save(path.with_suffix(".tif"))
        path.unlink()
    listed = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(listed(self))))
    assert eval_all.main([*all_args, "--per_image", "b.csv", "--batch_size", "4"]) == 0
    for one, other in zip(table(Path("a.csv")), table(Path("b.csv")), strict=True):
        for name, value in one.items():
            assert other[name] == value or float(other[name]) == pytest.approx(float(value), abs=1e-5)


def test_a_damaged_source_is_left_out_of_every_metric(world, all_args, capsys):
    (world / "portraits/ben.png").write_text("x")
    assert eval_all.main(all_args) == 1
    assert "portraits/ben.png" in capsys.readouterr().err
    for row in table(Path("all_metric.csv")):
        assert {value for name, value in row.items() if name.endswith("_n")} <= {"2", ""}


def test_eval_all_tells_how_visible_a_protection_is(world, all_args, capsys):
    for levels, folder in ((3, "budget_0.03"), (2, "budget_0.02")):
        for number, name in enumerate(NAMES):
            protected = shifted(tiny.portrait(32, seed=number), levels)
            write(world / "protected/facelock" / folder / f"{name}.png", protected)
    flags = ["--protected_dirs", f"{world}/protected/facelock", "--baseline", "clean", "--output", "o/t.csv"]
    assert eval_all.main([*all_args, *flags]) == 0
    first, second = table(Path("o/t_protected.csv"))
    assert first["method"].endswith("facelock/budget_0.02")
    assert [float(row["linf"]) for row in (first, second)] == pytest.approx([4 / 255, 6 / 255], rel=1e-5)
    assert float(first["psnr"]) == pytest.approx(level_psnr(2), abs=1e-3)
    lines = table(Path("o/t_minus_baseline.csv"))
    assert len(lines) == 2 and float(lines[1]["facial"]) < 0
    text = Path("o/t.md").read_text()
    assert "minus clean, in pairs" in text and "protected images against their sources" in text
    assert eval_all.main([*all_args, "--output", "o/t.csv"]) == 0  # nothing of the earlier one is left
    assert sorted(path.name for path in Path("o").iterdir()) == [".facelock.jsonl", "t.csv", "t.md"]
    assert "o/t_protected.csv: an earlier run's, removed" in capsys.readouterr().out
    (world / "protected/facelock/budget_0.03/ben.png").write_text("x")
    capsys.readouterr()
    assert eval_all.main([*all_args, *flags]) == 1  # and the rest is there
    assert "budget_0.03/ben.png: not a readable image" in capsys.readouterr().err
    assert [row["linf_n"] for row in table(Path("o/t_protected.csv"))] == ["2", "2"]
    assert {row["facial_n"] for row in table(Path("o/t.csv"))} == {"3"}
    write(world / "protected/facelock/budget_0.03/ben.png", tiny.portrait(40))
    assert eval_all.main([*all_args, *flags]) == 1
    assert "is 40x40, but" in capsys.readouterr().err
    (world / "protected/facelock/budget_0.02/ben.png").unlink()
    assert eval_all.main([*all_args, *flags]) == 1
    assert "ben in" in capsys.readouterr().err


def test_outputs_that_cannot_be_are_refused_before_any_work(world, all_args, monkeypatch, capsys):
    monkeypatch.setattr(eval_all, "score", lambda *args: pytest.fail("worked"))
    (world / "out/folder").mkdir()
    for flags, says in (
        (["--output", "folder"], "is a directory"),
        (["--output", "t.md"], "is written as .csv"),
        (["--per_image", "folder"], "is a directory"),
        (["--per_image", "all_metric.csv"], "overwrite the other"),
        (["--per_image", "all_metric.md"], "is written as .csv"),
        (["--output", f"{world}/portraits/ben.png/t.csv"], "is not a directory"),
    ):
        assert eval_all.main([*all_args, *flags]) == 1
        assert says in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# statistics


def values(row: str = "m", metric: str = "psnr", **of_names: list[float]) -> pd.DataFrame:
    """Values of prompts 0, 1, ... by name."""
    lines = [(row, 0, i, name, metric, v) for name, found in of_names.items() for i, v in enumerate(found)]
    return pd.DataFrame(lines, columns=["method", "seed", "prompt", "name", "metric", "value"])


def test_the_mean_is_over_images_not_over_edits():
    (mean,) = tables.means(values(a=[1.0, 1.0, 1.0], b=[3.0])).itertuples()
    assert (mean.mean, mean.n) == (2.0, 2)


def test_the_interval_of_a_simple_sample_is_the_textbook_one():
    """Of 400 normal values the bootstrap interval is that of the normal distribution, mean +- 1.96 s / 20."""
    sample = np.random.default_rng(1).normal(3, 2, size=400)
    low, high = tables.interval(sample.tolist())
    half = stats.norm.ppf(0.975) * sample.std(ddof=1) / 20
    assert low == pytest.approx(sample.mean() - half, abs=0.03 * half)
    assert high == pytest.approx(sample.mean() + half, abs=0.03 * half)


def test_the_interval_covers_about_as_often_as_it_says():
    """Of 120 samples of 40 normal values, the 95 % interval misses the true mean in about 6."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(120):
        low, high = tables.interval(generator.normal(size=40).tolist())
        missed += not low <= 0 <= high
    assert 2 <= missed <= 15


def test_the_interval_is_bca():
    """That of a skewed sample leans the way its tail does, more than the percentile interval."""
    sample = np.random.default_rng(3).lognormal(sigma=1.2, size=30)
    low, high = tables.interval(sample.tolist())
    plain = stats.bootstrap(
        (sample,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(0)
    ).confidence_interval
    assert high > plain.high + 0.05 * (plain.high - plain.low) and low > plain.low


def test_thirty_images_are_enough_and_five_the_fewest():
    assert tables.about_intervals([30, 31]) == ""
    assert tables.about_intervals([29, 30]) == "fewer than 30 images, the intervals are approximate"
    assert tables.about_intervals([4, 4]) == "fewer than 5 images, no intervals"
    assert tables.about_intervals([4, 5]).count("fewer than") == 2


def test_no_interval_for_fewer_than_five_values_or_equal_ones():
    for samples in ([], [1.0], [1.0, 2.0, 3.0, 4.0], [2.0] * 9, [0.1 + 0.2, *[0.3] * 5]):
        assert all(math.isnan(end) for end in tables.interval(samples)), samples
    assert not any(math.isnan(end) for end in tables.interval([1.0, 2.0, 3.0, 4.0, 5.0]))


def test_intervals_are_those_of_all_resamples_at_once():
    """In batches, for the memory's sake, with the same numbers."""
    sample = np.random.default_rng(2).lognormal(size=333)
    whole = stats.bootstrap((sample,), np.mean, n_resamples=9999, method="BCa", rng=np.random.default_rng(0))
    assert tables.interval(sample.tolist()) == pytest.approx(tuple(whole.confidence_interval), rel=1e-12)


def test_small_values_keep_their_digits_on_the_screen():
    known = {0.5: "0.500", 0.000123456: "0.000123", 0.0003: "0.000300", 0.0: "0.000", 1e-5: "1.00e-05"}
    assert {value: tables.shown(value) for value in known} == known
    assert (tables.shown(-0.0004, 3, "+"), tables.shown(33.333, 2)) == ("-0.000400", "33.33")
    assert (tables.shown(math.nan), tables.shown(0.004, 2)) == ("-", "0.00400")


# ---------------------------------------------------------------------------------------------------------
# FR


@pytest.fixture
def facial_args(world, tiny_models) -> list[str]:
    return (
        f"--src_dir {world}/portraits --clean_edit_dir {world}/edits/clean "
        f"--defend_edit_dirs {world}/edits/facelock --seed 5 --models mini --device cpu "
        f"--recognizer {tiny_models.recognizer} --judge {tiny_models.judge}"
    ).split()


def test_fr_is_the_cosine_to_the_source(world, facial_args, tiny_models):
    assert eval_facial.main([*facial_args, "--by", "recognizer", "--per_image", "each.csv"]) == 0
    rows = table(Path("facial_metric.csv"))
    assert rows[0]["method"] == "clean"
    assert float(rows[0]["mean"]) == pytest.approx(1.0, abs=1e-5)  # the clean edits here are the sources
    recognizer = load_recognizer(str(tiny_models.recognizer), torch.device("cpu"), torch.float32)
    place = "edits/facelock/budget_0.03/seed5/prompt3/ben.png"
    a, b = (
        recognizer.embed(
            torch.from_numpy(np.array(Image.open(world / path))).permute(2, 0, 1)[None] / 127.5 - 1,
            [[(0, 0, 32, 32)]],
        )[0]
        for path in ("portraits/ben.png", place)
    )
    (value,) = [
        float(row["value"])
        for row in table(Path("each.csv"))
        if row["method"].endswith("0.03") and row["name"] == "ben" and row["prompt"] == "3"
    ]
    assert value == pytest.approx((a @ b).item(), abs=1e-4)
    assert value < 0.99999


def test_the_judge_has_a_file_and_values_of_its_own(facial_args):
    assert eval_facial.main([*facial_args, "--by", "recognizer"]) == 0
    assert eval_facial.main(facial_args) == 0  # --judge says whose
    recognizer, judge = table(Path("facial_metric.csv")), table(Path("facial_judge_metric.csv"))
    assert recognizer[1]["mean"] != judge[1]["mean"]


class FacesInBrightImages(tiny.WholeImage):
    """A detector that finds a face, the upper left corner, in bright images only."""

    def __init__(self, threshold: float = 100) -> None:
        self.threshold = threshold

    def __call__(self, pixels):
        return [(0, 0, 16, 16), (0, 0, 4, 4)] if pixels.mean() > self.threshold else []


class MeanColour:
    """A recogniser whose embedding is the mean colour in the box, in [0, 2]."""

    def __init__(self) -> None:
        self.boxes, self.strangers = [], Strangers()

    def embed(self, images, boxes):
        self.boxes += [box for (box,) in boxes]
        crops = [image[:, y0:y1, x0:x1] for image, ((x0, y0, x1, y1),) in zip(images, boxes, strict=True)]
        return torch.stack([crop.mean(dim=(1, 2)) + 1 for crop in crops])


def test_recognised_is_found_and_above_the_threshold():
    edits, sources = torch.tensor([[1.0, 0.0]] * 3 + [[0.6, 0.8]]), torch.tensor([[1.0, 0.0]] * 4)
    sources[2] = torch.nan  # a source without a face
    undetected = torch.tensor([0.0, 1.0, 0.0, 0.0])
    found = eval_facial.recognised(edits, sources, 0.7, undetected)
    assert found.nan_to_num(-1).tolist() == [1, 0, -1, 0]
    assert eval_facial.recognised(edits, sources, 0.5, undetected).nan_to_num(-1).tolist() == [1, 0, -1, 1]
    assert eval_facial.recognised(edits, sources, None, undetected).isnan().all()


def test_identified_is_nearest_to_ones_own_portrait():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    own = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    edits = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.8], [0.9, 0.1]])
    sources = torch.ones(4, 2)
    sources[3] = torch.nan
    found = eval_facial.identified(edits, sources, gallery, own)
    assert found.nan_to_num(-1).tolist() == [1, 0, 1, -1]


def test_a_gallery_makes_it_harder_to_be_identified(world, facial_args, tmp_path):
    """Strangers who look like the edits come between an edit and its source."""
    flags = [*facial_args, "--by", "recognizer", "--what", "identified", "--output", "identified.csv"]
    assert eval_facial.main(flags) == 0
    alone = [float(row["mean"]) for row in table(Path("identified.csv"))]
    for place, path in enumerate(sorted((world / "edits/facelock").rglob("*.png"))):
        write(tmp_path / "strangers" / f"stranger{place}.png", np.asarray(Image.open(path)))
    assert eval_facial.main([*flags, "--gallery_dir", str(tmp_path / "strangers")]) == 0
    rows = table(Path("identified.csv"))
    assert alone[0] == 1 and [float(row["mean"]) for row in rows if "facelock" in row["method"]] == [0.0, 0.0]


def test_an_edit_without_a_face_gets_its_sources_box_and_is_counted(capsys):
    recognizer = MeanColour()
    view = views.FaceView({"judge": recognizer}, FacesInBrightImages(), torch.device("cpu"))
    view.add_source("x", np.full((32, 32, 3), 200, np.uint8))
    edits = np.stack([np.full((32, 32, 3), level, np.uint8) for level in (10, 180)])
    key = pairing.Key(0, 0, "x")
    found = view(edits, [key, key])
    assert found["undetected"].tolist() == [1, 0]
    metric = eval_facial.metric_of("left", "judge", "")
    found["face:judge:strangers"] = 0.0
    similarity = metric.function(*(found[need] for need in metric.needs))
    grey = view.people["judge", "x", (32, 32)]
    assert similarity.tolist() == pytest.approx([float(edit @ grey) for edit in found["face:judge:edits"]])
    assert recognizer.boxes == [(0, 0, 16, 16)] * 3  # the largest face, and the source's
    scores = scoring.Scores([eval_facial.NO_FACE], values(metric="no_face", x=[1.0, 0.0]), [], [], 2, 0)
    assert scores.report() == 0
    assert "m: no face was found in 1 of 2 edits" in capsys.readouterr().out


def test_a_source_without_a_face_is_named_and_the_rest_is_scored(
    world, facial_args, all_args, monkeypatch, capsys
):
    """`cleo` is darkened in source and edits."""
    for path in world.rglob("cleo.png"):
        write(path, tiny.portrait(32, seed=2) // 8)
    monkeypatch.setattr(views, "FaceDetector", lambda device: FacesInBrightImages(60))
    assert eval_all.main([*all_args, "--per_image", "each.csv"]) == 1
    assert "cleo" in capsys.readouterr().err
    with_faces = [row["name"] for row in table(Path("each.csv")) if row["facial"]]
    assert set(with_faces) == {"anna", "ben"} and len(table(Path("each.csv"))) == 18
    facial_args += ["--by", "recognizer"]
    assert eval_facial.main([*facial_args, "--per_image", "each.csv"]) == 1
    assert "cleo" in capsys.readouterr().err
    assert {row["name"] for row in table(Path("each.csv"))} == {"anna", "ben"}
    assert [row["n"] for row in table(Path("facial_metric.csv"))] == ["2", "2", "2"]
    monkeypatch.setattr(views, "FaceDetector", lambda device: FacesInBrightImages(300))
    assert eval_facial.main(facial_args) == 1
    assert "nothing could be scored: no face found in the source" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# the panel


def test_left_is_the_same_scale_for_all_judges_and_the_panels_is_the_highest(world, facial_args, tiny_models):
    other = str(tiny_models.recognizer)
    cut = facial_args[: facial_args.index("--recognizer")]
    flags = [*cut, "--recognizer", "vggface2", "--judge", str(tiny_models.judge), other]
    assert eval_facial.main([*flags, "--per_image", "each.csv"]) == 0  # the attacked one isn't loaded
    each = pd.read_csv("each.csv")
    assert list(each)[4:] == ["left", "facial_judge", "facial_recognizer"]
    on_scale = (each[["facial_judge", "facial_recognizer"]] - 0.25) / 0.75  # tiny.py's strangers
    np.testing.assert_allclose(each["left"], on_scale.max(axis=1), atol=1e-5)
    assert (on_scale["facial_judge"] - on_scale["facial_recognizer"]).abs().max() > 1e-3
    means = pd.read_csv("left_metric.csv")["mean"]
    np.testing.assert_allclose(means, each.groupby("method", sort=False)["left"].mean(), atol=1e-5)
    assert Path("facial_judge_metric.csv").exists() and Path("facial_recognizer_metric.csv").exists()
    assert eval_facial.main([*flags, "--what", "identified", "--output", "rank.csv"]) == 0
    names = ["rank_identified_by_any.csv", "rank_identified_judge.csv", "rank_identified_recognizer.csv"]
    of_any, *of_judges = (pd.read_csv(name)["mean"] for name in names)
    assert (of_any >= np.maximum(*of_judges) - 1e-9).all()


def test_by_any_leaves_out_who_cannot_say():
    def said(own, shared):
        return own + shared

    highest = eval_facial.by_any(said, n_judges=2, width=1)
    one, two = torch.tensor([0.1, torch.nan, torch.nan]), torch.tensor([0.2, 0.5, torch.nan])
    found = highest(one, two, torch.tensor([1.0, 1.0, 1.0]))
    assert found.nan_to_num(-1).tolist() == pytest.approx([1.2, 1.5, -1])
    unknown = eval_facial.left(torch.ones(2, 3), torch.ones(2, 3), None)
    assert unknown.isnan().all()


def test_a_judge_that_was_trained_here_counts_only_if_it_is_alone():
    def of(*judges):
        return resolve(models="mini", judge=judges, device="cpu")

    bundled = "assets/mini/judge" if Path("assets").exists() else str(ROOT / "assets/mini/judge")
    assert eval_facial.counted(of()) == ["dlib"]
    assert eval_facial.counted(of(bundled)) == ["judge"]
    assert eval_facial.counted(of("dlib", bundled, "vggface2")) == ["dlib", "vggface2"]
    groups = eval_facial.groups(of())
    (panel, *_) = groups[""]
    assert panel.name == "left" and all(":dlib:" in need for need in panel.needs)
    assert [title.split(",")[0] for title in list(groups)[1:]] == ["judge judge", "judge dlib", "recognizer"]


def test_an_attacked_recogniser_is_no_judge(facial_args, tiny_models, capsys):
    flags = [*facial_args, "--recognizer", str(tiny_models.judge)]
    assert eval_facial.main(flags) == 1
    assert "the attack sees it, so that it is no judge" in capsys.readouterr().err


def test_people_are_compared_with_their_other_photos(world, facial_args, tiny_models, tmp_path):
    """NAME/* and NAME.*: FR is the mean cosine, and the gallery holds people, not sources."""
    others = tmp_path / "others"
    photos = {"anna": ["anna/1", "anna/2"], "ben": ["ben"], "cleo": ["cleo/x"]}
    for number, name in enumerate(file for files in photos.values() for file in files):
        write(others / f"{name}.png", tiny.portrait(48, seed=20 + number))
    flags = [*facial_args, "--by", "recognizer", "--reference_dir", str(others), "--per_image", "each.csv"]
    assert eval_facial.main(flags) == 0
    recognizer = load_recognizer(str(tiny_models.recognizer), torch.device("cpu"), torch.float32)

    def embed(path):
        pixels = to_tensor(np.asarray(Image.open(path)))
        return recognizer.embed(pixels, [[(0, 0, pixels.shape[3], pixels.shape[2])]])[0]

    each = pd.read_csv("each.csv").query("method == 'clean' and prompt == 3").set_index("name")["value"]
    for name, files in photos.items():
        edit = embed(world / f"edits/clean/seed5/prompt3/{name}.png")
        cosines = [float(edit @ embed(others / f"{file}.png")) for file in files]
        assert each[name] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert each.max() < 0.999  # the clean edits are the sources, which don't count
    for path in (world / "edits").rglob("ben.png"):
        write(path, tiny.portrait(48, seed=22)[:32, :32])
    assert eval_facial.main([*flags, "--what", "identified"]) == 0


@pytest.mark.parametrize("copied", [False, True])
def test_somebody_without_another_photo_is_named(world, facial_args, tmp_path, capsys, copied):
    for name in ("anna", "ben", *(["cleo"] if copied else [])):
        write(tmp_path / "others" / f"{name}.png", tiny.portrait(48, seed=9))
    if copied:  # the source itself is no other photo
        shutil.copy(world / "portraits/cleo.png", tmp_path / "others/cleo.png")
    assert eval_facial.main([*facial_args, "--reference_dir", str(tmp_path / "others")]) == 1
    assert "no other photo of cleo (NAME.* or NAME/*)" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------
# as a command


@pytest.mark.slow
def test_the_scripts_run_in_their_folder_and_above_it(world):
    edits = world / "edits"
    tables = []
    for place, script in ((ROOT, "evaluation/eval_ssim.py"), (ROOT / "evaluation", "eval_ssim.py")):
        out = world / f"{len(tables)}.csv"
        flags = f"--clean_edit_dir {edits}/clean --defend_edit_dirs {edits}/facelock --seed 5 --output {out}"
        command = [sys.executable, script, *flags.split()]
        run = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        tables.append(out.read_text())
    assert tables[0] == tables[1] and len(tables[0].splitlines()) == 3


# ---------------------------------------------------------------------------------------------------------
# the figure


def grid_args(world: Path, *more: str) -> list[str]:
    return (
        f"grid --src_dir {world}/portraits --protected_dirs {world}/protected "
        f"--clean_edit_dir {world}/edits/clean --defend_edit_dirs {world}/edits/facelock/budget_0.03 --seed 5"
    ).split() + [*more]


def test_the_grid_shows_what_it_says(world, monkeypatch):
    for number, name in enumerate(NAMES):
        write(world / "protected" / f"{name}.png", shifted(tiny.portrait(32, seed=number), 2))
    seen = {}

    def record(cells, labels, columns, draw=figure.draw):
        seen.update(cells=cells, labels=labels, columns=columns)
        return draw(cells, labels, columns)

    monkeypatch.setattr(figure, "draw", record)
    args = grid_args(world, "--difference", "--names", "ben", "cleo", "--output", "f.png")
    assert figure.main(args) == 0
    assert seen["columns"] == [
        "source", "edit of source", "protected", "difference x10", "edit of protected"
    ]  # fmt: skip
    assert [label.split("\n")[0] for label in seen["labels"]] == ["ben", "ben", "cleo", "cleo"]
    assert seen["labels"][1].split("\n")[1] == utils.edit_prompts[3]
    source, clean, protected, difference, edited = seen["cells"][1]  # ben, prompt 3
    assert np.array_equal(source, tiny.portrait(32, seed=1)) and np.array_equal(clean, source)
    assert np.array_equal(protected, shifted(source, 2)) and np.array_equal(edited, shifted(source, 11))
    assert set(np.unique(difference)) == {128 - 20, 128 + 20}
    with Image.open("f.png") as picture:
        assert picture.width > 5 * 100 and picture.height > 4 * 100
    assert figure.main([*args[:-1], "f.jpg"]) == 1
    assert figure.main([*args, "--titles", "weak"]) == 0
    assert seen["columns"][2:] == ["protected\nweak", "difference x10", "edit of protected\nweak"]
    args[args.index("--protected_dirs") + 1 : args.index("--clean_edit_dir")] = [f"{world}/protected"] * 2
    place = args.index("--defend_edit_dirs") + 1
    args[place:place] = [f"{world}/edits/facelock/budget_0.02"]
    args.remove("--difference")
    assert figure.main([*args, "--titles", "weak", "strong"]) == 0
    assert seen["columns"][2:] == [
        "protected\nweak", "edit of protected\nweak", "protected\nstrong", "edit of protected\nstrong"
    ]  # fmt: skip
    assert figure.main([*args, "--titles", "weak"]) == 1
    monkeypatch.setattr(figure, "MOST_LINES", 3)
    assert figure.main([*args, "--titles", "weak", "strong"]) == 1


def test_the_grid_names_what_is_missing(world, capsys):
    args = grid_args(world, "--names", "nobody", "--output", "f.pdf")
    args[args.index("--protected_dirs") + 1] = f"{world}/portraits"
    assert figure.main(args) == 1
    assert "nobody" in capsys.readouterr().err
    assert not Path("f.pdf").exists()
    args[args.index("nobody")] = "anna"
    assert figure.main(args) == 0
    assert Path("f.pdf").read_bytes().startswith(b"%PDF")


def test_two_dollars_are_no_formula_and_no_bytes_break_a_figure(world):
    """Prompts and names of users: none of them is parsed, and each can be drawn."""
    texts = ["from $5 to $\\frac$", "price: $3_ and $x", "two\tparts", "fourth"]
    (world / "prompts.txt").write_text("\n".join(texts))
    args = grid_args(world, "--prompt_file", f"{world}/prompts.txt", "--names", "ben", "--output", "f.png")
    for name in NAMES:
        write(world / "protected" / f"{name}.png", tiny.portrait(32, seed=NAMES.index(name)))
    assert figure.main([*args, "--titles", "$\\alpha$ \udcff"]) == 0
    points = pd.DataFrame({"method": ["$\\frac$", "b $x$"], "value": [0.1, 0.2], "place": ["$1", "$\\frac"]})
    points = points.assign(low=points["value"], high=points["value"])
    figure.save(figure.draw_plot(points, "$\\frac", "two $ and $\\sqrt"), Path("plot.png"))
    assert Path("plot.png").stat().st_size > 1000


def test_the_plot_shows_a_metric_against_budget(world, monkeypatch):
    assert eval_psnr.main(psnr_args(world)) == 0
    seen = {}

    def record(points, ylabel, xlabel, draw=figure.draw_plot):
        seen.update(points=points, ylabel=ylabel, figure=draw(points, ylabel, xlabel))
        return seen["figure"]

    monkeypatch.setattr(figure, "draw_plot", record)
    assert figure.main(["plot", "--tables", "psnr_metric.csv", "--output", "p.pdf"]) == 0
    assert Path("p.pdf").read_bytes().startswith(b"%PDF")
    points = list(seen["points"].itertuples())
    found = [(point.method, point.place) for point in points]
    assert found == [("facelock", "0.02"), ("facelock", "0.03")]
    ((low, high),) = [bar.get_segments()[0][:, 1] for bar in seen["figure"].axes[0].collections[:1]]
    assert (low, high) == pytest.approx((points[0].low, points[0].high))
    rows = table(Path("psnr_metric.csv"))
    (line,) = seen["figure"].axes[0].lines[:1]
    assert line.get_xdata() == pytest.approx([0.02, 0.03])
    assert line.get_ydata() == pytest.approx([float(row["mean"]) for row in rows])
    assert points[0].low == float(rows[0]["ci_low"])


def test_the_plot_shows_a_metric_against_visibility(world, all_args, monkeypatch, capsys):
    for levels, folder in ((3, "budget_0.03"), (2, "budget_0.02")):
        for number, name in enumerate(NAMES):
            protected = shifted(tiny.portrait(32, seed=number), levels)
            write(world / "protected/facelock" / folder / f"{name}.png", protected)
    assert eval_all.main([*all_args, "--protected_dirs", f"{world}/protected/facelock"]) == 0
    points, labels = [], []
    monkeypatch.setattr(figure, "save", lambda *args: None)
    monkeypatch.setattr(
        figure, "draw_plot", lambda found, *names: points.extend(found.itertuples()) or labels.extend(names)
    )
    argv = ["plot", "--tables", "all_metric.csv", "--metric", "facial", "--against", "psnr"]
    assert figure.main(argv) == 0
    seen = [float(row["psnr"]) for row in table(Path("all_metric_protected.csv"))]
    assert [point.method for point in points] == ["clean", "facelock", "facelock"] and points[0].place == ""
    assert [float(point.place) for point in points[1:]] == pytest.approx(seen, rel=1e-3)
    assert "PSNR, dB" in labels[1]
    capsys.readouterr()
    assert figure.main([*argv[:2], "a=all_metric.csv", *argv[3:]]) == 1
    assert "--against needs one table" in capsys.readouterr().err
    text = Path("all_metric_protected.csv").read_text()
    Path("all_metric_protected.csv").write_text(text.replace("facelock", "vae"))
    assert figure.main(argv) == 1
    assert "none of its methods" in capsys.readouterr().err
    Path("all_metric_protected.csv").unlink()
    assert figure.main(argv) == 1
    assert "all_metric_protected.csv" in capsys.readouterr().err


def test_the_plot_shows_a_metric_against_purification(world, all_args, monkeypatch, capsys):
    assert eval_all.main(all_args) == 0
    points = []
    monkeypatch.setattr(figure, "draw_plot", lambda found, *labels: points.extend(found.itertuples()))
    monkeypatch.setattr(figure, "save", lambda *args: None)
    argv = ["plot", "--tables", "none=all_metric.csv", "jpeg:75=all_metric.csv", "--metric", "facial"]
    assert figure.main(argv) == 0
    found = [(point.method, point.place) for point in points[:2]]
    assert found == [("clean", "none"), ("facelock, 0.02", "none")]
    assert points[3].place == "jpeg:75" and points[0].value == pytest.approx(1)
    capsys.readouterr()
    for broken, says in (
        (["--tables", "none=all_metric.csv", "--metric", "beauty"], "clip_s"),
        (["--tables", "a=all_metric.csv", "a=all_metric.csv", "--metric", "psnr"], "two are called a"),
        (["--tables", "nothing.csv"], "nothing.csv"),
        (["--tables", "all_metric.csv", "a=all_metric.csv", "--metric", "psnr"], "has no label"),
        (["--tables", "all_metric.md"], "all_metric.md"),
    ):
        assert figure.main(["plot", *broken]) == 1
        assert says in capsys.readouterr().err


def test_the_plot_shows_the_clean_edits_as_a_line_and_refuses_what_is_ambiguous(world, all_args, capsys):
    assert eval_all.main(all_args) == 0
    points = figure.read_points(Path("all_metric.csv"), "facial", "")
    (axis,) = figure.draw_plot(points, "FR", "budget").axes
    assert [line.get_label() for line in axis.lines if line.get_linestyle() == "--"] == ["clean"]
    assert axis.lines[0].get_ydata() == pytest.approx([1, 1])
    text = Path("all_metric.csv").read_text().replace("facelock", "a/facelock")
    more = "".join(line + "\n" for line in text.replace("a/facelock", "b/facelock").splitlines()[2:])
    Path("two.csv").write_text(text + more)
    capsys.readouterr()
    assert figure.main(["plot", "--tables", "two.csv", "--metric", "facial"]) == 1
    assert "facelock at 0.02 has two values" in capsys.readouterr().err
    Path("two.csv").write_text(text.replace("0.9", "zero"))
    assert figure.main(["plot", "--tables", "two.csv", "--metric", "facial"]) == 1
    assert "two.csv" in capsys.readouterr().err


def test_a_difference_is_of_what_is_finite_in_both_rows():
    lines = [(row, 0, 0, name, "psnr") for name in "abc" for row in ("x", "base")]
    values = pd.DataFrame(lines, columns=["method", "seed", "prompt", "name", "metric"])
    values["value"] = [math.inf, 1.0, math.inf, math.inf, 5.0, 3.0]
    (found,) = tables.differences(values, "base").itertuples()
    assert (found.mean, found.n, found.n_inf) == (2.0, 1, 0)
