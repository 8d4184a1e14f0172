"""records.py: run.json, the manifest, and what of a directory is still true."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

import records
import transforms
from models import faces, vaes
from utils import UserError

SETTINGS = {"seed": 0, "step_size": 0.01, "defend_method": "vae"}
VERSIONS = {"python": "3.11", "torch": "2.9"}


@pytest.fixture(autouse=True)
def versions(monkeypatch) -> dict[str, str]:
    """The versions of this test's packages, which it may change."""
    now = dict(VERSIONS)
    monkeypatch.setattr(records, "versions", lambda: dict(now))
    return now


def write(directory: Path, settings=SETTINGS, prompts=None, sources="in") -> dict:
    records.write_record(directory, settings, prompts or {}, Path(sources))
    return records.read_record(directory)


def test_code_is_that_of_all_that_is_named_here_and_in_the_files_beside():
    found = records.code_of(records.read_record)
    assert "def first_line(error" in found and "def read_record(" in found  # one of utils.py
    assert '"""' not in found and "def write_record(" not in found
    assert "NAMED = 5" in records.code_of(records.listed)
    assert "TABLES = ((16, 11," in records.code_of(transforms.quantisation)


def test_the_code_of_what_objectives_are_offered_is_that_of_its_classes_too():
    assert "class" not in records.code_of(faces.face_similarity_to)
    found = records.code_of(faces.face_similarity_to, classes=True)
    assert "class Recognizer:" in found and "def face_similarity_to(" in found and '"""' not in found
    assert records.code_of(vaes.WorkingVAE, classes=True).startswith("class WorkingVAE")


# ---------------------------------------------------------------------------------------------------------
# run.json


def test_a_record_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_defend.py", "--seed=0"])
    assert records.read_record(tmp_path) is None
    assert write(tmp_path / "new") == {
        "seed": 0,
        "arguments": {"step_size": 0.01, "defend_method": "vae"},
        "sources": str(Path("in").resolve()),
        "command": ["main_defend.py", "--seed=0"],
        "versions": VERSIONS,
    }
    assert os.listdir(tmp_path / "new") == ["run.json"]


def test_versions_are_those_of_what_decides_about_pixels(monkeypatch):
    monkeypatch.undo()
    found = records.versions()
    assert set(found) == {"python", *records.PACKAGES} and found["torch"][0].isdigit()
    monkeypatch.setattr(records, "PACKAGES", ["no-such-package"])
    assert records.versions()["no-such-package"] == "not installed"


def test_every_difference_is_named_and_nothing_that_the_record_does_not_know(tmp_path):
    old = write(tmp_path, prompts={0: "hat", 3: "beard"})
    assert records.differences(old, {**SETTINGS, "code": "new here"}, {3: "beard", 7: "ears"}) == []
    found = records.differences(old, {**SETTINGS, "seed": 1, "step_size": 0.003}, {3: "scarf"})
    assert found == [
        "prompt 3: 'beard' there, 'scarf' now",
        "seed: 0 there, 1 now",
        "step_size: 0.01 there, 0.003 now",
    ]
    assert records.differences(None, SETTINGS, {}) == []


def test_what_is_recorded_only_where_it_is_used_is_compared_either_way(tmp_path):
    masked = {**SETTINGS, "budget_mask": "face"}
    old = write(tmp_path / "plain")
    assert records.differences(old, masked, {}) == ["budget_mask: 'none' there, 'face' now"]
    old = write(tmp_path / "masked", masked)
    assert records.differences(old, SETTINGS, {}) == ["budget_mask: 'face' there, 'none' now"]
    old = write(tmp_path / "two", {**SETTINGS, "vae_ids": ["a", "b"]})
    assert records.differences(old, SETTINGS, {}) == ["vae_ids: ['a', 'b'] there, None now"]


