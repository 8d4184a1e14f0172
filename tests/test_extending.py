"""docs/extending.md: each change applies to a copy of the project, and its command runs there."""

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "extending.md").read_text()
LEFT = shutil.ignore_patterns(".*", "__pycache__", "tests", "checkpoints", "demo", "table", "experiment")


@pytest.fixture(scope="module")
def changed(tmp_path_factory) -> Path:
    """A copy of the project with every change of the page."""
    copy = tmp_path_factory.mktemp("extended") / "project"
    shutil.copytree(ROOT, copy, ignore=LEFT)
    changes = re.findall(r"^```diff\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)
    assert len(changes) == 6
    for change in changes:
        subprocess.run(["patch", "-p1", "--silent"], cwd=copy, input=change, text=True, check=True)
    return copy


def command(script: str, flag: str) -> list[str]:
    """Finds the page's command of a script with a flag."""
    lines = PAGE.replace("\\\n", " ").splitlines()
    (line,) = (line for line in lines if line.startswith(f"python {script} ") and flag in line)
    return shlex.split(line)[1:]


def modules_in(root: Path) -> list[str]:
    """Names the project's modules that are imported from a copy of it."""
    places = {name: Path(getattr(module, "__file__", None) or "/") for name, module in sys.modules.items()}
    own = {name: place for name, place in places.items() if place.is_relative_to(root)}
    return [name for name, place in own.items() if not {"site-packages", "tests"} & {*place.parts}]


@pytest.fixture
def modules_of(changed, monkeypatch):
    """Imports from the changed copy for a while; this process has imported the libraries already."""
    for name in modules_in(ROOT):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(changed)
    monkeypatch.chdir(changed)
    yield importlib.import_module
    for name in modules_in(changed):
        del sys.modules[name]


def test_every_change_runs(changed, modules_of):
    calls = []
    for script, flag, more in (
        ("defend.py", "--defend_method=turn", ["--num_iters=1"]),
        ("edit.py", "--model=hq-edit", ["--num_inference_steps=1"]),
        ("defend.py", "--recognizer assets/mini/judge", ["--num_iters=1"]),
        ("defend.py", "--recognizer assets/mini/clip", ["--num_iters=1"]),
        ("evaluation/eval_l1.py", "fewer_steps", []),
        ("evaluation/purify.py", "posterize", []),
        ("evaluation/purify.py", "latent", []),
    ):
        _, *words = command(script, flag)
        calls.append((script.removesuffix(".py").replace("/", "."), [*words, *more]))
    for row, seeds in (("clean", 0), ("fewer_steps", 5)):
        folder = changed / "edits" / row / "seed0" / "prompt13"
        folder.mkdir(parents=True)
        for number in range(3):
            Image.fromarray(tiny.portrait(32, seed=seeds + number)).save(folder / f"{number}.png")
    assert [modules_of(name).main(words) for name, words in calls] == [0] * len(calls)
    assert Path(sys.modules["methods"].__file__) == changed / "methods.py"
    for result in ("turn.png", "edit.png", "swapped.png", "unlike.png"):
        assert Image.open(changed / result).size == (128, 128)
    for result in ("posterized", "shaken"):
        assert len(list((changed / result).glob("*.png"))) == 12
    assert "prompt13,mean" in (changed / "l1_metric.csv").read_text()


@pytest.mark.slow
def test_the_suite_passes_with_every_change(changed):
    """All that `make test` runs; of the new defense and metric it asks what it asks of the others."""
    shutil.copytree(ROOT / "tests", changed / "tests", ignore=shutil.ignore_patterns("test_extending.py"))
    shutil.copy(ROOT / ".gitignore", changed)
    words = ["-m", "pytest", "-q", "-n", "2", "-m", "not slow and not browser"]
    command = [sys.executable, *words]
    run = subprocess.run(command, cwd=changed, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
