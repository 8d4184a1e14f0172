"""runs.py: finding inputs, batches, the loop that carries on, and what it makes of a directory."""

from __future__ import annotations

import errno
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

import images
import records
import runs
from utils import UserError, temporary_name


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


def item(name: str, size: tuple[int, int] | None = (64, 64), root: Path = Path()) -> runs.Item:
    return runs.Item(root / "in" / name, root / "out" / f"{name}.png", size, label=name)


# ---------------------------------------------------------------------------------------------------------
# inputs and batches


def test_find_images(tmp_path, capsys):
    touch(tmp_path, "b.JPG", "a.png", "c.webp", ".hidden.png", "run.json", "inner/d.png", "dir.png/x.txt")
    assert [path.name for path in runs.find_images(tmp_path)] == ["a.png", "b.JPG", "c.webp"]
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: sub-directories are not searched: dir.png, inner\n"
    )


def test_find_images_says_nothing_of_a_flat_directory(tmp_path, capsys):
    """Nor of what the scripts write beside images."""
    touch(tmp_path, "a.png", "run.json", "manifest.jsonl", "report.csv", ".lock")
    runs.find_images(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_files_of_other_kinds_are_counted_in_one_line(tmp_path, capsys):
    touch(tmp_path, "a.png", "b.txt", "c.mp4", "d.psd", "e", "f.raw", "g.doc", ".hidden")
    runs.find_images(tmp_path)
    told = "6 files of other kinds are left out (b.txt, c.mp4, d.psd, e, f.raw and 1 more)"
    assert capsys.readouterr().err == f"warning: {tmp_path}: {told}\n"


@pytest.mark.parametrize("installed", [False, True])
def test_heic_is_named_with_the_way_out(tmp_path, capsys, monkeypatch, installed):
    monkeypatch.setattr(images.util, "find_spec", lambda name: installed or None)
    touch(tmp_path, "a.png", "b.HEIC")
    found = [path.name for path in runs.find_images(tmp_path)]
    err = capsys.readouterr().err
    assert found == ["a.png", "b.HEIC"][: 1 + installed]
    assert ("1 files of other kinds" in err and "installed" in err) is not installed


@pytest.mark.parametrize(
    ("files", "directory", "message"),
    [
        (["x"], "none", "none: no such directory"),
        (["x"], "x", "x: not a directory"),
        (["d/.keep"], "d", "d: no image files in it"),
        (["d/notes.txt", "d/inner/a.png"], "d", "d: no image files in it"),
        (["d/a.jpg", "d/a.png", "d/b.png"], "d", "a.jpg=a.png"),
        (["d/budget_0.03/a.png"], "d", "it holds budget_{B}, give one of them"),
    ],
)
def test_find_images_refuses(tmp_path, files, directory, message):
    touch(tmp_path, *files)
    with pytest.raises(UserError) as caught:
        runs.find_images(tmp_path / directory)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_batches_hold_one_size_in_order_of_their_first_item():
    wide, tall = (64, 96), (96, 64)
    sizes = {"a": wide, "b": tall, "c": wide, "d": None, "e": wide, "f": None}
    items = [item(name, size) for name, size in sizes.items()]
    found = runs.batches(items, 2, lambda one: one.size or one.output)
    cut = [[one.label for one in batch] for batch in found]
    assert cut == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]


# ---------------------------------------------------------------------------------------------------------
# the loop


class Job:
    """Makes upper-case copies of `in` in `out` by `runs.make`; "bad" can't be read, "bomb" breaks."""

    def __init__(self, root: Path) -> None:
        self.root, self.directory = root, root / "out"
        (root / "in").mkdir()
        self.settings = {"seed": 0, "how": "upper"}
        self.computed: list[list[str]] = []
        self.prepared = 0

    def load(self, one: runs.Item) -> str:
        if "bad" in one.label:
            raise UserError(f"{one.source}: not a readable image")
        return one.source.read_text().upper()

    def work(self, items: list[runs.Item], loaded: list[str], wanted: list[bool]) -> runs.Facts:
        self.computed.append(loaded)
        if any("bomb" in one.label for one in items):
            raise ValueError("too large\nsecond line")
        for one, value, is_wanted in zip(items, loaded, wanted, strict=True):
            if is_wanted:
                one.output.write_text(value)
        return [{"psnr": 1.0}] * sum(wanted)

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self, names: str, **options) -> int:
        """Makes the items, one a letter or word, and forgets what was computed before."""
        self.computed, self.prepared = [], 0
        items = [item(name, root=self.root) for name in names.split()]
        for one in items:
            if not one.source.exists():
                one.source.write_text(one.label)
        return runs.make(
            items,
            self.load,
            self.work,
            self.directory,
            self.settings,
            options=runs.Options(**options),
            prepare=self.prepare,
        )

    @property
    def files(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in sorted(self.directory.glob("*.png"))}


