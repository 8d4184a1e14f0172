"""docs/facelock.ipynb: its cells run on tiny networks, without Jupyter."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib
import numpy as np
import tiny
from matplotlib import pyplot as plt

DOCS = Path(__file__).parents[1] / "docs"


def test_the_notebook_runs(tiny_models, tmp_path, monkeypatch, capsys):
    """On the real photo: it shows both pictures and their round trips, and asks the judges."""
    monkeypatch.chdir(DOCS)
    monkeypatch.setattr(sys, "path", [*sys.path])
    matplotlib.use("Agg")
    cells = json.loads((DOCS / "facelock.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell.get("outputs") for cell in cells)
    install, settings, *rest = code
    assert "requirements.txt" in install
    found: dict = {}
    exec(settings, found)  # noqa: S102
    found |= {"AUTOENCODER": str(tiny.write_autoencoder(tmp_path / "taesd")), "ITERATIONS": 1}
    found |= {"RECOGNIZERS": [str(tiny_models.recognizer)], "JUDGES": [str(tiny_models.judge)]}
    found["BUDGETS"] = found["BUDGETS"][-2:]
    for cell in rest:
        exec(cell, found)  # noqa: S102
    changed = np.abs(found["protected"].astype(int) - found["photo"])
    assert 0 < changed.max() <= 25  # levels in 0.2
    grid, graph = map(plt.figure, plt.get_fignums())
    assert [len(ax.images) for ax in grid.axes] == [1] * 4 and [len(ax.lines) for ax in graph.axes] == [2, 2]
    for curve in found["curves"].values():
        assert list(curve.columns) == ["recognizer", "judge"] and list(curve.index) == [0, 0.11, 0.2]
    out = capsys.readouterr().out
    assert "in this round trip" in out and f"{changed.max()} of 255 levels" in out
    plt.close("all")