def test_prompts_are_merged(tmp_path):
    write(tmp_path, prompts={0: "hat", 3: "beard"})
    merged = write(tmp_path, prompts={3: "beard", 7: "ears"})["prompts"]
    assert merged == {"0": "hat", "3": "beard", "7": "ears"}
    assert write(tmp_path, {**SETTINGS, "seed": 1}, {3: "scarf"})["prompts"] == {"3": "scarf"}


def test_where_the_sources_are_is_recorded_but_not_compared(tmp_path):
    write(tmp_path, sources="before")
    assert records.differences(records.read_record(tmp_path), SETTINGS, {}) == []
    assert write(tmp_path, sources=tmp_path / "moved")["sources"] == str(tmp_path / "moved")


def test_other_versions_are_one_line_and_a_second_entry(tmp_path, versions, capsys):
    write(tmp_path)
    write(tmp_path)
    assert capsys.readouterr().err == ""
    versions["torch"] = "2.10"
    for _ in range(2):  # said once
        record = write(tmp_path)
        assert record["versions"] == VERSIONS
        assert record["later_versions"] == [{**VERSIONS, "torch": "2.10"}]
    err = capsys.readouterr().err
    assert err == f"warning: {tmp_path} was begun with other versions: torch 2.9, now 2.10\n"
    versions["torch"] = "2.9"
    assert write(tmp_path)["later_versions"] == [{**VERSIONS, "torch": "2.10"}]
    versions["python"] = "3.12"
    assert len(write(tmp_path)["later_versions"]) == 2
    assert "later_versions" not in write(tmp_path, {**SETTINGS, "seed": 1})  # made anew


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"seed": 1}', '{"arguments": 3}', '{"arguments": {}, "prompts": {"x": ""}}', "\xff"],
)
def test_damaged_record(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="run.json: not a record of a run") as caught:
        records.read_record(tmp_path)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# the manifest


def entry(name: str, **more) -> str:
    return json.dumps({"output": name, **more}) + "\n"


def test_a_file_in_the_making_and_a_finished_one(tmp_path):
    output = tmp_path / "prompt0" / "a.png"
    records.note(tmp_path, 2, output, "source's", "settings'")
    assert records.read_manifest(tmp_path) == {
        "prompt0/a.png": {"output": "prompt0/a.png", "source": "source's", "settings": "settings'"}
    }
    output.parent.mkdir()
    output.write_bytes(b"data")
    records.note(tmp_path, 2, output, "source's", "settings'", **records.made(output), psnr=30.0)
    (found,) = records.read_manifest(tmp_path).values()
    assert found == {
        "output": "prompt0/a.png",
        "source": "source's",
        "settings": "settings'",
        "sha256": records.digest(output),
        "bytes": 4,
        "psnr": 30.0,
    }
    assert len((tmp_path / "manifest.2.jsonl").read_text().splitlines()) == 2


def test_the_last_line_counts_and_half_a_line_does_not(tmp_path):
    half = entry("c", n=1)[:-5]
    damaged = ["\n", "[]\n", "3\n", '{"source": 1}\n', "not JSON\n"]
    (tmp_path / "manifest.jsonl").write_text(entry("a", n=1) + entry("b", n=1) + "".join(damaged))
    (tmp_path / "manifest.0.jsonl").write_text(entry("a", n=2) + half)
    (tmp_path / "manifest.1.jsonl").write_bytes(entry("d", n=1).encode() + b"\xff\xfe\n")
    assert {name: found["n"] for name, found in records.read_manifest(tmp_path).items()} == {
        "a": 2,
        "b": 1,
        "d": 1,
    }


def test_the_parts_of_several_processes_are_gathered(tmp_path):
    records.gather_manifest(tmp_path)
    assert os.listdir(tmp_path) == []
    (tmp_path / "manifest.jsonl").write_text(entry("a", n=1) + entry("b", n=1))
    for rank in (0, 1, 10):
        (tmp_path / f"manifest.{rank}.jsonl").write_text(entry(f"of{rank}", n=rank) + entry("half", n=1)[:9])
    (tmp_path / "manifest.0.jsonl").write_text(entry("b", n=2) + entry("b", n=3))
    before = records.read_manifest(tmp_path)
    records.gather_manifest(tmp_path)
    assert os.listdir(tmp_path) == ["manifest.jsonl"] and records.read_manifest(tmp_path) == before
    assert before["b"]["n"] == 3 and set(before) == {"a", "b", "of1", "of10"}
    assert len((tmp_path / "manifest.jsonl").read_text().splitlines()) == 4