@pytest.fixture
def job(tmp_path) -> Job:
    return Job(tmp_path)


def test_all_is_made_and_recorded(job, capsys):
    assert job("a b c", batch_size=2) == 0
    assert job.computed == [["A", "B"], ["C"]] and job.prepared == 1
    assert job.files == {"a": "A", "b": "B", "c": "C"}
    assert capsys.readouterr().out == f"{job.directory}: 3 written, 0 there already, 0 failed\n"
    assert sorted(os.listdir(job.directory)) == [
        ".lock", "a.png", "b.png", "c.png", "manifest.jsonl", "run.json"
    ]  # fmt: skip
    entries = records.read_manifest(job.directory)
    assert set(entries) == {"a.png", "b.png", "c.png"}
    assert all(found["psnr"] == 1.0 and found["sha256"] for found in entries.values())
    assert entries["a.png"]["source"] == records.digest(job.root / "in/a")


def test_what_is_there_is_not_made_again(job, capsys):
    job("a b c")
    assert job("a b c", batch_size=3) == 0 and job("a b c", overwrite=True, verify=True) == 0
    assert job.computed == [] and job.prepared == 0
    assert "0 written, 3 there already, 0 failed" in capsys.readouterr().out


def test_a_batch_with_a_missing_file_is_computed_whole_and_only_that_file_written(job, capsys):
    job("a b c d", batch_size=2)
    times = {path.stem: path.stat().st_mtime_ns for path in job.directory.glob("*.png")}
    (job.directory / "a.png").unlink()
    assert job("a b c d", batch_size=2) == 0
    assert job.computed == [["A", "B"]] and "1 written, 3 there already" in capsys.readouterr().out
    after = {path.stem: path.stat().st_mtime_ns for path in job.directory.glob("*.png")}
    assert {name for name in "abcd" if after[name] != times[name]} == {"a"}


def test_what_is_stale_is_refused_before_any_work_and_overwrite_makes_just_that(job):
    job("a b c")
    (job.root / "in/b").write_text("somebody else")
    with pytest.raises(UserError, match="b.png: its source has changed"):
        job("a b c d")
    assert job.computed == [] and job.prepared == 0 and set(job.files) == set("abc")
    assert job("a b c d", overwrite=True) == 0
    assert job.computed == [["SOMEBODY ELSE"], ["D"]]
    assert job("a b c d") == 0 and job.computed == []


def test_an_overwriting_run_that_is_killed_leaves_nothing_that_passes_for_its_own(job, monkeypatch):
    """Also of files that no manifest knows: once run.json is written, they would look like its results."""
    job("a b c")
    (job.directory / "manifest.jsonl").unlink()  # as an older version leaves them
    job.settings["how"] = "otherwise"
    with pytest.raises(UserError, match="how: 'upper' there, 'otherwise' now"):
        job("a b c")

    def kill(*_):
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(runs, "go_through", kill)
        with pytest.raises(SystemExit):
            job("a b c", overwrite=True)
    assert job("a b c") == 0 and job.computed == [["A"], ["B"], ["C"]]


def test_files_that_nobody_noted_are_taken_with_a_warning(job, capsys):
    job("a")
    for name in "bcdefgh":
        (job.directory / f"{name}.png").write_text("by hand")
    assert job("a b c d e f g h") == 0 and job.computed == []
    assert (
        f"warning: {job.directory}: nothing says what made b.png, c.png, d.png, e.png, f.png and 2 more; "
        "taken as they are\n"
    ) in capsys.readouterr().err


