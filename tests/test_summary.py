"""evaluation/tables.py: `left` side by side and the verdict, of made-up tables."""

from __future__ import annotations

import pandas as pd
import pytest

from evaluation import tables
from utils import UserError

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
            (method, f"p{person}", value + (person == 0) * (edit + 1), known * (person < 8 or not edit))
            for method, value, known in zip(methods, judge, recognised, strict=True)
            for person in range(10)
            for edit in range(2)
        ],
        columns=["method", "name", "left", "recognised_by_any"],
    )
    edits.astype({"recognised_by_any": float}).to_csv(root / "per_image.csv", index=False)
    return root


def test_purified_says_what_is_left_in_the_worst_case(tmp_path):
    roots = {"none": write(tmp_path / "a", [0.8, 0.2, 0.78])}
    roots["jpeg-75"] = write(tmp_path / "b", [0.7, 0.4, 0.7])
    roots["blur"] = write(tmp_path / "c", [0.75, 0.35, 0.6])
    text = tables.purified(roots, tmp_path / "purified.csv")
    table = pd.read_csv(tmp_path / "purified.csv").set_index("method")
    assert list(table.columns) == ["none", "jpeg-75", "blur", "worst", "kept"] and list(table.index) == ROWS
    assert table.loc[ROWS[1], ["worst", "kept"]].tolist() == pytest.approx([0.4, 0.5])  # 0.3 of 0.6, not 0.4
    assert table.loc["clean", "worst"] == 0.75 and table["kept"].isna().tolist() == [True, False, True]
    page = (tmp_path / "purified.md").read_text()
    assert text in page and "of its drop that survives it" in page
    (tmp_path / "purified.md").write_text("my notes")
    with pytest.raises(UserError, match="was not made by this script"):
        tables.purified(roots, tmp_path / "purified.csv")


def test_people_are_known_whose_edits_are_mostly_recognised_and_the_worst_tenth_is_their_mean(tmp_path):
    people = tables.by_person(write(tmp_path, [0.8, 0.2, 0.8]))
    assert people.loc[ROWS, "known"].tolist() == pytest.approx([0.8, 0, 0.8])  # half is not most
    assert people.loc[ROWS, "worst"].tolist() == pytest.approx([0.8 + 1.5, 0.2 + 1.5, 0.8 + 1.5])


def test_the_verdict_speaks_of_edits_and_people(tmp_path):
    text = tables.verdict(write(tmp_path, [0.8, 0.2, 0.8]), "mini", 1.25)
    of_judge = "judge (trained here, like the attacked recogniser: not counted): FR 0.20 (left 0.20)"
    assert f"{of_judge}, recognised in 0% of the edits, identified in 25%" in text
    assert "    dlib: FR 0.25, recognised in 0% of the edits, identified in 25%" in text
    assert "    the attacked recogniser: FR 0.25, " in text
    told = "clean: left 0.80, 2.30 of the worst tenth of the people; 80% of the people recognised in most"
    assert told in text
    assert "stand-in" in text and "It took 1.2 minutes" in text
    text = tables.verdict(write(tmp_path, [0.8, 0.2, 0.8], [float("nan")] * 3), "full", 1)
    assert "no threshold" in text and "of the people recognised" not in text and "stand-in" not in text
    assert "clean: left 0.80, 2.30 of the worst tenth of the people\n" in text and "trained here" not in text