def test_names_that_are_no_text_are_noted(tmp_path):
    name = os.fsdecode(b"latin\xe9\n.png")
    records.note(tmp_path, 0, tmp_path / name, "", "")
    assert list(records.read_manifest(tmp_path)) == [name]


def test_a_digest_is_of_the_bytes_that_are_there_now(tmp_path):
    path = tmp_path / "a"
    assert records.digest(path) == "" == records.digest(tmp_path)
    found = []
    for content in (b"one", b"two", b"one"):
        path.write_bytes(content)
        os.utime(path, ns=(len(found), len(found)))
        found.append(records.digest(path))
    assert found[0] == found[2] != found[1] and len(found[0]) == 64


# ---------------------------------------------------------------------------------------------------------
# what of a directory is still true


class Results:
    """A directory of results of the sources a, b and c, as a run leaves it."""

    def __init__(self, root: Path) -> None:
        self.directory = root / "out"
        self.sources = root / "in"
        self.sources.mkdir()
        for name in "abc":
            (self.sources / f"{name}.png").write_text(f"source {name}")
        self.prompts: dict[int, str] = {}
        self.items = [(self.directory / f"{name}.png", self.sources / f"{name}.png", None) for name in "abc"]
        self.settings = dict(SETTINGS)

    def make(self, *names: str) -> None:
        records.write_record(self.directory, self.settings, self.prompts, self.sources)
        for output, source, prompt in self.items:
            if output.stem in names:
                output.parent.mkdir(exist_ok=True)
                output.write_text(f"result of {source.read_text()}")
                key = records.hash_of([self.settings, prompt])
                made = records.made(output)
                records.note(self.directory, 0, output, records.digest(source), key, **made)

    def look(self, **flags: bool) -> tuple[dict[Path, str], list[Path]]:
        flags = {"overwrite": False, "verify": False} | flags
        return records.make_plan(self.directory, self.items, self.settings, self.prompts, **flags)

    def wanted(self, **flags: bool) -> str:
        return "".join(sorted(path.stem for path in self.look(**flags)[0]))

    def refused(self, why: str, **flags: bool) -> None:
        with pytest.raises(UserError) as caught:
            self.look(**flags)
        assert why in str(caught.value) and str(self.directory) in str(caught.value)


@pytest.fixture
def results(tmp_path) -> Results:
    return Results(tmp_path)


def test_what_is_missing_is_wanted(results):
    assert results.wanted() == "abc"
    results.make("a", "c")
    assert results.wanted() == "b" == results.wanted(overwrite=True) == results.wanted(verify=True)


def test_a_source_that_was_replaced(results):
    results.make("a", "b", "c")
    (results.sources / "b.png").write_text("somebody else")
    results.refused("b.png: its source has changed; --overwrite makes them again")
    assert results.wanted(overwrite=True) == "b"
    results.make("b")
    assert results.wanted() == ""


def test_an_output_that_was_replaced(results):
    """Its size is looked at, with --verify its bytes."""
    results.make("a", "b", "c")
    output = results.directory / "b.png"
    data = output.read_text()
    output.write_text(data.upper())
    assert results.wanted() == ""
    results.refused("b.png: not the file that was written", verify=True)
    assert results.wanted(verify=True, overwrite=True) == "b"
    for other in ("", data + "more"):
        output.write_text(other)
        results.refused("b.png: not the file that was written")


def test_an_output_that_is_no_file(results):
    results.make("a", "b", "c")
    (results.directory / "b.png").unlink()
    (results.directory / "b.png").mkdir()
    results.refused("b.png: not a file")


