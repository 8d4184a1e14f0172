"""Evaluation: finding and pairing edits, the metrics, the tables, the figure."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from scipy import stats
from tiny import CPU, STRONG, WEAK, changed, write, write_edits, write_protected

import utils
from evaluation import (
    eval_all,
    eval_clip_i,
    eval_clip_s,
    eval_facial,
    eval_lpips,
    eval_psnr,
    eval_ssim,
    features,
    figure,
    pairing,
    scoring,
    tables,
)
from images import load_image, to_tensor
from models.clip import load_clip
from models.config import resolve
from models.loading import ROOT
from models.perceptual import load_perceptual
from models.recognizers import load_recognizer


def level_psnr(levels: float) -> float:
    """PSNR of two 8-bit images that differ by `levels` everywhere."""
    return 20 * math.log10(255 / levels)


def test_psnr_table(call):
    found = call(eval_psnr)
    assert found.status == 0 and "| facelock | 0.03" in " ".join(found.out.split())
    columns = ["method", "budget", "editor", "purifier", "judge", "metric", "prompt0", "prompt3"]
    assert list(pd.read_csv("t.csv")) == [*columns, "mean", "ci_low", "ci_high", "n", "n_inf"]
    assert list(found.table.index) == [WEAK, STRONG]
    of_images = [(level_psnr(1 + i) + level_psnr(4 + i)) / 2 for i in range(3)]
    weak, strong = found.table.loc[WEAK], found.table.loc[STRONG]
    assert weak["prompt0"] == pytest.approx(np.mean([level_psnr(1 + i) for i in range(3)]), abs=1e-3)
    assert weak["mean"] == pytest.approx(np.mean(of_images), abs=1e-3)
    assert min(of_images) - 1e-3 <= weak["ci_low"] < weak["mean"] < weak["ci_high"]
    assert (weak["n"], weak["n_inf"], strong["n"]) == (3, 0, 3)
    assert math.isnan(strong["ci_low"])  # three equal images: nothing to resample
    columns[-2:] = ["value"]
    columns[5:5] = ["seed", "prompt", "name"]
    assert list(pd.read_csv("each.csv")) == columns and len(found.each) == 2 * 2 * 3


def test_identical_edits_are_counted_and_left_out(world, call):
    write(world / f"edits/{WEAK}/seed5/prompt0/anna.png", tiny.portrait(32, seed=0))
    weak = call(eval_psnr, "--prompts 0").table.loc[WEAK]
    assert (weak["n"], weak["n_inf"]) == (2, 1)
    assert weak["mean"] == pytest.approx((level_psnr(2) + level_psnr(3)) / 2, abs=1e-3)


@pytest.mark.parametrize(
    ("given", "rows"),
    [
        (STRONG, [STRONG]),
        (f"{STRONG}/seed5", [STRONG]),
        (".", [WEAK, STRONG]),  # two levels above, beside the clean edits
        (f"facelock {{0}}/{WEAK}/seed5 {{0}}/{STRONG}/../../facelock", [WEAK, STRONG]),  # each is one row
    ],
)
def test_a_directory_may_be_given_in_several_ways(world, call, given, rows):
    found = call(eval_psnr, f"--defend_edit_dirs {world}/edits/{given.format(world / 'edits')}")
    assert list(found.table.index) == rows
    assert found.table["prompt0"].iloc[-1] == pytest.approx(level_psnr(8), abs=1e-3)


def test_the_clean_edits_may_be_a_row_too_but_not_by_their_name_alone(world, call, monkeypatch):
    """If they are asked for: they are compared with themselves. They are not the row `clean` then."""
    row = call(eval_psnr, f"--defend_edit_dirs {world}/edits/clean").table.loc["clean"]
    assert math.isnan(row["mean"]) and (row["n"], row["n_inf"]) == (0, 6)
    (world / "edits" / STRONG).rename(world / "edits/facelock/clean")
    monkeypatch.chdir(world / "edits/facelock")
    table = call(eval_all, "--defend_edit_dirs clean").table
    assert list(table.index) == ["clean", "./clean"]
    assert math.isnan(table.loc["clean", "psnr"]) and table.loc["./clean", "psnr"] < 40


def twin(world: Path) -> None:
    folder = world / "edits/clean/seed5/prompt0"
    Image.open(folder / "ben.png").save(folder / "ben.bmp")


def deeper(world: Path) -> None:
    """Two levels above the clean edits, but three above the others, which aren't looked for there."""
    (world / "edits").rename(world / "a")


@pytest.mark.parametrize(
    ("break_it", "flags", "says"),
    [
        (lambda w: (w / f"edits/{STRONG}/seed5/prompt3/ben.png").unlink(), "", ["prompt3", "ben"]),
        (lambda w: (w / "edits/clean/seed5/prompt0/cleo.png").unlink(), "", ["clean/seed5/prompt0", "cleo"]),
        (lambda w: None, "--prompts 0,9", ["prompt9", "clean/seed5"]),
        (lambda w: write(w / "edits/clean/seed5/prompt0/ben.png", tiny.portrait(40)), "", ["40x40", "32x32"]),
        (lambda w: (w / "edits/clean/seed5").rename(w / "edits/clean/seed6"), "", ["no seed5"]),
        (twin, "", ["ben.bmp=ben.png", "same stem"]),
        (lambda w: None, "--baseline vae", ["--baseline vae", "budget_0.02"]),
        (lambda w: None, "--baseline facelock", ["2 rows"]),
        (lambda w: None, "--clean_edit_dir {0}/edits/facelock", ["which are the clean edits?"]),
        (deeper, "--defend_edit_dirs {0} --clean_edit_dir {0}/a/clean", ["no edits in it but the clean"]),
        (lambda w: None, "--defend_edit_dirs {0}/portraits", ["portraits: no seed5 in it"]),
        (lambda w: None, "--defend_edit_dirs {0}/nowhere", ["nowhere: no such directory"]),
        (lambda w: None, "--seed 7", ["no seed7"]),
    ],
)
def test_what_is_missing_is_named_and_nothing_is_written(world, call, break_it, flags, says):
    break_it(world)
    found = call(eval_psnr, flags.format(world))
    error = found.err.strip()
    assert found.status == 1 and error.startswith("error:") and error.count("\n") == 0
    assert all(text in error for text in says), error
    assert not list(Path().iterdir())


