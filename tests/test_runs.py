"""runs.py: a run over a directory, and what of an earlier one it takes for finished."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import experiment
import provenance
import runs
from models.loading import ROOT
from utils import UserError, temporary_name


def touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


class Copies:
    """Makes upper-case copies of `in` in `out`; "bad" can't be read, "bomb" breaks."""

    def __init__(self, root: Path) -> None:
        self.root, self.directory = root, root / "out"
        (root / "in").mkdir()
        self.settings = {"seed": 0, "how": "upper"}
        self.prompts: dict[int, str] = {}
        self.computed: list[str] = []  # the batches of the last run
        self.prepared = 0

    def load(self, item: runs.Item) -> str:
        if "bad" in item.label:
            raise UserError(f"{item.source}: not a readable image")
        return item.source.read_text().upper()

    def work(self, items: list[runs.Item], loaded: list[str], wanted: list[bool]) -> runs.Facts:
        self.computed.append("".join(loaded))
        if any("bomb" in item.label for item in items):
            raise ValueError("too large\nsecond line")
        for item, value, is_wanted in zip(items, loaded, wanted, strict=True):
            if is_wanted:
                item.output.write_text(value)
        return [{"psnr": 1.0}] * sum(wanted)

    def prepare(self) -> None:
        self.prepared += 1

    def __call__(self, names: str, **options) -> int:
        """Makes some files, one per word, and forgets what was computed before."""
        self.computed, self.prepared, items = [], 0, []
        for name in names.split():
            source = self.root / "in" / name
            if not source.exists():
                source.write_text(name)
            items.append(runs.Item(source, self.directory / f"{name}.png", (64, 64), name))
        options = runs.Options(**options)
        how = {"prompts": self.prompts, "prepare": self.prepare}
        return runs.Job(items, self.load, self.work, self.directory, self.settings, options, **how).run()

    def refuses(self, names: str, why: str, **options) -> None:
        """Tells that a run ends before any work, in one line with this in it."""
        before = self.files
        with pytest.raises(UserError) as caught:
            self(names, **options)
        assert why in str(caught.value) and str(self.directory) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert self.computed == [] and self.prepared == 0 and self.files == before

    @property
    def files(self) -> dict[str, str]:
        return {path.stem: path.read_text() for path in sorted(self.directory.glob("*.png"))}

    @property
    def record(self) -> dict:
        return json.loads((self.directory / "run.json").read_text())


@pytest.fixture
def copies(tmp_path) -> Copies:
    return Copies(tmp_path)


def test_batches_hold_one_size_in_order_of_their_first_item():
    sizes = {"a": "wide", "b": "tall", "c": "wide", "d": 1, "e": "wide", "f": 2}
    assert runs.batches(list(sizes), 2, sizes.get) == [["a", "c"], ["b"], ["d"], ["e"], ["f"]]


# ---------------------------------------------------------------------------------------------------------
# what is finished


def test_all_is_made_and_recorded(copies, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["main_defend.py", "--seed=0"])
    copies.prompts = {3: "beard"}
    assert copies("a b c", batch_size=2) == 0
    assert copies.computed == ["AB", "C"] and copies.prepared == 1
    assert copies.files == {"a": "A", "b": "B", "c": "C"}
    assert capsys.readouterr().out == f"{copies.directory}: 3 written, 0 there already, 0 failed\n"
    made = [".facelock.0.lock", "a.png", "b.png", "c.png", "manifest.jsonl", "run.json"]
    assert sorted(os.listdir(copies.directory)) == made
    record = copies.record
    assert (record["seed"], record["arguments"], record["prompts"]) == (0, {"how": "upper"}, {"3": "beard"})
    assert record["command"] == ["main_defend.py", "--seed=0"]
    assert record["versions"] == provenance.versions()
    entries = runs.read_manifest(copies.directory)
    assert set(entries) == {"a.png", "b.png", "c.png"}
    assert entries["a.png"] == {
        "output": "a.png",
        "source": runs.digest(copies.root / "in/a"),
        "sha256": runs.digest(copies.directory / "a.png"),
        "bytes": 1,
        "psnr": 1.0,
    }


