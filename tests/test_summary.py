"""evaluation/summary.py: `left` side by side and the verdict, of made-up tables."""

import math
import re
from pathlib import Path

import pandas as pd
import pytest

from evaluation import leaderboard, summary, tables
from utils import UserError

PAGE = Path(summary.__file__).parent.parent / "docs/evaluation.md"
ROWS = ["clean", "facelock/budget_0.06", "noise/budget_0.06"]


def write(root, judge, recognised=(1, 0, 1)):
    """A table, and ten people with two edits each, of whom the first is an outlier."""
    root.mkdir(parents=True, exist_ok=True)
    methods = [row if row == "clean" else f"{root / 'edits' / row}" for row in ROWS]
    numbers = ["facial", "identified", "identified_judge", "facial_dlib", "identified_dlib"]
    table = pd.DataFrame({"method": methods, "left": judge, "facial_judge": judge, "left_judge": judge})
    table[numbers] = 0.25
    table["recognised"] = table["recognised_judge"] = table["recognised_dlib"] = recognised
    table.to_csv(root / "all_metric.csv", index=False)
    edits = pd.DataFrame(
        [
            (method, 0, edit, f"p{person}", value + add, known * (person < 8 or not edit))
            for method, value, known in zip(methods, judge, recognised, strict=True)
            for person in range(10)
            for edit in range(2)
            for add in [(person == 0) * (edit + 1)]
        ],
        columns=[*tables.EDIT, "left", "recognised_by_any"],
    )
    edits.astype({"recognised_by_any": float}).to_csv(root / "per_image.csv", index=False)
    return root


def write_people(root, **of_rows):
    """A table of experiment.py's as it is now: one value of `left` for each person of each row."""
    root.mkdir(parents=True, exist_ok=True)
    lines = [
        (*row.split("__"), "", "", "hardest", 0, 0, f"p{person}", "left", value)
        for row, people in of_rows.items()
        for person, value in enumerate(people)
    ]
    values = pd.DataFrame(lines, columns=[*tables.ABOUT, "judge", *tables.EDIT[1:], "metric", "value"])
    values["budget"] = values["budget"].str.replace("_", ".")
    values.to_csv(root / "per_image.csv", index=False)
    means = values.groupby(tables.ABOUT, sort=False)["value"].mean().rename("left").reset_index()
    means.to_csv(root / "all_metric.csv", index=False)
    return root


def test_purified_says_what_is_left_to_who_knows_nothing_and_who_picks_a_purifier_for_each_picture(tmp_path):
    roots = {
        name: write_people(tmp_path / name, clean__=[0.8, 0.8], facelock__0_06=people, vae__0_06=[0.5, 0.5])
        for name, people in {"none": [0.1, 0.1], "a": [0.8, 0.2], "b": [0.2, 0.6], "c": [0.0, 0.0]}.items()
    }
    text = summary.purified(roots, tmp_path / "purified.csv", latex=True)
    table = pd.read_csv(tmp_path / "purified.csv").set_index("method")
    assert list(table.index) == ["clean", "facelock", "vae"] and math.isnan(table.loc["clean", "kept"])
    wanted = {"average": 0.3, "worst": 0.5, "knowing_attacker": 0.7}  # .8 and .6, by different purifiers
    wanted |= {"budget": 0.06, "kept": 3 / 7}  # 0.3 of 0.7
    assert table.loc["facelock", list(wanted)].to_dict() == pytest.approx(wanted)
    lines = (tmp_path / "purified.tex").read_text().splitlines()
    assert r"\toprule" in lines
    (line,) = [line for line in lines if line.startswith("facelock")]
    assert r"\textbf{0.10}" in line and r"\textbf{0.00}" in line
    assert r"\textbf{0.70}" not in line  # to a knowing attacker, vae leaves less
    page = (tmp_path / "purified.md").read_text()
    assert text in page and "knowing attacker" in page
    (tmp_path / "purified.md").write_text("my notes")
    with pytest.raises(UserError, match="was not made by this script"):
        summary.purified(roots, tmp_path / "purified.csv")


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ([0.2, 0.3, 0.2, 0.3, 0.2, 0.3], "facelock/budget_0.06 leaves least, then vae/budget_0.06: +0.05"),
        ([0.5, 0.0, 0.4, 0.1, 0.4, 0.1], "they can't be told apart, since the interval contains 0"),
        ([0.3, 0.3], "with so few portraits they can't be told apart"),
    ],
)
def test_the_headline_says_whether_best_and_second_differ(tmp_path, second, says):
    people = len(second)
    own = [0.15, 0.24, 0.16, 0.25, 0.15, 0.25][:people]
    rows = {"clean__": [0.9] * people, "facelock__0_06": own, "vae__0_06": second, "cw__0_06": [0.8] * people}
    values = tables.read_values(write_people(tmp_path, **rows) / "per_image.csv")
    (line,) = summary.headlines(values)
    assert says in line and "clean" not in line
    rows["facelock__0_03"] = [0.6] * people  # of several budgets, each that has rivals
    values = tables.read_values(write_people(tmp_path, **rows) / "per_image.csv")
    (line,) = summary.headlines(values)
    assert line.startswith("At budget 0.06, ") and says in line