def test_common_scores_what_all_have_and_names_the_rest(world, call):
    (world / f"edits/{STRONG}/seed5/prompt3/ben.png").unlink()
    found = call(eval_psnr, "--common")
    assert found.status == 0 and list(found.table["n"]) == [2, 2] and "ben" in found.err


def test_a_damaged_edit_is_left_out_of_every_row_alike(world, call):
    (world / f"edits/{STRONG}/seed5/prompt3/ben.png").write_text("x")
    found = call(eval_psnr)
    assert found.status == 1 and list(found.table["n"]) == [3, 3]
    assert f"damaged: {world}/edits/{STRONG}/seed5/prompt3/ben.png: not a" in found.err
    assert "1 of 6 edits are left out of every row" in found.err
    assert len(found.each) == 2 * 5 and (WEAK, 3, "ben") not in found.each.index
    for path in (world / "edits/clean/seed5").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:100])
    found = call(eval_psnr)
    assert "nothing could be scored" in found.err and not hasattr(found, "table")


def test_several_seeds_are_one_mean(world, call):
    for row, level in (("clean", 0), (WEAK, 4)):
        write_edits(world, row, 6, [level] * 3)
    flags = f"--prompts 0 --seed 5 6 --defend_edit_dirs {world}/edits/{WEAK}"
    of_images = [(level_psnr(1 + i) + level_psnr(4)) / 2 for i in range(3)]
    assert call(eval_psnr, flags).table.loc[WEAK, "mean"] == pytest.approx(np.mean(of_images), abs=1e-3)
    assert "budget_0.03: no seed6 (there are seed5)" in call(eval_psnr, "--seed 5 6").err
    found = call(eval_psnr, "--seed 5 6 --common")  # without that row
    assert list(found.table.index) == [WEAK] and "left out" in found.err
    (world / f"edits/{WEAK}/seed6/prompt0").rename(world / "elsewhere")
    assert "budget_0.02/seed6: prompt0" in call(eval_psnr, flags).err


def test_the_baseline_is_compared_in_pairs(call):
    assert "minus facelock at 0.03, in pairs" in call(eval_all, "--baseline budget_0.03").out
    found = call(eval_psnr, "--baseline budget_0.03 --prompts 0")
    weak, strong = found.table.loc[WEAK], found.table.loc[STRONG]
    expected = np.mean([level_psnr(1 + i) - level_psnr(8) for i in range(3)])
    assert weak["diff"] == pytest.approx(expected, abs=1e-3)
    assert weak["diff_low"] < weak["diff"] < weak["diff_high"]
    assert weak["diff_n"] == 3 and math.isnan(strong["diff"])
    assert f"{expected:+.2f}" in found.out and "minus facelock at 0.03, in pairs" in found.out


def test_an_instruction_must_be_the_same_in_every_row_and_seed(world, call):
    record = {"seed": 5, "arguments": {"guidance_scale": 7.5}, "prompts": {"0": "Turn it red"}}
    clean, strong = (world / "edits" / name / "seed5/run.json" for name in ("clean", STRONG))
    clean.write_text(json.dumps(record))
    strong.write_text(json.dumps(record | {"arguments": {"guidance_scale": 1.0}}))
    found = call(eval_psnr)
    assert found.status == 0 and "--guidance_scale was 7.5" in found.err and "1.0 for" in found.err
    strong.write_text(json.dumps(record | {"prompts": {"0": "Turn it blue"}}))
    found = call(eval_psnr)
    assert found.status == 1 and "Turn it red" in found.err and "Turn it blue" in found.err
    assert call(eval_psnr, "--prompts 3").status == 0  # 0 isn't asked for
    (world / "own.txt").write_text("Turn it green\n")
    assert "Turn it green" in call(eval_psnr, f"--prompt_file {world}/own.txt").err
    for name in ("clean", WEAK):
        shutil.copytree(world / "edits" / name / "seed5", world / "edits" / name / "seed6")
    (world / "edits/clean/seed6/run.json").write_text(json.dumps(record | {"prompts": {"0": "b"}}))
    found = call(eval_psnr, f"--seed 5 6 --defend_edit_dirs {world}/edits/{WEAK}")
    assert found.status == 1 and "prompt0 is 'Turn it red'" in found.err


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