def test_what_is_there_is_not_made_again(copies, capsys, tmp_path):
    """Nor after the data set was moved; new ones are added."""
    copies("a b c")
    assert copies("a b c", batch_size=3) == 0 and copies("a b c", overwrite=True, verify=True) == 0
    assert copies.computed == [] and copies.prepared == 0
    assert "0 written, 3 there already, 0 failed" in capsys.readouterr().out
    copies.root = tmp_path / "elsewhere"
    copies.root.mkdir()
    (tmp_path / "in").rename(copies.root / "in")
    copies.directory = copies.directory.rename(copies.root / "results")
    assert copies("a b c d") == 0 and copies.computed == ["D"]
    assert copies.record["sources"] == str(copies.root / "in")


def test_a_batch_with_a_missing_file_is_computed_whole_and_only_that_file_written(copies, capsys):
    copies("a b c d", batch_size=2)
    (copies.directory / "a.png").unlink()
    (copies.directory / "b.png").write_text("b")  # of the same size: it shows if it is written again
    assert copies("a b c d", batch_size=2) == 0 and copies.computed == ["AB"]
    assert copies.files["a"] == "A" and copies.files["b"] == "b"
    assert "1 written, 3 there already" in capsys.readouterr().out


def test_a_replaced_source_is_refused_and_made_again_alone(copies):
    copies("a b c")
    (copies.root / "in/b").write_text("somebody else")
    why = "not the results of this run: b.png: its source has changed; --overwrite makes them again"
    copies.refuses("a b c d", why)
    assert copies("a b c d", overwrite=True) == 0
    assert copies.computed == ["SOMEBODY ELSE", "D"]
    assert copies("a b c d") == 0 and copies.computed == []


def test_a_replaced_result_is_refused(copies):
    """By its size; with --verify by its bytes."""
    copies("a b c")
    output = copies.directory / "b.png"
    for other, options in (("", {}), ("longer", {}), ("x", {"verify": True})):
        output.write_text(other)
        copies.refuses("a b c", "b.png: not the file that was written", **options)
    assert copies("a b c") == 0 and copies.files["b"] == "x"
    assert copies("a b c", verify=True, overwrite=True) == 0 and copies.computed == ["B"]
    output.unlink()
    output.mkdir()
    with pytest.raises(UserError, match="b.png: not the file that was written"):
        copies("a b c")


def test_other_settings_are_listed_and_refused(copies):
    copies.settings |= {"method_version": 1, "vae": None}
    copies("a b c")
    copies.settings |= {"how": "lower", "method_version": 2, "seed": 1, "vae": ["x"]}
    text = "method_version: 1 there, 2 now; seed: 0 there, 1 now; vae: None there, ['x'] now"
    copies.refuses(
        "a b c",
        f"was made with other arguments (how: 'upper' there, 'lower' now; {text}); "
        "--overwrite makes its files again",
    )
    for options in ({}, {"overwrite": True}):
        copies.refuses("a", "and this run doesn't make all of its files again (b.png, c.png)", **options)
    gone = (copies.directory / "c.png").read_text()
    (copies.directory / "c.png").unlink()
    assert copies("a b", overwrite=True) == 0 and copies.computed == ["A", "B"]
    (copies.directory / "c.png").write_text(gone)  # back again, but of the settings before
    assert copies("a b c") == 0 and copies.computed == ["C"]


def test_other_instructions_are_refused_and_new_ones_added(copies):
    copies.prompts = {0: "hat", 3: "beard"}
    copies("a")
    copies.prompts = {3: "scarf"}
    copies.refuses("a", "prompt 3: 'beard' there, 'scarf' now")
    copies.prompts = {3: "beard", 7: "ears"}
    copies("a b")
    assert copies.record["prompts"] == {"0": "hat", "3": "beard", "7": "ears"}


