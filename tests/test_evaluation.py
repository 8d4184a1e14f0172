"""Evaluation: finding and pairing edits, the metrics, the tables, the figure."""

from __future__ import annotations

import csv
import math
from pathlib import Path

import common
import eval_facial
import eval_psnr
import figure
import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import models
from utils import UserError

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
            lambda w: (w / "edits/clean/seed5/prompt0/ben.png").write_text("x"),
            [],
            ["ben.png", "not a readable"],
        ),
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


# ---------------------------------------------------------------------------------------------------------
# statistics


def test_the_mean_is_over_images_not_over_edits():
    values = {(0, 0, "a"): 1.0, (0, 1, "a"): 1.0, (0, 2, "a"): 1.0, (0, 0, "b"): 3.0}
    mean = common.mean_of(values)
    assert (mean.value, mean.n) == (2.0, 2)


def test_the_interval_covers_about_as_often_as_it_says():
    """Of 120 samples of 40 normal values, the 95 % interval misses the true mean in about 6."""
    generator = np.random.default_rng(0)
    missed = 0
    for _ in range(120):
        low, high = common.bootstrap(generator.normal(size=40).tolist())
        missed += not low <= 0 <= high
    assert 2 <= missed <= 15


def test_no_interval_for_one_value_or_equal_ones():
    assert all(
        math.isnan(end)
        for samples in ([], [1.0], [2.0, 2.0], [0.1 + 0.2, 0.3])
        for end in common.bootstrap(samples)
    )


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
    assert eval_facial.main([*facial_args, "--per_image", "each.csv"]) == 0
    rows = table(Path("facial_metric.csv"))
    assert rows[0]["method"] == "clean"
    assert float(rows[0]["mean"]) == pytest.approx(1.0, abs=1e-5)  # the clean edits here are the sources
    recognizer = models.load_recognizer(str(tiny_models.recognizer), torch.device("cpu"), torch.float32)
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
    assert eval_facial.main(facial_args) == 0
    assert eval_facial.main([*facial_args, "--by", "judge"]) == 0
    recognizer, judge = table(Path("facial_metric.csv")), table(Path("facial_judge_metric.csv"))
    assert recognizer[1]["mean"] != judge[1]["mean"]


class Embedder:
    """A FaceEmbedder that finds a face only in bright images, and embeds the mean colour inside the box."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.boxes = []

    def box(self, pixels):
        return (0, 0, 16, 16) if pixels.mean() > self.threshold else None

    def embed(self, pixels, box):
        self.boxes.append(box)
        x0, y0, x1, y1 = box
        return torch.from_numpy(pixels[y0:y1, x0:x1].mean(axis=(0, 1)))[None]


def test_an_edit_without_a_face_gets_its_sources_box_and_is_counted(tmp_path):
    write(tmp_path / "source.png", np.full((32, 32, 3), 200, np.uint8))
    write(tmp_path / "edit.png", np.full((32, 32, 3), 10, np.uint8))
    row = common.Row("m", tmp_path)
    pair = common.Pair(0, 0, "x", tmp_path / "edit.png", tmp_path / "source.png")
    embedder = Embedder(threshold=100)
    values, undetected = eval_facial.score({row: [pair]}, embedder)
    assert undetected == {row: 1}
    assert embedder.boxes == [(0, 0, 16, 16), (0, 0, 16, 16)]
    assert values[row][0, 0, "x"] == pytest.approx(1.0)


def test_a_source_without_a_face_is_named(tmp_path):
    write(tmp_path / "dark.png", np.zeros((32, 32, 3), np.uint8))
    pair = common.Pair(0, 0, "x", tmp_path / "dark.png", tmp_path / "dark.png")
    with pytest.raises(UserError, match=r"dark\.png"):
        eval_facial.score({common.Row("m", tmp_path): [pair]}, Embedder(threshold=100))


# ---------------------------------------------------------------------------------------------------------
# the figure


def test_figure_shows_what_it_says(world, monkeypatch):
    for number, name in enumerate(NAMES):
        write(world / "protected" / f"{name}.png", shifted(tiny.portrait(32, seed=number), 2))
    seen = {}

    def record(cells, labels, columns, output, draw=figure.draw):
        seen.update(cells=cells, labels=labels, columns=columns)
        draw(cells, labels, columns, output)

    monkeypatch.setattr(figure, "draw", record)
    args = (
        f"--src_dir {world}/portraits --protected_dirs {world}/protected "
        f"--clean_edit_dir {world}/edits/clean --defend_edit_dirs {world}/edits/facelock/budget_0.03 "
        "--seed 5 --names ben cleo --output f.png"
    ).split()
    assert figure.main(args) == 0
    assert seen["columns"] == [
        "source", "protected", "difference x10", "edit of source", "edit of protected"
    ]  # fmt: skip
    assert [label.split("\n")[0] for label in seen["labels"]] == ["ben", "ben", "cleo", "cleo"]
    source, protected, difference, clean, edited = seen["cells"][1]  # ben, prompt 3
    assert np.array_equal(source, tiny.portrait(32, seed=1)) and np.array_equal(clean, source)
    assert np.array_equal(protected, shifted(source, 2)) and np.array_equal(edited, shifted(source, 11))
    assert set(np.unique(difference)) == {128 - 20, 128 + 20}
    with Image.open("f.png") as picture:
        assert picture.width > 5 * 100 and picture.height > 4 * 100
    assert figure.main([*args[:-1], "f.jpg"]) == 1


def test_figure_names_what_is_missing(world, capsys):
    args = (
        f"--src_dir {world}/portraits --protected_dirs {world}/portraits "
        f"--clean_edit_dir {world}/edits/clean --defend_edit_dirs {world}/edits/facelock/budget_0.03 "
        "--seed 5 --names nobody --output f.pdf"
    ).split()
    assert figure.main(args) == 1
    assert "nobody" in capsys.readouterr().err
    assert not Path("f.pdf").exists()
    args[args.index("nobody")] = "anna"
    assert figure.main(args) == 0
    assert Path("f.pdf").read_bytes().startswith(b"%PDF")