def test_ssim_is_that_of_the_formula(real_pairs):
    """Wang et al. 2004 on [0, 1], in float64: windows that lie inside the image, as in the release."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
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
    expected = map_.view(len(real_pairs[0]), -1).mean(dim=1).tolist()
    assert eval_ssim.ssim(real_pairs[1], real_pairs[0]).tolist() == pytest.approx(expected, abs=1e-10)
    assert 0.1 < min(expected) and max(expected) < 0.99
    assert eval_ssim.ssim(real_pairs[0], real_pairs[0]).tolist() == pytest.approx([1] * 3)


def test_images_that_are_too_small_for_a_metric_are_named(world, call):
    for path in world.rglob("edits/**/ben.png"):
        write(path, tiny.portrait(10))
    assert call(eval_psnr).status == 0
    assert "ben.png is 10x10; sides of at least 11 px" in call(eval_ssim).err


def test_lpips_is_that_of_the_library(call, tiny_models, real_pairs):
    network = load_perceptual(str(tiny_models.perceptual), CPU, torch.float32)
    images, noisy = real_pairs
    values = eval_lpips.lpips_distance(network, noisy, images)
    assert values.tolist() == pytest.approx([network(a, b).item() for a, b in zip(noisy, images)], rel=1e-4)
    assert eval_lpips.lpips_distance(network, images, images).tolist() == [0, 0, 0]
    table = call(eval_lpips).table
    assert (table["mean"] > 0).all() and "n_inf" not in table


def test_clip_metrics_by_hand():
    """Edits and sources in a plane, the instruction along the first axis."""
    edits = torch.tensor([[3.0, 4.0], [1.0, 0.0], [2.0, 2.0], [1.0, 1.0 + 1e-7]])
    sources = torch.tensor([[0.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    texts = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 5.0], [0.0, 1.0]])
    assert eval_clip_i.clip_i(edits, sources).tolist() == pytest.approx([4 / 5, 0.5**0.5, 1.0, 1.0])
    assert eval_clip_s.clip_s(edits, sources, texts).tolist() == pytest.approx([3 / 13**0.5, -1.0, 1.0, 0.0])


def test_clip_scripts(world, call, tiny_models):
    of_i, of_s = call(eval_clip_i), call(eval_clip_s)
    assert list(of_i.table.index) == list(of_s.table.index) == ["clean", WEAK, STRONG]
    assert of_i.table.loc["clean", "mean"] == pytest.approx(1, abs=1e-5)  # the clean edits are the sources
    clip = load_clip(str(tiny_models.clip), CPU, torch.float32)
    edit = np.array(Image.open(world / f"edits/{STRONG}/seed5/prompt3/ben.png"))
    a, b = clip.embed_images(np.stack([tiny.portrait(32, seed=1), edit]))
    text = clip.embed_texts([utils.edit_prompts[3]])[0]
    found = [one.each.loc[(STRONG, 3, "ben")].item() for one in (of_i, of_s)]
    expected = [torch.cosine_similarity(a, b, dim=0), torch.cosine_similarity(b - a, text, dim=0)]
    assert found == pytest.approx([value.item() for value in expected], abs=1e-4)


def test_clip_s_scores_the_instructions_that_were_used(world, call):
    """In the edits' run.json, in --prompt_file, or else the paper's; an unknown one is no number at all."""
    own, recorded = world / "own.txt", world / "edits/clean/seed5/run.json"
    own.write_text("a\nb\nc\nLet there be light\n")
    of_paper = call(eval_clip_s).table["prompt3"]
    of_file = call(eval_clip_s, f"--prompt_file {own}").table["prompt3"]
    prompts = {"0": "a", "3": "Let there be light"}
    recorded.write_text(json.dumps({"seed": 5, "arguments": {}, "prompts": prompts}))
    assert of_paper[STRONG] != of_file[STRONG] == call(eval_clip_s).table["prompt3"][STRONG]
    own.write_text("a\n")
    recorded.unlink()
    found = call(eval_clip_s, f"--prompt_file {own}")
    assert found.status == 1 and "prompt3" in found.err


def test_edits_of_several_sizes_have_their_source_in_each(world, call):
    """A size of its own for prompt 3, in all rows alike; in a single row it is an error."""
    for row, status in ((STRONG, 1), ("*", 0)):
        for path in [*(world / "edits").glob(f"{row}/**/prompt3/*.png")]:
            Image.open(path).resize((40, 48)).save(path)
        found = call(eval_clip_i)
        assert found.status == status and ("is 40x48, but" in found.err) == bool(status)
    assert len(found.each) == 18


def test_sources_of_another_size_are_brought_to_the_edits(world, call):
    before = call(eval_clip_i).table["mean"]
    for path in sorted((world / "portraits").iterdir()):
        Image.open(path).resize((64, 64), Image.Resampling.NEAREST).save(path.with_suffix(".bmp"))
        path.unlink()
    after = call(eval_clip_i).table["mean"]
    assert after.tolist() == pytest.approx(before.tolist(), abs=0.02) and not after.equals(before)


def test_eval_all_says_what_the_single_scripts_say(call):
    found = call(eval_all)
    text = Path("t.md").read_text()
    assert text.strip() in found.out and "intervals are approximate" in text
    heads = [line for line in text.splitlines() if line.startswith("| method")]
    assert len(heads) == 3 and "hardest judge" in heads[0] and "FR, judge" in heads[1] and "FR" in heads[2]
    assert list(found.table.index) == ["clean", WEAK, STRONG]
    assert math.isnan(found.table.loc["clean", "psnr"]) and found.table.loc[WEAK, "psnr_n_inf"] == 0
    for metric, script, flags in (
        ("psnr", eval_psnr, ""),
        ("ssim", eval_ssim, ""),
        ("lpips", eval_lpips, ""),
        ("clip_s", eval_clip_s, ""),
        ("clip_i", eval_clip_i, ""),
        ("facial", eval_facial, ""),
        ("identified", eval_facial, "--what identified"),
        ("recognised", eval_facial, "--what recognised"),
    ):
        single = call(script, flags).table[["mean", "ci_low", "ci_high", "n"]]
        own = found.table[[metric, *(f"{metric}_{end}" for end in ("low", "high", "n"))]].loc[single.index]
        np.testing.assert_allclose(own.astype(float), single.astype(float), atol=2e-5)
    assert len(found.each) == 3 * 2 * 3
    assert {metric.name for metric in eval_all.METRICS} < {*found.each} > {"left", "facial_judge", "facial"}
    means = found.each.groupby("method")["facial"].mean()
    np.testing.assert_allclose(means[found.table.index], found.table["facial"], atol=2e-6)


def test_eval_all_reads_every_file_once(world, call, monkeypatch):
    read = []
    monkeypatch.setattr(scoring, "load_image", lambda path: read.append(path) or load_image(path))
    assert call(eval_all).status == 0
    files = [*(world / "portraits").rglob("*.png"), *(world / "edits").rglob("*.png")]
    assert sorted(read) == sorted(files)


def test_batch_size_order_and_suffixes_change_nothing(world, call, monkeypatch):
    first = call(eval_all, "--batch_size 1").each
    for folder, suffix in (("edits/facelock", ".bmp"), ("portraits", ".tif")):
        for path in [*(world / folder).rglob("*.png")]:
            Image.open(path).save(path.with_suffix(suffix))
            path.unlink()
    in_order = Path.iterdir
    monkeypatch.setattr(Path, "iterdir", lambda self: reversed(list(in_order(self))))
    pd.testing.assert_frame_equal(call(eval_all, "--batch_size 4").each, first, atol=1e-5)


def test_a_damaged_source_is_left_out_of_every_metric(world, call):
    (world / "portraits/ben.png").write_text("x")
    found = call(eval_all)
    assert found.status == 1 and "portraits/ben.png" in found.err
    counts = found.table.filter(regex="_n$").to_numpy()
    assert (np.isnan(counts) | (counts == 2)).all()


def test_eval_all_tells_how_visible_a_protection_is(world, call):
    write_protected(world, weak=2, strong=3)
    flags = f"--protected_dirs {world}/protected/facelock --baseline clean"
    found = call(eval_all, flags, output="o/t.csv")
    visible = pd.read_csv("o/t_protected.csv")
    assert found.status == 0 and visible["budget"].tolist() == [0.02, 0.03]
    assert visible["linf"].tolist() == pytest.approx([4 / 255, 6 / 255], rel=1e-5)
    assert visible["psnr"][0] == pytest.approx(level_psnr(2), abs=1e-3)
    pairs = pd.read_csv("o/t_minus_baseline.csv")
    assert len(pairs) == 2 and pairs["facial"][1] < 0
    text = Path("o/t.md").read_text()
    assert "minus clean, in pairs" in text and "protected images against their sources" in text
    found = call(eval_all, "", output="o/t.csv")  # nothing of the earlier one is left
    assert sorted(path.name for path in Path("o").iterdir()) == [
        ".facelock.jsonl", "t.csv", "t.json", "t.md"
    ]  # fmt: skip
    assert "o/t_protected.csv: from an earlier run, removed" in found.out
    (world / f"protected/{STRONG}/ben.png").write_text("x")
    found = call(eval_all, flags, output="o/t.csv")  # and the rest is there
    assert found.status == 1 and "budget_0.03/ben.png: not a readable image" in found.err
    assert pd.read_csv("o/t_protected.csv")["linf_n"].tolist() == [2, 2]
    assert found.table["facial_n"].tolist() == [3, 3, 3]
    write(world / f"protected/{STRONG}/ben.png", tiny.portrait(40))
    assert "is 40x40, but" in call(eval_all, flags, output="o/t.csv").err
    (world / f"protected/{WEAK}/ben.png").unlink()
    assert "ben in" in call(eval_all, flags, output="o/t.csv").err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--output folder", "is a directory"),
        ("--output t.md", "must end in .csv"),
        ("--per_image folder", "is a directory"),
        ("--per_image t.csv", "overwrite the other"),
        ("--per_image t.md", "must end in .csv"),
        ("--output {0}/portraits/ben.png/t.csv", "is not a directory"),
    ],
)
def test_outputs_that_cannot_be_are_refused_before_any_work(world, call, monkeypatch, flags, says):
    monkeypatch.setattr(eval_all, "score", lambda *args: pytest.fail("worked"))
    (world / "out/folder").mkdir()
    found = call(eval_all, flags.format(world))
    assert found.status == 1 and says in found.err


def write_run(directory: Path, sources: Path, **arguments: object) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "run.json").write_text(json.dumps({"arguments": arguments, "sources": str(sources)}))


def test_a_row_is_what_its_records_say(tmp_path):
    """Protected, purified, edited, and the edit altered; two rows that would be the same keep their names."""
    protected, purified = tmp_path / "here", tmp_path / "there"
    write_run(protected, tmp_path, defend_method="facelock", attack_budget=0.06)
    write_run(purified, protected, method="jpeg:75")
    for row in ("a/mine", "b/mine", "b/other/budget_0.1"):
        write_run(tmp_path / row / "seed0", purified, model="flux-kontext", model_id="me/ed 0123abcd")
    write_run(tmp_path / "c/mirrored/seed0", tmp_path / "b/mine/seed0/prompt3", method="mirror")
    (tmp_path / "d/vae/budget_0.03/seed0").mkdir(parents=True)
    names = ["a/mine", "b/other/budget_0.1", "d/vae/budget_0.03"]
    found = pairing.about_rows([pairing.Row(name, tmp_path / name) for name in names], 0)
    editor = ["flux-kontext=me/ed", "jpeg:75"]
    assert found.to_numpy().tolist() == [
        ["mine", "0.06", *editor], ["other", "0.06", *editor], ["vae", "0.03", "", ""]
    ]  # fmt: skip
    names = ["a/mine", "b/mine", "c/mirrored"]
    found = pairing.about_rows([pairing.Row(name, tmp_path / name) for name in names], 0)
    assert found["method"].tolist() == ["a/mine", "b/mine", "mirrored"]
    (row,) = pairing.about_rows([pairing.Row("a/mine", tmp_path / "a/mine")], 0).to_numpy().tolist()
    assert row == ["facelock", "0.06", *editor]


@pytest.mark.parametrize(
    ("script", "line", "table"),
    [(eval_facial, "--by judge", "t_left.csv"), (eval_facial, "", "t.csv"), (eval_all, "", "t.csv")],
)
def test_another_judge_or_gallery_does_not_replace_a_table(world, call, tiny_models, script, line, table):
    assert call(script, line).status == 0
    before = Path(table).read_bytes()
    assert re.search(r"(recognizer|judge) [0-9a-f]{8}", Path(table).with_suffix(".json").read_text())
    other = f"{line} --recognizer {tiny_models.judge} --judge {tiny_models.recognizer}"
    found = call(script, other, keep=True)
    assert found.status == 1 and "measured by other networks" in found.err
    found = call(script, f"{line} --gallery_dir {world}/portraits", keep=True)
    assert found.status == 1 and "people known by: the sources there, gallery" in found.err
    assert Path(table).read_bytes() == before and call(script, line, keep=True).status == 0


def test_latex_has_booktabs_the_best_in_bold_and_escaped_names(world, call):
    (world / "edits/facelock").rename(world / "edits/50%_#1")
    found = call(eval_all, f"--defend_edit_dirs {world}/edits --latex --baseline clean")
    assert found.status == 0
    text = Path("t.tex").read_text()
    heads = [line for line in text.splitlines() if line.startswith("method &")]
    assert text.count(r"\toprule") == text.count(r"\bottomrule") == len(heads) == 6
    assert all(r"$\downarrow$" in head and head.endswith(r" \\") for head in heads)
    lines = [line for line in text.splitlines() if line.startswith(r"50\%\_\#1 &")]
    assert len(lines) == 12 and r"{\scriptsize [" in "".join(lines)
    assert "textbf" not in text  # each budget has one method: nothing to be better than
    call(eval_psnr, f"--defend_edit_dirs {world}/edits")
    assert not Path("t.tex").exists()  # it would seem to belong to this table


# ---------------------------------------------------------------------------------------------------------
# statistics


def values(row: str = "m", metric: str = "psnr", **of_names: list[float]) -> pd.DataFrame:
    """Values of prompts 0, 1, ... by name."""
    lines = [(row, 0, i, name, metric, v) for name, found in of_names.items() for i, v in enumerate(found)]
    return pd.DataFrame(lines, columns=["method", "seed", "prompt", "name", "metric", "value"])


def test_the_mean_is_over_images_not_over_edits():
    (mean,) = tables.means(values(a=[1.0, 1.0, 1.0], b=[3.0])).itertuples()
    assert (mean.mean, mean.n) == (2.0, 2)


@pytest.mark.parametrize(
    ("row", "base", "mean"),
    [
        ({"a": [1.0], "b": [5.0], "c": [math.inf]}, {"a": [3.0], "c": [1.0]}, -2.0),
        ({"a": [math.inf], "b": [math.inf], "c": [5.0]}, {"a": [1.0], "b": [math.inf], "c": [3.0]}, 2.0),
    ],
)
def test_differences_are_of_the_pairs_that_are_finite_in_both(row, base, mean):
    both = pd.concat([values("x", **row), values("base", **base)], ignore_index=True)
    (line,) = tables.differences(both, "base").itertuples()
    assert (line.Index, line.mean, line.n, line.n_inf) == (("x", "psnr"), mean, 1, 0)


def test_the_interval_is_bca_of_all_resamples_at_once(monkeypatch):
    """It leans the way the tail does, more than the percentile interval; batches only save memory."""
    monkeypatch.setattr(tables, "RESAMPLES", 9999)
    sample = np.random.default_rng(3).lognormal(sigma=1.2, size=30)
    plain, bca = (
        stats.bootstrap((sample,), np.mean, n_resamples=9999, method=method, rng=np.random.default_rng(0))
        for method in ("percentile", "BCa")
    )
    low, high = tables.interval(sample.tolist())
    assert (low, high) == pytest.approx(tuple(bca.confidence_interval), rel=1e-12)
    assert high > plain.confidence_interval.high * 1.01 and low > plain.confidence_interval.low


def test_thirty_images_are_enough_and_five_the_fewest():
    assert tables.about_intervals([30, 31]) == ""
    assert tables.about_intervals([29, 30]) == "fewer than 30 images, the intervals are approximate"
    assert tables.about_intervals([4, 4]) == "fewer than 5 images, no intervals"
    assert tables.about_intervals([4, 5]).count("fewer than") == 2
    for samples in ([], [1.0], [1.0, 2.0, 3.0, 4.0], [2.0] * 9, [0.1 + 0.2, *[0.3] * 5]):
        assert all(math.isnan(end) for end in tables.interval(samples)), samples
    assert not any(math.isnan(end) for end in tables.interval([1.0, 2.0, 3.0, 4.0, 5.0]))


def test_values_have_fixed_digits_and_zero_no_minus():
    assert [tables.shown(value) for value in (0.5, 0.0004, -0.000332)] == ["0.500", "0.000", "0.000"]
    assert (tables.shown(-0.0016, 3, "+"), tables.shown(33.333, 2)) == ("-0.002", "33.33")
    assert tables.shown(math.nan) == "-"


# ---------------------------------------------------------------------------------------------------------
# FR


def embed(recognizer: Path, *paths: Path, box: tuple | None = None) -> list[torch.Tensor]:
    """The embedding of each image's box, by default all of it."""
    network = load_recognizer(str(recognizer), CPU, torch.float32)
    images = [to_tensor(np.asarray(Image.open(path))) for path in paths]
    return [network.embed(one, [[box or (0, 0, one.shape[3], one.shape[2])]])[0] for one in images]