def test_a_directory_of_an_older_version_is_refused_in_a_clear_line(copies):
    """It recorded a hash of the method's source text, which says nothing about its version."""
    copies("a")
    copies.settings["method_version"] = 1
    copies.refuses("a", "made with other arguments (by an older FaceLock, which recorded no method_version)")
    assert copies("a", overwrite=True) == 0 and copies.computed == ["A"]


@pytest.mark.parametrize("name", ["a.png", "b.jpg", "else.webp", "prompt0/a.JPG"])
def test_images_without_a_record_are_refused(copies, name):
    """As the authors' release leaves them: ours between them could not be told apart."""
    touch(copies.directory, name)
    for options in ({}, {"overwrite": True}):
        why = f"has images ({Path(name).name}), but no run.json that says what made them"
        copies.refuses("a", why, **options)
    shutil.rmtree(copies.directory)
    touch(copies.directory, ".hidden.png", "notes.txt", "inner/a.png")  # which don't matter
    assert copies("a") == 0


def test_files_made_by_hand_are_taken_with_a_warning(copies, capsys):
    copies("a")
    for name in "bcdefgh":
        (copies.directory / f"{name}.png").write_text("by hand")
    assert copies("a b c d e f g h") == 0 and copies.computed == []
    text = "no record says what made b.png, c.png, d.png, e.png, f.png and 2 more"
    assert f"warning: {copies.directory}: {text}" in capsys.readouterr().err
    touch(copies.directory, "i.png")
    copies.refuses("a i", "i.png: not the file that was written")
    copies.settings["seed"] = 1
    copies.refuses("a b c d e f g h i", "seed: 0 there, 1 now")


def test_another_commit_or_package_is_one_line_and_the_run_goes_on(copies, capsys):
    """Once for each, however often the run is repeated; nothing of what an older record doesn't know."""
    copies("a")
    now = provenance.versions()
    old = {name: version for name, version in now.items() if name != "commit"} | {"torch": "2.0"}
    (copies.directory / "run.json").write_text(json.dumps(copies.record | {"versions": old}))
    for _ in range(2):
        assert copies("a b") == 0
    text = f"warning: {copies.directory} was begun with other versions: torch 2.0, now {now['torch']}\n"
    assert capsys.readouterr().err.count(text) == 1
    assert copies.record["versions"] == old and copies.record["later_versions"] == [now]


def test_the_commit_is_recorded_where_there_is_one(tmp_path):
    """With -dirty for what is not committed; not at all in a copy without a history."""
    for name in ("provenance.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    say = [sys.executable, "-c", "import provenance; print(provenance.versions().get('commit'))"]
    git = ["git", "-C", tmp_path, "-c", "user.name=x", "-c", "user.email=x@example.org"]

    def commit() -> str:
        environment = {**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)}
        return subprocess.check_output(say, cwd=tmp_path, text=True, env=environment).strip()

    assert commit() == "None"
    for command in ("init -q", "add provenance.py", "commit -qm x"):
        subprocess.run([*git, *command.split()], check=True)
    head = subprocess.check_output([*git, "rev-parse", "HEAD"], text=True)
    assert commit() == head[:12]
    (tmp_path / "provenance.py").write_text((tmp_path / "provenance.py").read_text() + "\n")
    assert commit() == f"{head[:12]}-dirty"


# ---------------------------------------------------------------------------------------------------------
# what fails, and what is left of a run that was killed


def test_one_bad_file_never_stops_the_rest(copies, capsys):
    assert copies("a bad1 bad\x1b[2J x bomb b c y", batch_size=2) == 1
    assert copies.computed == ["A", "X", "BOMBB", "CY"] and set(copies.files) == set("acxy")
    out, err = capsys.readouterr()
    assert out == f"{copies.directory}: 4 written, 0 there already, 4 failed\n"
    assert [line for line in err.splitlines() if line.startswith("  failed")] == [
        f"  failed: {copies.root}/in/bad1: not a readable image",
        f"  failed: {copies.root}/in/bad\\x1b[2J: not a readable image",
        "  failed: bomb: ValueError: too large",
        "  failed: b: ValueError: too large",
    ]
    assert copies("a x", batch_size=2) == 0 and copies.computed == []
    with pytest.raises(ValueError):
        copies("bomb", debug=True)


