"""runs.py: finding inputs, batches, run.json, the loop that carries on."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

import models
import runs
from utils import UserError


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


def item(name: str, size: tuple[int, int] | None = (64, 64), out: Path = Path("out")) -> runs.Item:
    return runs.Item(Path("in") / name, out / f"{name}.png", size, label=name)


# ---------------------------------------------------------------------------------------------------------
# inputs and batches


def test_find_images(tmp_path, capsys):
    touch(tmp_path, "b.JPG", "a.png", "c.webp", ".hidden.png", "notes.txt", "inner/d.png", "dir.png/x.txt")
    assert [path.name for path in runs.find_images(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
    err = capsys.readouterr().err
    assert "sub-directories are not searched" in err and "inner" in err and "dir.png" in err


def test_find_images_says_nothing_of_a_flat_directory(tmp_path, capsys):
    touch(tmp_path, "a.png")
    runs.find_images(tmp_path)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("files", "directory", "message"),
    [
        (["x"], "none", "none: no such directory"),
        (["x"], "x", "x: not a directory"),
        (["d/.keep"], "d", "d: no image files in it"),
        (["d/notes.txt", "d/inner/a.png"], "d", "d: no image files in it"),
        (["d/a.jpg", "d/a.png", "d/b.png"], "d", "a.jpg=a.png"),
    ],
)
def test_find_images_refuses(tmp_path, files, directory, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError) as caught:
        runs.find_images(tmp_path / directory)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_batches_hold_one_size_in_order_of_their_first_item():
    wide, tall = (64, 96), (96, 64)
    items = [
        item("a", wide),
        item("b", tall),
        item("c", wide),
        item("d", None),
        item("e", wide),
        item("f", None),
    ]
    cut = [[one.label for one in batch] for batch in runs.batches(items, 2)]
    assert cut == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]


# ---------------------------------------------------------------------------------------------------------
# run.json


def record(**changes) -> dict:
    arguments = {"step_size": 0.01, "batch_size": 1, "device": "cpu", "judge": "x", "defend_method": "vae"}
    seed = changes.pop("seed", 0)
    more = {"prompts": changes.pop("prompts")} if "prompts" in changes else {}
    return {"seed": seed, "arguments": {**arguments, **changes}, "versions": {}, **more}


def test_record_comes_back(tmp_path):
    assert runs.read_record(tmp_path) is None
    runs.write_record(tmp_path / "new", record())
    assert runs.read_record(tmp_path / "new") == record()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["run.json"]


@pytest.mark.parametrize("changes", [{}, {"batch_size": 8, "device": "cuda", "judge": "y", "debug": True}])
def test_record_that_makes_the_same_pixels_is_accepted_and_the_old_one_stays(tmp_path, changes):
    runs.write_record(tmp_path, record())
    assert runs.check_record(tmp_path, {**record(**changes), "versions": {"torch": "9"}}) == record()


def test_record_that_makes_other_pixels_is_refused_and_every_difference_listed(tmp_path):
    runs.write_record(tmp_path, record())
    with pytest.raises(UserError) as caught:
        runs.check_record(tmp_path, record(step_size=0.003, batch_size=8, seed=1, c=0.5))
    text = str(caught.value)
    assert str(tmp_path) in text and "\n" not in text
    assert "step_size: 0.01 there, 0.003 now" in text and "seed: 0 there, 1 now" in text
    assert "c: None there, 0.5 now" in text
    assert "batch_size" not in text and "defend_method" not in text


def test_prompts_are_merged_and_their_texts_compared(tmp_path):
    runs.write_record(tmp_path, record(prompts={"0": "hat", "3": "beard"}))
    merged = runs.check_record(tmp_path, record(prompts={"3": "beard", "7": "ears"}))
    assert merged["prompts"] == {"0": "hat", "3": "beard", "7": "ears"}
    with pytest.raises(UserError, match="prompt 3: 'beard' there, 'scarf' now"):
        runs.check_record(tmp_path, record(prompts={"3": "scarf"}))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"seed": 1}', '{"arguments": 3}'])
def test_damaged_record(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(UserError, match="run.json: not a record of a run") as caught:
        runs.check_record(tmp_path, record())
    assert "\n" not in str(caught.value)


def test_record_holds_the_arguments_as_they_took_effect():
    chosen = dataclasses.replace(
        models.MODEL_SETS["mini"], resolution=96, editors={"instruct-pix2pix": "me/ed"}
    )
    args = argparse.Namespace(
        seed=5,
        model="instruct-pix2pix",
        model_id=None,
        resolution=None,
        lpips=None,
        c=None,
        strength=0.5,
        prompts=[1],
        src_dir=Path("a/../b"),
    )
    made = runs.record_of(args, chosen, "torch.float32", {"c": 0.03, "strength": None})
    assert made["seed"] == 5
    assert made["arguments"] == {
        "c": 0.03,
        "dtype": "float32",
        "lpips": "assets/mini/perceptual",
        "model": "instruct-pix2pix",
        "model_id": "me/ed",
        "resolution": 96,
        "src_dir": models.shown(str(Path("b").resolve())),
    }
    assert set(made["versions"]) == {"python", *runs.PACKAGES} and made["versions"]["torch"][0].isdigit()
    json.dumps(made)


# ---------------------------------------------------------------------------------------------------------
# the loop


class Loop:
    """`run_batches` with a load that refuses "bad" and a work that writes labels and breaks on "bomb"."""

    def __init__(self) -> None:
        self.computed: list[list[str]] = []

    def load(self, one: runs.Item) -> str:
        if "bad" in one.label:
            raise UserError(f"{one.source}: not a readable image")
        return one.label.upper()

    def work(self, items: list[runs.Item], loaded: list[str], wanted: list[bool]) -> None:
        self.computed.append(loaded)
        if any("bomb" in one.label for one in items):
            raise ValueError("too large\nsecond line")
        for one, value, is_wanted in zip(items, loaded, wanted, strict=True):
            if is_wanted:
                one.output.write_text(value)

    def __call__(self, batches: list[list[runs.Item]], **flags: bool) -> runs.Summary:
        settings = {"overwrite": False, "debug": False, "unit": "x"} | flags
        return runs.run_batches(batches, self.load, self.work, **settings)


def make(tmp_path: Path, *batches: str) -> list[list[runs.Item]]:
    return [[item(name, out=tmp_path) for name in batch.split()] for batch in batches]


def test_a_batch_with_a_missing_file_is_computed_whole_and_only_that_file_written(tmp_path):
    batches = make(tmp_path, "a b", "c d")
    for done in "bcd":
        (tmp_path / f"{done}.png").write_text("old")
    loop = Loop()
    summary = loop(batches)
    assert loop.computed == [["A", "B"]]
    assert [(tmp_path / f"{name}.png").read_text() for name in "abcd"] == ["A", "old", "old", "old"]
    assert (summary.made, summary.skipped, summary.failed) == (1, 3, [])
    assert summary.status == 0


def test_processes_share_what_is_left_to_do(monkeypatch):
    """Or those with finished batches alone would wait, and one could have all the work."""
    parts = []
    for rank in range(2):
        team = runs.Team(rank, 2)
        monkeypatch.setattr(runs.Team, "once", lambda self, work: work())
        parts.append(team.share("aBcDeF", str.islower))
    assert parts == [["a", "e", "B", "F"], ["c", "D"]]
    assert runs.Team().share("aBc", str.islower) == ["a", "c", "B"]


def test_a_process_that_is_done_waits_long_enough(monkeypatch):
    import accelerate

    given = {}

    def state(**options):
        given.update(options)
        return SimpleNamespace(process_index=1)

    monkeypatch.setattr(accelerate, "PartialState", state)
    monkeypatch.setenv("WORLD_SIZE", "2")
    team = runs.Team.gather(argparse.Namespace(device="cpu"))
    assert (team.rank, team.size) == (1, 2)
    assert given == {"cpu": True, "timeout": runs.LONGEST_WAIT} and runs.LONGEST_WAIT.days >= 7


def test_overwrite_makes_all_again(tmp_path):
    batches = make(tmp_path, "a b")
    (tmp_path / "a.png").write_text("old")
    summary = Loop()(batches, overwrite=True)
    assert (summary.made, summary.skipped) == (2, 0) and (tmp_path / "a.png").read_text() == "A"


def test_the_loop_carries_on_past_bad_files_and_broken_batches(tmp_path, capsys):
    loop = Loop()
    summary = loop(make(tmp_path, "a bad1", "bad2", "bomb b", "c"))
    assert loop.computed == [["A"], ["BOMB", "B"], ["C"]]
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]
    assert summary.failed == [
        "in/bad1: not a readable image",
        "in/bad2: not a readable image",
        "bomb: ValueError: too large",
        "b: ValueError: too large",
    ]
    capsys.readouterr()
    summary.print(tmp_path)
    assert summary.status == 1
    out, err = capsys.readouterr()
    assert out == f"{tmp_path}: 2 written, 0 there already, 4 failed\n"
    assert [line.strip() for line in err.splitlines()] == [f"failed: {line}" for line in summary.failed]


def test_a_bad_file_whose_output_is_there_is_no_failure(tmp_path):
    (tmp_path / "bad.png").touch()
    loop = Loop()
    summary = loop(make(tmp_path, "a bad"))
    assert (summary.made, summary.skipped, summary.failed) == (1, 1, []) and loop.computed == [["A"]]


def test_an_unexpected_error_while_loading_fails_that_file_alone(tmp_path, monkeypatch):
    def load(self, one):
        if one.label == "b":
            raise RuntimeError("the detector broke")
        return one.label.upper()

    monkeypatch.setattr(Loop, "load", load)
    loop = Loop()
    assert loop(make(tmp_path, "a b", "c")).failed == ["b: RuntimeError: the detector broke"]
    assert loop.computed == [["A"], ["C"]]


def test_debug_raises(tmp_path):
    with pytest.raises(ValueError):
        Loop()(make(tmp_path, "bomb"), debug=True)