def test_fr_is_the_cosine_to_the_source(world, call, tiny_models):
    found = call(eval_facial)
    assert found.table.loc["clean", "mean"] == pytest.approx(1.0, abs=1e-5)  # the edits are the sources
    place = world / f"edits/{STRONG}/seed5/prompt3/ben.png"
    a, b = embed(tiny_models.recognizer, world / "portraits/ben.png", place)
    assert found.each.loc[(STRONG, 3, "ben")].item() == pytest.approx((a @ b).item(), abs=1e-4)
    assert found.each.loc[(STRONG, 3, "ben")].item() < 0.99999
    of_judge = call(eval_facial, "--by judge", output="x.csv").each["facial_judge"]
    assert abs(of_judge[STRONG, 3, "ben"] - (a @ b).item()) > 1e-3
    assert Path("x_left.csv").exists() and Path("x_facial_judge.csv").exists()


class FacesInBrightImages(tiny.WholeImage):
    """A detector that finds a face, the upper left corner, in bright images only."""

    def __init__(self, threshold: float = 100) -> None:
        self.threshold = threshold

    def __call__(self, pixels):
        return [(0, 0, 16, 16), (0, 0, 4, 4)] if pixels.mean() > self.threshold else []


def test_recognised_is_found_and_above_the_threshold():
    edits, sources = torch.tensor([[1.0, 0.0]] * 3 + [[0.6, 0.8]]), torch.tensor([[1.0, 0.0]] * 4)
    sources[2] = torch.nan  # a source without a face
    undetected = torch.tensor([0.0, 1.0, 0.0, 0.0])
    for threshold, expected in ((0.7, [1, 0, -1, 0]), (0.5, [1, 0, -1, 1]), (None, [-1] * 4)):
        found = eval_facial.recognised(edits, sources, threshold, undetected)
        assert found.nan_to_num(-1).tolist() == expected