def test_other_settings_are_listed_one_by_one(results):
    results.make("a", "b", "c")
    results.settings |= {"step_size": 0.003, "defend_method": "encoder"}
    results.refused(
        "was made with other arguments (defend_method: 'vae' there, 'encoder' now; "
        "step_size: 0.01 there, 0.003 now); --overwrite makes its files again"
    )
    assert results.wanted(overwrite=True) == "abc"


def test_another_code_is_another_setting(results):
    """Also for files of which run.json doesn't know any more: their own lines do."""
    results.settings["code"] = "old"
    results.make("a", "b", "c")
    results.settings["code"] = "new"
    results.refused("code: 'old' there, 'new' now")
    results.make("a")  # which writes run.json anew, and is killed then
    results.refused("b.png: other settings or instruction, c.png: other settings or instruction")
    assert results.wanted(overwrite=True) == "bc"


def test_files_that_would_stay_behind_under_other_settings(results):
    results.make("a", "b", "c")
    results.settings["seed"] = 1
    results.items = results.items[:1]
    for flags in ({}, {"overwrite": True}):
        results.refused("and this run doesn't make all of its files again (b.png, c.png)", **flags)


def test_the_first_five_and_a_count(results):
    results.items = [(results.directory / f"{n}.png", results.sources / "a.png", None) for n in range(8)]
    results.make(*map(str, range(8)))
    (results.sources / "a.png").write_text("somebody else")
    why = ", ".join(f"{n}.png: its source has changed" for n in range(5))
    results.refused(f"not the results of this run: {why} and 3 more; --overwrite makes them again")


def test_an_instruction_that_changed(results):
    results.items = [
        (results.directory / f"prompt{n}/a.png", results.sources / "a.png", text)
        for n, text in enumerate(("hat", "beard"))
    ]
    results.prompts = {0: "hat", 1: "beard"}
    results.make("a")
    assert results.wanted() == ""
    results.items[1] = (*results.items[1][:2], "scarf")
    results.refused("prompt1/a.png: other settings or instruction")
    results.prompts[1] = "scarf"
    results.refused("prompt 1: 'beard' there, 'scarf' now")


def test_the_file_in_flight_is_made_again(results):
    results.make("a", "b")
    for name in "bc":
        records.note(results.directory, 0, results.directory / f"{name}.png", "", "")
    (results.directory / "c.png").write_text("whole, but nobody said so")
    assert results.wanted() == "bc"


def test_files_that_nobody_noted_are_known_as_such(results):
    """By hand, or by an older version of this project; an empty one is none."""
    results.make()
    (results.directory / "a.png").write_text("by hand")
    wanted, unknown = results.look()
    assert unknown == [results.directory / "a.png"]
    assert {path.stem for path in wanted} == {"b", "c"}
    (results.directory / "b.png").touch()
    results.refused("b.png: empty")
    assert results.wanted(overwrite=True) == "bc"
    results.settings["seed"] = 1
    results.refused("seed: 0 there, 1 now")
    assert results.wanted(overwrite=True) == "abc"


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "else.webp", "prompt0/a.JPG"])
def test_images_without_a_record_are_refused(results, name):
    """As the authors' release leaves them: PNGs between them could not be told apart."""
    path = results.directory / name
    path.parent.mkdir(parents=True)
    path.touch()
    for flags in ({}, {"overwrite": True}):
        results.refused(f"has images ({path.name}), but no run.json that says what made them", **flags)


@pytest.mark.parametrize("name", [".hidden.png", "notes.txt", "inner/a.png"])
def test_other_files_do_not_matter(results, name):
    (results.directory / name).parent.mkdir(parents=True)
    (results.directory / name).touch()
    assert results.wanted() == "abc"


def test_a_data_set_that_moved_is_the_same(results, tmp_path):
    results.make("a", "b", "c")
    moved = results.sources.rename(tmp_path / "elsewhere")
    out = results.directory.rename(tmp_path / "results")
    results.items = [(out / output.name, moved / source.name, text) for output, source, text in results.items]
    results.directory = out
    assert results.wanted() == ""