def test_the_verdict_speaks_of_edits_and_people(tmp_path):
    text = summary.verdict(write(tmp_path, [0.8, 0.2, 0.8]), "mini", 1.25)
    of_judge = "judge (trained here, like the attacked recogniser: not counted): FR 0.20 (left 0.20)"
    assert f"{of_judge}, recognised in 0% of the edits, identified in 25%" in text
    assert "    dlib: FR 0.25, recognised in 0% of the edits, identified in 25%" in text
    assert "    the attacked recogniser: FR 0.25, " in text
    told = "clean: left 0.80, 2.30 of the worst tenth of the people; 80% of the people recognised in most"
    assert told in text
    assert "stand-in" in text and "It took 1.2 minutes" in text
    text = summary.verdict(write(tmp_path, [0.8, 0.2, 0.8], [float("nan")] * 3), "full", 1)
    assert "no threshold" in text and "of the people recognised" not in text and "stand-in" not in text
    assert "clean: left 0.80, 2.30 of the worst tenth of the people\n" in text and "trained here" not in text


def test_a_leaderboard_keeps_what_is_around_it_and_the_last_row_of_each_method(tmp_path):
    """Cells can't break the table, and a row of another budget is another row."""
    board = tmp_path / "board.md"

    def put(method, budget, command):
        row = dict.fromkeys(leaderboard.COLUMNS, "-") | {"method": method, "budget": budget}
        leaderboard.add(board, pd.DataFrame([row | {"command": command}]))

    put("facelock", "0.03", "first")
    board.write_text(f"# Ours\n\n{board.read_text()}\nAnd what it means.\n")
    for row in (("cw", "0.03", "a|b"), ("facelock", "0.03", "second"), ("facelock", "0.06", "\n")):
        put(*row)
    lines = board.read_text().splitlines()
    assert lines[:2] == ["# Ours", ""] and lines[-2:] == ["", "And what it means."]
    assert [line.split(" | ")[-1] for line in lines[4:-2]] == ["second |", r"a\|b |", r"\n |"]
    board.write_bytes(b"\xff")
    with pytest.raises(UserError, match="board.md: not a readable text file"):
        put("cw", "0.03", "")


def test_reading_every_value_as_the_page_says_loses_no_row_and_nobody(tmp_path, monkeypatch):
    """Neither the unprotected edits, whose budget is empty, nor a person called NA."""
    lines = [
        (*row, "", "", "dlib", 0, 0, name, "left", value)
        for row, value in ((("clean", ""), 0.5), (("facelock", "0.06"), 0.25))
        for name in ("alice", "NA")
    ]
    columns = [*tables.ABOUT, "judge", *tables.EDIT[1:], "metric", "value"]
    tables.write_csv(tmp_path / "per_image.csv", pd.DataFrame(lines, columns=columns))
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall("```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    shown: list[pd.DataFrame] = []
    found = {"print": shown.append}
    exec(code, found)  # noqa: S102
    assert shown[0]["left"].to_dict() == {("clean", ""): 0.5, ("facelock", "0.06"): 0.25}
    assert {*found["values"]["name"]} == {"alice", "NA"}