def test_identified_is_nearest_to_ones_own_portrait():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    own = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 1], [1, 0, 0]], dtype=torch.bool)
    edits = torch.tensor([[0.9, 0.1], [0.1, 0.9], [0.5, 0.8], [0.9, 0.1]])
    sources = torch.ones(4, 2)
    sources[3] = torch.nan
    found = eval_facial.identified(edits, sources, gallery, own)
    assert found.nan_to_num(-1).tolist() == [1, 0, 1, -1]


def test_a_gallery_makes_it_harder_to_be_identified(world, call):
    """Strangers who look like the edits come between an edit and its source."""
    assert call(eval_facial, "--what identified").table.loc["clean", "mean"] == 1
    for place, path in enumerate(sorted((world / "edits/facelock").rglob("*.png"))):
        write(world / "strangers" / f"stranger{place}.png", np.asarray(Image.open(path)))
    means = call(eval_facial, f"--what identified --gallery_dir {world}/strangers").table["mean"]
    assert means[[WEAK, STRONG]].tolist() == [0, 0]


def test_an_edit_without_a_face_gets_its_sources_box_and_is_counted(world, call, tiny_models, monkeypatch):
    place = world / f"edits/{WEAK}/seed5/prompt0/anna.png"
    write(place, tiny.portrait(32) // 8)
    monkeypatch.setattr(features, "FaceDetector", lambda device: FacesInBrightImages(60))
    found = call(eval_facial)
    assert found.status == 0 and "no face was found in 1 of 6 edits" in found.out
    a, b = embed(tiny_models.recognizer, world / "portraits/anna.png", place, box=(0, 0, 16, 16))
    assert found.each["facial"][WEAK, 0, "anna"] == pytest.approx((a @ b).item(), abs=1e-4)


def test_a_source_without_a_face_is_named_and_the_rest_is_scored(world, call, monkeypatch):
    """`cleo` is darkened in source and edits."""
    for path in world.rglob("cleo.png"):
        write(path, tiny.portrait(32, seed=2) // 8)
    monkeypatch.setattr(features, "FaceDetector", lambda device: FacesInBrightImages(60))
    found = call(eval_all)
    assert found.status == 1 and "cleo" in found.err and len(found.each) == 18
    assert {name for _, _, name in found.each.dropna(subset="facial").index} == {"anna", "ben"}
    found = call(eval_facial)
    assert found.status == 1 and "cleo" in found.err and found.table["n"].tolist() == [2, 2, 2]
    monkeypatch.setattr(features, "FaceDetector", lambda device: FacesInBrightImages(300))
    assert "nothing could be scored: no face found in the source" in call(eval_facial).err


def test_left_is_the_same_scale_for_all_judges_and_the_panels_is_the_highest(call, tiny_models):
    panel = f"--recognizer vggface2 --judge {tiny_models.judge} {tiny_models.recognizer} --by judge"
    found = call(eval_facial, panel)  # the attacked one isn't loaded
    assert {*found.each} == {"left", "facial_judge", "facial_recognizer"}
    on_scale = (found.each[["facial_judge", "facial_recognizer"]] - 0.25) / 0.75  # tiny.py's strangers
    np.testing.assert_allclose(found.each["left"], on_scale.max(axis=1), atol=1e-5)
    assert (on_scale["facial_judge"] - on_scale["facial_recognizer"]).abs().max() > 1e-3
    means = tables.read_csv(Path("t_left.csv")).set_index("method")["mean"].sort_index()
    np.testing.assert_allclose(means, found.each.groupby("method")["left"].mean(), atol=1e-5)
    assert call(eval_facial, f"{panel} --what identified", output="rank.csv").status == 0
    names = ["rank_identified_by_any.csv", "rank_identified_judge.csv", "rank_identified_recognizer.csv"]
    of_any, *of_judges = (pd.read_csv(name)["mean"] for name in names)
    assert (of_any >= np.maximum(*of_judges) - 1e-9).all()


def test_by_any_leaves_out_who_cannot_say():
    highest = eval_facial.by_any(lambda own, shared: own + shared, n_judges=2, width=1)
    one, two = torch.tensor([0.1, torch.nan, torch.nan]), torch.tensor([0.2, 0.5, torch.nan])
    found = highest(one, two, torch.tensor([1.0, 1.0, 1.0]))
    assert found.nan_to_num(-1).tolist() == pytest.approx([1.2, 1.5, -1])


def test_a_judge_that_was_trained_here_counts_only_if_it_is_alone():
    def of(*judges):
        return resolve(models="mini", judge=judges, device="cpu")

    bundled = "assets/mini/judge" if Path("assets").exists() else str(ROOT / "assets/mini/judge")
    assert eval_facial.counted(of()) == ["dlib"]
    assert eval_facial.counted(of(bundled)) == ["judge"]
    assert eval_facial.counted(of("dlib", bundled, "vggface2")) == ["dlib", "vggface2"]


def test_an_attacked_recogniser_is_no_judge(call, tiny_models):
    found = call(eval_facial, f"--recognizer {tiny_models.judge}")
    assert found.status == 1 and "the attack sees it" in found.err


def test_people_are_compared_with_their_other_photos(world, call, tiny_models):
    """NAME/* and NAME.*: FR is the mean cosine, and the gallery holds people, not sources."""
    others = world / "others"
    photos = {"anna": ["anna/1", "anna/2"], "ben": ["ben"], "cleo": ["cleo/x"]}
    for number, name in enumerate(file for files in photos.values() for file in files):
        write(others / f"{name}.png", tiny.portrait(48, seed=20 + number))
    each = call(eval_facial, f"--reference_dir {others}").each["facial"]
    for name, files in photos.items():
        paths = [others / f"{file}.png" for file in files]
        edit, *known = embed(tiny_models.recognizer, world / f"edits/clean/seed5/prompt3/{name}.png", *paths)
        cosines = [float(edit @ one) for one in known]
        assert each["clean", 3, name] == pytest.approx(np.mean(cosines), abs=1e-5)
    assert each.max() < 0.999  # the clean edits are the sources, which don't count
    assert call(eval_facial, f"--reference_dir {others} --what identified").status == 0
    (others / "ben.png").unlink()
    shutil.copy(world / "portraits/ben.png", others)  # the source itself is no other photo
    shutil.rmtree(others / "cleo")
    error = call(eval_facial, f"--reference_dir {others}").err
    assert "no other photo of ben, cleo (NAME.* or NAME/*)" in error


# ---------------------------------------------------------------------------------------------------------
# the figure


@pytest.fixture
def seen(monkeypatch) -> SimpleNamespace:
    """What the last figure was drawn of, and itself."""
    found = SimpleNamespace()

    def watch(name, *parts):
        draw = getattr(figure, name)

        def record(*given):
            vars(found).update(zip(parts, given, strict=True), figure=draw(*given))
            return found.figure

        monkeypatch.setattr(figure, name, record)

    watch("draw", "cells", "labels", "columns")
    watch("draw_plot", "points", "ylabel", "xlabel")
    return found


@pytest.fixture
def grid(world, call, seen):
    """Draws a grid -> status, and what it shows; the protected images are 2 and 3 levels away."""
    write_protected(world, weak=2, strong=3)
    flags = f"--src_dir {world}/portraits --protected_dirs {world}/protected/{WEAK} --output f.png"
    flags += f" --defend_edit_dirs {world}/edits/{STRONG}"

    def run(*more: str) -> SimpleNamespace:
        seen.status = call(figure, flags, *more).status
        return seen

    return run


@pytest.fixture
def plot(capsys, seen):
    """Draws a plot -> status, error, and what it shows."""

    def run(line: str) -> SimpleNamespace:
        capsys.readouterr()
        seen.status = figure.main(["plot", *line.split()])
        seen.err = capsys.readouterr().err
        return seen

    return run


def test_the_grid_shows_what_it_says(world, grid, monkeypatch):
    seen = grid("--difference", "--names", "ben", "cleo")
    assert seen.status == 0
    assert seen.columns == ["source", "edit of source", "protected", "difference x10", "edit of protected"]
    assert [label.split("\n")[0] for label in seen.labels] == ["ben", "ben", "cleo", "cleo"]
    assert seen.labels[1].split("\n")[1] == utils.edit_prompts[3]
    source, clean, protected, difference, edited = seen.cells[1]  # ben, prompt 3
    assert np.array_equal(source, tiny.portrait(32, seed=1)) and np.array_equal(clean, source)
    assert np.array_equal(protected, changed(source, 2)) and np.array_equal(edited, changed(source, 11))
    assert set(np.unique(difference)) == {128 - 20, 128 + 20}
    with Image.open("f.png") as picture:
        assert picture.width > 5 * 100 and picture.height > 4 * 100
    protected, edits = ([f"{world}/{of}/{row}" for row in (WEAK, STRONG)] for of in ("protected", "edits"))
    two = ["--protected_dirs", *protected, "--defend_edit_dirs", *edits]
    assert grid(*two, "--titles", "weak", "strong").columns[2:] == [
        "protected\nweak", "edit of protected\nweak", "protected\nstrong", "edit of protected\nstrong"
    ]  # fmt: skip
    assert grid(*two, "--titles", "weak").status == 1
    assert grid("--output", "f.jpg").status == 1
    monkeypatch.setattr(figure, "MOST_LINES", 3)
    assert grid().status == 1


def test_two_dollars_are_no_formula_and_no_bytes_break_a_figure(world, grid):
    """Prompts and names of users: none of them is parsed, and each can be drawn."""
    texts = ["from $5 to $\\frac$", "price: $3_ and $x", "two\tparts", "fourth"]
    (world / "prompts.txt").write_text("\n".join(texts))
    flags = ["--prompt_file", f"{world}/prompts.txt", "--names", "ben", "--titles", "$\\alpha$ \udcff"]
    assert grid(*flags).status == 0
    points = pd.DataFrame({"method": ["$\\frac$", "b $x$"], "value": [0.1, 0.2], "place": ["$1", "$\\frac"]})
    points = points.assign(low=points["value"], high=points["value"])
    figure.save(figure.draw_plot(points, "$\\frac", "two $ and $\\sqrt"), Path("plot.png"))
    assert Path("plot.png").stat().st_size > 1000


def test_the_plot_shows_a_metric_against_visibility(world, call, plot):
    write_protected(world, weak=2, strong=3)
    assert call(eval_all, f"--protected_dirs {world}/protected/facelock").status == 0
    line = "--tables t.csv --metric facial --against psnr"
    seen = plot(line)
    assert seen.points["method"].tolist() == ["clean", "facelock", "facelock"]
    visible = pd.read_csv("t_protected.csv")["psnr"]
    assert [float(place) for place in seen.points["place"][1:]] == pytest.approx(visible.tolist(), rel=1e-3)
    assert seen.points["place"][0] == "" and "PSNR, dB" in seen.xlabel
    assert "--against needs one table" in plot(line.replace("t.csv", "a=t.csv")).err
    text = Path("t_protected.csv").read_text()
    Path("t_protected.csv").write_text(text.replace("facelock", "vae"))
    assert "none of its methods" in plot(line).err
    Path("t_protected.csv").unlink()
    assert "t_protected.csv" in plot(line).err


def test_the_plot_shows_a_metric_against_budget_or_purification_and_the_clean_edits_as_a_line(call, plot):
    of_psnr, table = call(eval_psnr, output="p.csv").table, call(eval_all).table.iloc[1:]
    assert plot("--tables p.csv").points["value"].tolist() == pytest.approx(of_psnr["mean"].tolist())
    points = plot("--tables none=t.csv jpeg:75=t.csv --metric facial").points
    assert points.loc[:1, ["method", "place"]].to_numpy().tolist() == [
        ["clean", "none"], ["facelock, 0.02", "none"]
    ]  # fmt: skip
    assert points["place"][3] == "jpeg:75" and points["value"][0] == pytest.approx(1)
    (axis,) = plot("--tables t.csv --metric facial --output p.pdf").figure.axes
    assert Path("p.pdf").read_bytes().startswith(b"%PDF")
    (clean,) = [line for line in axis.lines if line.get_linestyle() == "--"]
    assert clean.get_label() == "clean" and clean.get_ydata() == pytest.approx([1, 1])
    line, _, (bars,) = axis.containers[0]
    assert line.get_xdata() == pytest.approx([0.02, 0.03])
    assert line.get_ydata() == pytest.approx(table["facial"].tolist())
    ends = table[["facial_low", "facial_high"]].to_numpy()
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], ends)
    text = Path("t.csv").read_text()
    Path("text.csv").write_text(text.replace("0.9", "zero"))
    more = "".join(line + "\n" for line in text.replace("facelock", "b/facelock").splitlines()[2:])
    Path("two.csv").write_text(text + more)
    for line, says in (
        ("none=t.csv --metric beauty", "clip_s"),
        ("a=t.csv a=t.csv --metric psnr", "two are called a"),
        ("nothing.csv", "nothing.csv"),
        ("t.csv a=t.csv --metric psnr", "has no label"),
        ("t.md", "t.md"),
        ("two.csv --metric facial", "facelock at 0.02 has two values"),
        ("text.csv --metric facial", "text.csv"),
    ):
        seen = plot(f"--tables {line}")
        assert seen.status == 1 and says in seen.err, line