def test_a_bad_file_whose_output_is_there_is_no_failure(copies, capsys):
    """As it is only read so that its batch has the same arithmetic."""
    copies("a b", batch_size=2)
    (copies.directory / "a.png").unlink()
    copies.load = lambda item: Copies.load(copies, item) if item.label == "a" else 1 / 0
    assert copies("a b", batch_size=2) == 0 and copies.computed == ["A"]
    assert "1 written, 1 there already, 0 failed" in capsys.readouterr().out


def test_a_source_that_changes_while_it_is_read_is_never_taken_for_the_one_that_was(copies):
    def load(item: runs.Item) -> str:
        text = item.source.read_text().upper()
        item.source.write_text("somebody else")
        return text

    copies.load = load
    copies("a")
    copies.computed, copies.prepared = [], 0
    with pytest.raises(UserError, match="a.png: its source has changed"):
        copies("a")


def test_a_killed_run_leaves_nothing_that_passes_for_its_own(copies):
    """Neither the file that it was making nor those that it was to overwrite, manifest or not."""

    def kill(*_):
        (copies.directory / "d.png").write_text("half")
        raise SystemExit

    copies("a b c")
    (copies.directory / "manifest.jsonl").unlink()
    copies.settings["how"], work = "otherwise", copies.work
    copies.work = kill
    with pytest.raises(SystemExit):
        copies("d a b c", overwrite=True)
    copies.work = work
    assert copies("d a b c") == 0 and copies.computed == ["D", "A", "B", "C"]


def test_the_parts_of_a_manifest_are_gathered(copies):
    """Half-written lines are left out, and the last line on a file counts."""
    copies("a b c")
    manifest = copies.directory / "manifest.jsonl"
    first, *others = manifest.read_text().splitlines(keepends=True)
    manifest.write_text(others[0].replace('"psnr": 1.0', '"psnr": 0.5') + 'not JSON\n[]\n{"source": 1}\n')
    for number, line in enumerate((first, *others)):
        part = copies.directory / f"manifest.{number} on a machine.jsonl"
        part.write_bytes(line.encode() + line[: 10 * number].encode() + b"\xff\n")
    assert copies("a b c d") == 0 and copies.computed == ["D"]
    assert [path.name for path in copies.directory.glob("manifest*")] == ["manifest.jsonl"]
    found = runs.read_manifest(copies.directory)
    assert set(found) == {"a.png", "b.png", "c.png", "d.png"} and found["b.png"]["psnr"] == 1.0


def test_only_files_that_a_run_can_have_left_are_removed(copies, tmp_path):
    names = [
        ".facelock-0123456789ab-123.tmp",
        f"prompt0/{temporary_name(Path('a.png')).name}",
        ".notes.2024.tmp",
        "facelock-0123456789ab-123.tmp",
        ".facelock-0123456789ab-x.tmp",
    ]
    touch(copies.directory, *names)
    (copies.directory / ".facelock-ba9876543210-1.tmp").mkdir()
    (tmp_path / "precious").write_text("precious")
    (copies.directory / ".facelock-000000000000-1.tmp").symlink_to(tmp_path / "precious")
    assert copies("a") == 0
    made = [".facelock.0.lock", "a.png", "manifest.jsonl", "run.json", "prompt0"]
    kept = [*names[2:], ".facelock-ba9876543210-1.tmp"]
    assert sorted(os.listdir(copies.directory)) == sorted([*kept, *made])
    assert os.listdir(copies.directory / "prompt0") == []
    assert (tmp_path / "precious").read_text() == "precious"


# ---------------------------------------------------------------------------------------------------------
# memory, signals, locks