def test_a_source_that_changes_while_it_is_read_is_never_taken_for_the_one_that_was(job):
    def load(one: runs.Item) -> str:
        text = one.source.read_text().upper()
        one.source.write_text("somebody else")
        return text

    job.load = load
    job("a")
    with pytest.raises(UserError, match="a.png: its source has changed"):
        job("a")


def test_the_loop_carries_on_past_bad_files_and_broken_batches(job, capsys):
    assert job("a bad1 bad2 x bomb b c y", batch_size=2) == 1
    assert job.computed == [["A"], ["X"], ["BOMB", "B"], ["C", "Y"]]
    assert set(job.files) == set("acxy")
    out, err = capsys.readouterr()
    failed = [
        f"{job.root}/in/bad1: not a readable image",
        f"{job.root}/in/bad2: not a readable image",
        "bomb: ValueError: too large",
        "b: ValueError: too large",
    ]
    assert out == f"{job.directory}: 4 written, 0 there already, 4 failed\n"
    assert [line for line in err.splitlines() if line.startswith("  failed")] == [
        f"  failed: {line}" for line in failed
    ]
    assert job("a x", batch_size=2) == 0 and job.computed == []


def test_a_bad_file_whose_output_is_there_is_no_failure(job, capsys):
    """As the batch is computed for another one's sake."""
    job("a b", batch_size=2)
    (job.directory / "a.png").unlink()
    job.load = lambda one: Job.load(job, one) if one.label == "a" else 1 / 0
    assert job("a b", batch_size=2) == 0 and job.computed == [["A"]]
    assert "1 written, 1 there already, 0 failed" in capsys.readouterr().out


def test_an_unexpected_error_while_loading_fails_that_file_alone(job, capsys):
    def load(one):
        if one.label == "b":
            raise RuntimeError("the detector broke")
        return one.label.upper()

    job.load = load
    assert job("a b c", batch_size=2) == 1
    assert "failed: b: RuntimeError: the detector broke" in capsys.readouterr().err
    assert job.computed == [["A"], ["C"]]


def test_debug_raises(job):
    with pytest.raises(ValueError):
        job("bomb", debug=True)


def test_failures_are_told_without_control_characters(job, capsys):
    assert job("bad\x1b[2J") == 1
    err = capsys.readouterr().err
    assert "\x1b[2J" not in err and err.count("bad\\x1b[2J: not a readable image") == 2


def test_images_without_a_record_are_refused(job):
    touch(job.directory, "p0.jpg")
    with pytest.raises(UserError, match="no run.json that says what made them"):
        job("a")
    assert os.listdir(job.directory) == ["p0.jpg"]


# ---------------------------------------------------------------------------------------------------------
# what a killed run left


def test_only_files_that_a_run_can_have_left_are_removed(job, tmp_path):
    names = [
        ".facelock-0123456789ab-123.tmp",
        f"prompt0/{temporary_name(Path('a.png')).name}",
        ".notes.2024.tmp",
        ".a.png.123.tmp",
        "facelock-0123456789ab-123.tmp",
        ".facelock-0123456789ab-x.tmp",
        ".facelock-0123456789AB-123.tmp",
        ".facelock-mine.tmp",
    ]
    touch(job.directory, *names)
    (job.directory / ".facelock-ba9876543210-1.tmp").mkdir()
    (tmp_path / "precious").write_text("precious")
    (job.directory / ".facelock-000000000000-1.tmp").symlink_to(tmp_path / "precious")
    assert job("a") == 0
    kept = [*names[2:], ".facelock-ba9876543210-1.tmp", "prompt0"]
    made = [".lock", "a.png", "manifest.jsonl", "run.json"]
    assert sorted(os.listdir(job.directory)) == sorted([*kept, *made])
    assert os.listdir(job.directory / "prompt0") == []
    assert (tmp_path / "precious").read_text() == "precious"


