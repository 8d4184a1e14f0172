"""What belongs together: sources, protected images, edits; what is refused, and what may be overwritten."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
from PIL import Image
from tiny import NAMES, STRONG, WEAK, changed, write

import main_edit
import runs
from evaluation import eval_all, eval_psnr, figure, pairing, purify, tables
from utils import UserError


def note(directory: Path, sources: Path, **arguments: object) -> None:
    """Records that a directory's files were made of those of the same name, as the scripts do."""
    lines = [
        {
            "output": path.relative_to(directory).as_posix(),
            "source": runs.digest(sources / path.name),
            "sha256": runs.digest(path),
            "bytes": path.stat().st_size,
        }
        for path in sorted(directory.rglob("*.png"))
    ]
    (directory / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    record = {"seed": 5, "arguments": arguments, "sources": str(sources)}
    (directory / "run.json").write_text(json.dumps(record))


@pytest.fixture
def world(world) -> Path:
    """The world with protected/facelock/budget_{B}, one level away and two, and a record of all."""
    tiny.write_protected(world, weak=1, strong=2)
    note(world / "edits/clean/seed5", world / "portraits")
    for row in (WEAK, STRONG):
        note(world / "protected" / row, world / "portraits", attack_budget=float(row[-4:]))
        note(world / "edits" / row / "seed5", world / "protected" / row)
    return world


@pytest.fixture
def call(world, call):
    """Runs a script on the world's edits, and, if it looks at more, on its sources and protected images."""

    def run(script, line: str = "", *more: str, **how):
        images = f"--src_dir {world}/portraits --protected_dirs {world}/protected/facelock"
        return call(script, line if script is eval_psnr else f"{images} {line}", *more, **how)

    return run


def quick(script) -> list[str]:
    """Gives a figure of one person alone; `call` has the script's other flags."""
    return ["--names", "ben"] if script is figure else []


def test_what_belongs_together_is_scored_without_a_warning(world, call):
    """Also once the data set has been moved."""
    for script in (eval_psnr, figure):
        found = call(script, "", *quick(script))
        assert found.status == 0 and "warning" not in found.err, found.err
    (world / "portraits").rename(world / "moved")
    (world / "protected").rename(world / "elsewhere")
    found = call(eval_all, f"--src_dir {world}/moved --protected_dirs {world}/elsewhere/facelock")
    assert found.status == 0 and "warning" not in found.err, found.err


def replace_protected(world: Path) -> None:
    write(world / f"protected/{STRONG}/ben.png", tiny.portrait(32, seed=7))


def write_others(world: Path) -> None:
    for name in NAMES:
        write(world / "others" / f"{name}.png", tiny.portrait(32, seed=9))


def replace_source(world: Path) -> None:
    """A portrait is replaced under its name: its protected form and the edits of that are old."""
    write(world / "portraits/ben.png", tiny.portrait(32, seed=7))
    note(world / "edits/clean/seed5", world / "portraits")


def unprotect(world: Path) -> None:
    path = world / f"protected/{STRONG}/ben.png"
    write(path, np.array(Image.open(world / "portraits/ben.png")))
    note(world / f"edits/{STRONG}/seed5", path.parent)


def exceed_the_budget(world: Path) -> None:
    path = world / f"protected/{WEAK}/ben.png"
    write(path, changed(np.array(Image.open(world / "portraits/ben.png")), 5))
    note(path.parent, world / "portraits", attack_budget=0.02)
    note(world / f"edits/{WEAK}/seed5", path.parent)


PROTECTED = "{0}/protected/facelock/budget_0.0"
OTHERS = "holds edits of other pictures than those in {0}/others (anna, ben, cleo)"


@pytest.mark.parametrize(
    ("happens", "scripts", "more", "says"),
    [
        (replace_protected, [eval_psnr, eval_all, figure], "", f"now in {PROTECTED}3 (ben)"),
        (write_others, [eval_all, figure], "--src_dir {0}/others", f"edits/clean {OTHERS}"),
        (write_others, [eval_all], "--protected_dirs {0}/others", OTHERS),
        (replace_source, [eval_all], "", "made from other pictures than those in {0}/portraits (ben)"),
        (unprotect, [eval_all], "", "budget_0.03: not the files that main_defend.py wrote (ben)"),
        (exceed_the_budget, [eval_all], "", "beyond the budget 0.02 of its run.json: ben 0.0392"),
        (write_others, [figure], f"--protected_dirs {PROTECTED}3 {PROTECTED}2", "go in the order of"),
    ],
)
def test_what_does_not_belong_together_is_refused(world, call, happens, scripts, more, says):
    happens(world)
    for script in scripts:
        found = call(script, more.format(world))
        assert found.status == 1 and says.format(world) in found.error
        assert not [*Path().iterdir()]


@pytest.mark.parametrize("script", [eval_psnr, eval_all, figure])
def test_edits_without_a_record_are_scored_with_one_warning(world, call, script):
    for path in (world / "edits").rglob("manifest.jsonl"):
        path.unlink()
    found = call(script, "", *quick(script))
    assert found.status == 0
    (line,) = [line for line in re.split(r"[\r\n]+", found.err) if "warning" in line]
    assert "that can't be checked" in line
    assert all(f"{world}/edits/{row}" in line for row in ("clean", WEAK, STRONG))


def test_a_chain_of_real_runs(tmp_path, edit_flags):
    """Purified sources, and purified edits, belong to the sources; a purification of others doesn't."""
    tiny.write_portraits(tmp_path / "in", 2)
    tiny.write_portraits(tmp_path / "other", 2, 72)
    place = {name: tmp_path / name for name in ("in", "jpeg", "edits", "cheats", "other")}
    assert purify.purify_directory(place["in"], place["jpeg"], purify.chain("jpeg:75")) == 0
    flags = f"--src_dir {place['jpeg']} --edit_dir {place['edits']} --seed 1 --prompts 0,3".split()
    assert main_edit.main([*edit_flags, *flags]) == 0
    for method in ("mirror", "shift:4"):
        assert purify.purify_directory(place["edits"], place["cheats"] / method, purify.chain(method)) == 0

    def edits_of(sources: str) -> pairing.Edits:
        where = {"clean_edit_dir": place["edits"], "src_dir": place[sources]}
        return pairing.find_edits([place["cheats"]], [1], **where)

    assert len(edits_of("in").rows) == 2
    pairing.check_edits(edits_of("in"))
    with pytest.raises(UserError, match="of other pictures than those in"):
        pairing.check_edits(edits_of("other"))


def test_a_chain_that_goes_in_circles_ends(world):
    note(world / "portraits", world / "protected" / STRONG)  # made of each other
    origins = pairing.Manifests().origins(world / f"edits/{STRONG}/seed5", "prompt0/ben.png")
    assert len(origins) == pairing.MOST_STEPS


def test_seed00_is_not_seed_0(world, call):
    rows = [world / "edits" / row for row in ("clean", WEAK, STRONG)]
    for row in rows:
        (row / "seed5").rename(row / "seed0")
    (rows[1] / "seed00/prompt0").mkdir(parents=True)
    (rows[1] / "seed0/prompt00").mkdir()
    assert call(eval_psnr, "--seed 0").status == 0
    found = call(eval_psnr, f"--seed 0 --defend_edit_dirs {rows[1]}/seed00")
    assert found.status == 1 and "seed00: doesn't hold the edits of --seed 0" in found.error
    (rows[1] / "seed0").rename(world / "away")
    found = call(eval_psnr, "--seed 0")
    assert found.status == 1 and "budget_0.02: no seed0 (there are seed00)" in found.error


@pytest.mark.parametrize("script", [eval_psnr, eval_all, figure])
def test_nothing_that_is_not_ours_is_overwritten(world, call, script):
    Path("notes.csv").write_text("my,own\n1,2\n")
    Path("notes.md").write_text("# my notes\n")
    Image.fromarray(tiny.portrait(32)).save("photo.png")
    Path("drawing.pdf").write_bytes(b"%PDF-1.7 of another program")
    targets = [Path(name) for name in ("notes.csv", "photo.png", "drawing.pdf", "notes.md")]
    targets += [world / "portraits/ben.png", world / "edits/clean/seed5/run.json"]
    before = {path: path.read_bytes() for path in targets}
    for path in targets:
        found = call(script, f"--output {path}")
        assert found.status == 1 and f"{path}: " in found.error
    assert {path: path.read_bytes() for path in targets} == before


def test_a_table_leaves_what_lies_beside_it(call):
    for name in ("t.md", "t_protected.csv", "t_minus_baseline.csv"):
        Path(name).write_text("mine")
        found = call(eval_all, "--output t.csv")
        assert found.status == 1 and f"{name}: exists and was not made" in found.error
        assert Path(name).read_text() == "mine"
        Path(name).unlink()
    for _ in range(2):  # its own are made again
        assert call(eval_all, "--output t.csv --baseline clean").status == 0
    assert sorted(path.name for path in Path().iterdir()) == [
        ".facelock.jsonl", "t.csv", "t.json", "t.md", "t_minus_baseline.csv", "t_protected.csv"
    ]  # fmt: skip


def test_a_figure_is_made_again_but_not_over_what_it_shows(world, call):
    for _ in range(2):
        assert call(figure, "--output f.png", *quick(figure)).status == 0
    Path("f.png").rename(world / "portraits/anna.png")  # a figure of ours, but what the run reads
    note(world / "edits/clean/seed5", world / "portraits")
    found = call(figure, f"--names ben anna --output {world}/portraits/anna.png")
    assert found.status == 1 and "would overwrite what this run reads" in found.error


def test_a_device_is_written_through(call):
    for script in (eval_psnr, eval_all, figure):
        assert call(script, "--output /dev/null", *quick(script)).status == 0
    assert not Path("/dev/null").is_file() and not [*Path().iterdir()]
    assert not [*Path("/dev").glob("null?*")]


def test_names_break_no_line_no_table_and_no_spreadsheet(world, call):
    odd = world / "edits/=cmd|x\n\x1b[31mred"
    (world / "edits/facelock").rename(odd)
    for path in world.rglob("ben.png"):
        path.rename(path.with_name("-1+1.png"))
    for path in world.rglob("manifest.jsonl"):
        path.unlink()
    found = call(eval_all, "--baseline clean", "--defend_edit_dirs", str(odd))
    assert found.status == 0
    text = Path("t.md").read_text()
    assert "\x1b" not in found.out + found.err + text
    lines = [line for line in text.splitlines() if "=cmd" in line]
    assert lines and all("=cmd\\|x\\n\\x1b[31mred" in line for line in lines)
    # the tables of the attacked recogniser, of a judge, and of all
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {7, 8, len(eval_all.METRICS) + 8}
    written, each = Path("each.csv").read_text(), tables.read_csv(Path("each.csv"))
    assert "\n\"'=cmd|x" in written and ",'-1+1," in written  # no formula for a spreadsheet
    assert set(each["method"]) == {"clean", *(f"{odd.name}/{row.split('/')[1]}" for row in (WEAK, STRONG))}
    assert set(each["name"]) == {"anna", "-1+1", "cleo"}