def test_too_little_memory_halves_the_batch(copies, capsys):
    """Whoever says so: CUDA, Python, or torch's allocator on the CPU."""
    sizes = []
    text = "[enforce fail at alloc_cpu.cpp:115] . DefaultCPUAllocator: can't allocate memory: you"
    errors = [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), RuntimeError(text)]

    def work(items, loaded, wanted):
        sizes.append(len(items))
        if len(items) > 2 or items[-1].label == "d":
            raise errors.pop()
        return Copies.work(copies, items, loaded, wanted)

    copies.work = work
    assert copies("a b c d", batch_size=4) == 1 and sizes == [4, 2, 2, 1, 1] and errors == []
    out = capsys.readouterr().out
    assert "3 written, 0 there already, 1 failed" in out  # one that is too large alone
    assert "out of memory with 4 at a time; going on with 2" in out and "going on with 1" in out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_after_its_batch(copies, capsys, number, status):
    def work(items, loaded, wanted):
        if items[0].label == "c":
            os.kill(os.getpid(), number)
        return Copies.work(copies, items, loaded, wanted)

    before = signal.getsignal(number)
    copies.work = work
    assert copies("a b c d e f", batch_size=2) == status
    assert set(copies.files) == set("abcd") and signal.getsignal(number) is before
    assert "4 written, 0 there already, 0 failed; stopped" in capsys.readouterr().out
    assert copies("a b c d e f", batch_size=2) == 0 and copies.computed == ["EF"]


def test_an_experiment_goes_on_after_a_part_that_failed_and_stops_at_a_signal(copies, capsys):
    """Also at one in a last batch: with few portraits each part is a single one."""

    def work(items, loaded, wanted):
        os.kill(os.getpid(), signal.SIGINT)
        return Copies.work(copies, items, loaded, wanted)

    copies.work, done = work, []
    failed, edit = [(name, lambda name=name: done.append(name) or 1) for name in ("failed", "edit")]
    protect = ("protect", lambda: copies("a b", batch_size=2))
    assert experiment.go_through([failed, protect, edit]) == 130
    assert done == ["failed"] and set(copies.files) == set("ab")
    assert "2 written, 0 there already, 0 failed; stopped" in capsys.readouterr().out
    assert experiment.go_through([failed, edit]) == 1 and done == ["failed", "failed", "edit"]


SLOW = """
import sys, time, runs, utils, argparse
from pathlib import Path
here = Path(sys.argv[1])
def work(*_):
    print("in", flush=True)
    try: time.sleep(60)
    except Exception: pass
    time.sleep(60)
def run(args):
    item = runs.Item(here / "in", here / "out/a.png", None, "a")
    return runs.Job([item], str, work, here / "out", {}).run()
sys.exit(utils.run_command(run, argparse.Namespace(debug=False)))
"""


def begin(folder: Path) -> subprocess.Popen:
    """Starts a run that is at work on its only file for a minute."""
    (folder / "in").touch()
    command = [sys.executable, "-c", SLOW, folder]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
    )
    assert process.stdout.readline() == "in\n"
    return process


def test_a_second_run_is_kept_out_and_a_second_signal_ends_the_first_at_once(copies, tmp_path):
    first, began = begin(tmp_path), time.monotonic()
    for _ in range(2):
        with pytest.raises(UserError, match=f"another run is writing into it .process {first.pid} on "):
            copies("a")
    first.send_signal(signal.SIGTERM)
    while "stopping after this batch" not in first.stderr.readline():
        pass
    first.send_signal(signal.SIGINT)
    _, err = first.communicate(timeout=30)
    assert first.returncode == 130 and "Traceback" not in err
    assert time.monotonic() - began < 30 and not (tmp_path / "out/a.png").exists()


@pytest.mark.parametrize("kind", ["link", "directory"])
def test_a_lock_that_is_no_plain_file_is_refused(copies, tmp_path, kind):
    (tmp_path / "precious").write_text("precious")
    copies.directory.mkdir()
    lock = copies.directory / ".facelock.0.lock"
    lock.symlink_to(tmp_path / "precious") if kind == "link" else lock.mkdir()
    with pytest.raises(UserError, match="facelock.0.lock: can't be locked"):
        copies("a")
    assert (tmp_path / "precious").read_text() == "precious"