def test_the_parts_of_a_killed_runs_manifest_are_gathered(job):
    job("a b c")
    lines = (job.directory / "manifest.jsonl").read_text().splitlines(keepends=True)
    (job.directory / "manifest.jsonl").unlink()
    for rank, line in enumerate(lines):
        (job.directory / f"manifest.{rank}.jsonl").write_text(line + line[: 10 * rank])
    assert job("a b c d") == 0 and job.computed == [["D"]]
    assert [path.name for path in job.directory.glob("manifest*")] == ["manifest.jsonl"]
    assert set(records.read_manifest(job.directory)) == {"a.png", "b.png", "c.png", "d.png"}


def test_a_disk_that_is_full_at_the_end(job, monkeypatch, capsys):
    """What was made is told all the same, and the next run gathers the manifest."""

    def refuse(directory):
        if (directory / "a.png").exists():
            raise UserError("No space left on device")

    monkeypatch.setattr(records, "gather_manifest", refuse)
    assert job("a") == 0 and "1 written" in capsys.readouterr().out
    monkeypatch.undo()
    assert (job.directory / "manifest.0.jsonl").exists()
    assert job("a b") == 0 and job.computed == [["B"]]


def test_a_disk_that_is_full_for_one_file(job, capsys):
    def work(items, loaded, wanted):
        if items[0].label == "b":
            items[0].output.write_text("half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return Job.work(job, items, loaded, wanted)

    job.work = work
    assert job("a b c") == 1 and "2 written, 0 there already, 1 failed" in capsys.readouterr().out
    del job.work
    assert job("a b c") == 0 and job.files["b"] == "B" and job.computed == [["B"]]


# ---------------------------------------------------------------------------------------------------------
# interrupts and memory


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_finishes_the_batch(job, capsys, number, status):
    def work(items, loaded, wanted):
        if items[0].label == "c":
            os.kill(os.getpid(), number)
        return Job.work(job, items, loaded, wanted)

    before = signal.getsignal(number)
    job.work = work
    assert job("a b c d e f", batch_size=2) == status
    assert set(job.files) == set("abcd") and signal.getsignal(number) is before
    assert "4 written, 0 there already, 0 failed; stopped" in capsys.readouterr().out
    assert job("a b c d e f", batch_size=2) == 0 and job.computed == [["E", "F"]]


@pytest.mark.parametrize(
    ("number", "raised"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)]
)
def test_a_second_interrupt_stops_at_once(job, number, raised):
    def work(items, loaded, wanted):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        time.sleep(0.1)
        pytest.fail("went on")

    job.work = work
    with pytest.raises(raised):
        job("a")
    assert job.files == {}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:115] DefaultCPUAllocator: can't allocate memory: you"),
    ],
)
def test_too_little_memory_halves_the_batch(job, capsys, error):
    sizes = []

    def work(items, loaded, wanted):
        sizes.append(len(items))
        if len(items) > 3:
            raise error
        return Job.work(job, items, loaded, wanted)

    job.work = work
    assert job(" ".join(f"{k}{n}" for k in "ab" for n in range(8)), batch_size=8) == 0
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    out = capsys.readouterr().out
    assert "16 written, 0 there already, 0 failed" in out
    assert "out of memory with 8 at a time; going on with 4" in out and "going on with 2" in out


def test_one_alone_that_is_too_large_is_a_failure(job, capsys):
    def work(items, loaded, wanted):
        raise torch.OutOfMemoryError("CUDA out of memory")

    job.work = work
    assert job("a b", batch_size=2) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("  failed")]
    assert failed == [f"  failed: {name}: OutOfMemoryError: CUDA out of memory" for name in "ab"]


# ---------------------------------------------------------------------------------------------------------
# names as long as names may be


def test_names_of_251_bytes_and_more(job):
    """The temporary name doesn't add to them."""

    def work(items, loaded, wanted):
        for one in items:
            images.save_png(one.output, images.load_image(one.source).pixels)
        return [{}] * len(items)

    stems = ["x" * 251, "ü" * 125, "y" * 250]
    for stem in stems:
        Image.new("RGB", (8, 8)).save(job.root / "in" / f"{stem}.png")
    items = [
        runs.Item(job.root / "in" / f"{stem}.png", job.directory / f"{stem}.png", (8, 8), stem)
        for stem in stems
    ]
    assert runs.make(items, lambda one: one.label, work, job.directory, job.settings) == 0
    assert {path.stem for path in job.directory.glob("*.png")} == set(stems)
