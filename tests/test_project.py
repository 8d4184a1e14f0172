"""The project's own files: make, documents and their commands, what is bundled."""

import argparse
import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import tiny
from matplotlib import pyplot as plt

import defend
import experiment
from models.config import MINI
from models.loading import ROOT

BUNDLED = sorted((ROOT / "assets/portraits/mini").glob("*.png"))
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SOURCES = [
    path
    for folder in ("", "models", "evaluation", "calibration", "mini", "mini/drawing")
    for path in sorted((ROOT / folder).glob("*.py"))
]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def is_script(path: Path) -> bool:
    return 'if __name__ == "__main__"' in path.read_text()


def dry_run(target: str, *more: str) -> str:
    """What make would do for a target, where everything is installed."""
    command = ["make", "-n", target, "RUN=python", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("target", ["demo", "table", "experiment"])
def test_what_make_runs_is_a_command(target, parsed):
    commands = commands_in(dry_run(target))
    assert commands
    for script, arguments in commands:
        parsed(script, arguments)


def test_make_table_runs_the_papers_methods(parsed):
    ((script, arguments),) = commands_in(dry_run("table"))
    assert script == "experiment.py"
    assert parsed(script, arguments).methods == [(name, None) for name in experiment.PAPER]
    assert parsed(script, arguments[: arguments.index("--methods")]).methods is None  # which are the same
    more = ("BUDGETS=0.06 0.03", "PROMPTS=0,13", "METHODS=noise vae")
    ((script, arguments),) = commands_in(dry_run("table", *more))
    args = parsed(script, arguments)
    assert (args.budgets, args.prompts) == ([0.06, 0.03], [0, 13])
    assert args.methods == [("noise", None), ("vae", None)]


def test_a_method_may_have_a_budget_of_its_own(parsed):
    line = ["--image_dir=a", "--output_dir=b", "--methods", "facelock@0.06", "all@0.030", "noise"]
    args = parsed("experiment.py", line)
    assert args.methods == [("facelock", 0.06), ("all", 0.03), ("noise", None)]
    for wrong in ("beauty", "facelock@", "facelock@-1", "@0.03"):
        with pytest.raises(pytest.fail.Exception, match="argument --methods"):
            parsed("experiment.py", [*line, wrong])


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative)
def test_links_lead_somewhere(document):
    text = document.read_text()
    for link in re.findall(r"\]\((?!http)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_every_page_is_linked_from_the_readme():
    links = re.findall(r"\]\(([^)#\s]+)", (ROOT / "README.md").read_text())
    assert {relative(page) for page in DOCUMENTS[1:]} <= set(links)


def commands_in(text: str) -> list[tuple[str, list[str]]]:
    """Finds the Python commands in shell lines: script and arguments, also behind a launcher or in a loop."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.search(r"\b(python3?|torchrun|accelerate)\b.*\.py\b", line):
            continue
        line = re.sub(r"\$\(\w+\)|\$\{?\w+\}?", "0", line)  # a shell's variable, whatever it holds
        words = shlex.split(line.replace(";", " ; "), comments=True)
        while script := next((word for word in words if word.endswith(".py")), None):
            words = words[words.index(script) + 1 :]
            ends = [place for place, word in enumerate(words) if re.match(r"[;&|>)]|2>", word)]
            found.append((script, words[: ends[0]] if ends else words))
            words = words[ends[0] :] if ends else []
    return found


@pytest.fixture
def parsed(monkeypatch, capsys):
    """Parses a command's arguments by the script's own parser, and does nothing else."""

    class Parsed(BaseException):
        pass

    parse = argparse.ArgumentParser.parse_args

    def stop(self, *arguments, **more):
        raise Parsed(parse(self, *arguments, **more))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    monkeypatch.syspath_prepend(ROOT / "calibration")

    def of(script: str, arguments: list[str]) -> argparse.Namespace:
        folder, _, name = script.removesuffix(".py").rpartition("/")
        module = importlib.import_module(f"evaluation.{name}" if folder == "evaluation" else name)
        assert Path(module.__file__) == ROOT / script
        try:
            module.main(arguments)
        except Parsed as done:
            return done.args[0]
        except SystemExit:
            pytest.fail(f"{script} {shlex.join(arguments)}: {capsys.readouterr().err.splitlines()[-1]}")
        pytest.fail(f"{script} parses nothing")

    return of


def code_of(document: Path) -> str:
    """Its blocks of code, and the commands that stand between ` and `."""
    text = document.read_text()
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    blocks = [code for language, code in blocks if language in ("", "bash", "sh", "console")]
    return "\n".join([*blocks, *re.findall(r"`(python [^`\n]+)`", text)])


# What extending.md shows works with its own diffs alone, which a test of its own applies.
@pytest.mark.parametrize(
    "document", [path for path in DOCUMENTS if path.name != "extending.md"], ids=relative
)
def test_commands_in_the_documents_are_understood(document, parsed):
    for script, arguments in commands_in(code_of(document)):
        parsed(script, arguments)


@pytest.mark.parametrize("script", [path for path in SOURCES if is_script(path)], ids=relative)
def test_commands_in_a_scripts_docstring_are_understood(script, parsed):
    text = ast.get_docstring(ast.parse(script.read_text()), clean=False).replace("\\\n", " ")
    shown = [line for line in text.splitlines() if re.match(r"    (\S+=\S+ )?(python|torchrun|accel)", line)]
    assert shown or script.parent.name == "mini"
    for name, arguments in commands_in("\n".join(shown)):
        parsed(name, arguments)


def test_the_notebook_runs(tiny_models, tmp_path, monkeypatch, capsys):
    """On the real photo: it shows both pictures and their round trips, and asks the judges."""
    monkeypatch.chdir(ROOT / "docs")
    monkeypatch.setattr(sys, "path", [*sys.path])
    matplotlib.use("Agg")
    cells = json.loads((ROOT / "docs" / "facelock.ipynb").read_text())["cells"]
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


def test_the_bundled_models_are_small_and_no_pickles():
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 45e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".jpg"}


def test_facelock_moves_the_face_and_noise_does_not(tmp_path, capsys):
    """On the bundled models: 8 iterations, after a VAE round trip. This says nothing about real photos."""
    after = {}
    for method in ("facelock", "noise"):
        arguments = (
            f"--models mini --input_path {BUNDLED[2]} --output_path {tmp_path}/{method}.png --check "
            f"--defend_method {method} --attack_budget 0.06 --num_iters 8 --device cpu --judge {MINI}/judge"
        )
        assert defend.main(arguments.split()) == 0
        shown = capsys.readouterr().out
        after[method] = {
            name: float(value) for name, value in re.findall(r"(recognizer|judge) \S+ -> (\S+?),?\s", shown)
        }
    assert after["noise"]["recognizer"] > 0.8 and after["noise"]["judge"] > 0.8
    assert after["facelock"]["recognizer"] < after["noise"]["recognizer"] - 0.2
    assert after["facelock"]["judge"] < after["noise"]["judge"] - 0.02
