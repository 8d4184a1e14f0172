"""Fixtures that every test file may use: tiny models on disk, made once, and no way to the network."""

import os
import re
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

# Before torch is imported, and for the subprocesses. Tiny networks gain nothing by waiting for more threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Lets a test that reaches for the network fail at once, instead of passing on some machines only."""

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise OSError("no network in the tests")
        return connect(self, address)

    def refuse_name(*args, **kwargs):
        raise socket.gaierror("no network in the tests")

    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", refuse_name)
        yield


@pytest.fixture(scope="session", autouse=True)
def few_resamples():
    """Is content with rough intervals: they only have to be the same everywhere."""
    from evaluation import tables

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "RESAMPLES", 199)
        yield


@pytest.fixture
def fresh_loaders():
    """Forgets the networks that other tests have loaded, before a test and after it."""
    import tiny

    tiny.forget()
    yield
    tiny.forget()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> SimpleNamespace:
    """Writes directories of tiny random models: editor, img2img, recognizer, judge, perceptual, protector.

    The bundled CLIP is small enough.
    """
    import tiny

    from models.config import MINI

    root = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        editor=tiny.write_editor(root / "editor"),
        img2img=tiny.write_img2img(root / "img2img"),
        recognizer=tiny.write_recognizer(root / "recognizer"),
        judge=tiny.write_convnext(root / "judge"),
        perceptual=tiny.write_perceptual(root / "perceptual"),
        protector=tiny.write_protector(root / "protector", root / "editor"),
        clip=MINI / "clip",
    )


@pytest.fixture(scope="session")
def directory(tmp_path_factory):
    """Gives a function: a kind of editor -> the directory of a tiny one, written once."""
    import tiny_editors

    root = tmp_path_factory.mktemp("editors")

    def of(kind: str) -> Path:
        return root / kind if (root / kind).exists() else tiny_editors.WRITERS[kind](root / kind)

    return of


@pytest.fixture
def portrait(tmp_path) -> Path:
    """Writes one portrait, in/face0.png."""
    import tiny

    return tiny.write_portraits(tmp_path / "in", 1)[0]


@pytest.fixture
def whole_images(monkeypatch):
    """Takes all of an image for its face: MTCNN rightly sees none in the blobs of `tiny.portrait`."""
    import tiny

    import edit
    import protection
    from evaluation import features

    for module in (protection, features, edit):
        monkeypatch.setattr(module, "FaceDetector", tiny.WholeImage)


@pytest.fixture(scope="session")
def edit_flags(tiny_models) -> list[str]:
    """Gives what makes the edit scripts run on the tiny editor, two steps."""
    flags = (
        f"--models mini --model_id {tiny_models.editor} --resolution 64 --device cpu --num_inference_steps 2"
    )
    return flags.split()


@pytest.fixture(scope="session")
def defend_flags(tiny_models) -> list[str]:
    """Gives what makes the defend scripts run on the tiny models, two iterations."""
    return (
        f"--models mini --model_id {tiny_models.editor} --recognizer {tiny_models.recognizer} "
        f"--judge {tiny_models.judge} --lpips {tiny_models.perceptual} --protector {tiny_models.protector} "
        "--resolution 64 --device cpu --num_iters 2"
    ).split()


@pytest.fixture
def protector(defend_flags):
    """Gives a function that makes a Protector on the tiny models of more of defend.py's flags."""
    import defend
    from protection import Protector

    def make(line: str = "") -> Protector:
        args = defend.parse_args(["--input_path=x", *defend_flags, *line.split()])
        return Protector(defend.settings_of(args))

    return make


@pytest.fixture
def world(tmp_path, monkeypatch):
    """portraits/, edits/clean and edits/facelock/budget_{0.02,0.03}, prompts 0 and 3, seed 5; run in out/."""
    import tiny

    from evaluation import features, tables

    for number, name in enumerate(tiny.NAMES):
        tiny.write(tmp_path / "portraits" / f"{name}.png", tiny.portrait(32, seed=number))
    for row, levels in {"clean": [0] * 3, tiny.WEAK: [1, 2, 3], tiny.STRONG: [8] * 3}.items():
        tiny.write_edits(tmp_path, row, 5, levels)
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    monkeypatch.setattr(tables, "FEWEST", 2)  # so that three images have an interval
    monkeypatch.setattr(features, "FaceDetector", tiny.WholeImage)
    return tmp_path


@pytest.fixture
def call(world, tiny_models, capsys):
    """Runs a script on the world -> status, out, err, its errors, its table by row, and its values by edit.

    A flag that is given again replaces that of the world.
    """
    from evaluation import eval_all, eval_clip_i, eval_clip_s, eval_facial, eval_lpips, figure, tables

    edits = f"--clean_edit_dir {world}/edits/clean --defend_edit_dirs {world}/edits/facelock --seed 5"
    loads, sources = "--models mini --device cpu", f"--src_dir {world}/portraits"
    lpips, clip = f"--lpips {tiny_models.perceptual}", f"--clip_id {tiny_models.clip}"
    faces = f"--recognizer {tiny_models.recognizer} --judge {tiny_models.judge}"
    more_of = {
        eval_lpips: f"{loads} {lpips}",
        eval_clip_i: f"{loads} {sources} {clip}",
        eval_clip_s: f"{loads} {sources} {clip}",
        eval_facial: f"{loads} {sources} {faces} --by recognizer",
        eval_all: f"{loads} {sources} {clip} {lpips} {faces}",
    }

    def run(script, line: str = "", *more: str, output: str = "t.csv", keep: bool = False):
        capsys.readouterr()
        for name in () if keep else (output, "each.csv"):
            Path(name).unlink(missing_ok=True)
        words = ["grid"] if script is figure else []
        words += f"{edits} {more_of.get(script, '')}".split()
        if script is not figure and "--output" not in (*line.split(), *more):
            words += ["--output", output, "--per_image", "each.csv"]
        found = SimpleNamespace(status=script.main([*words, *line.split(), *more]))
        found.out, found.err = capsys.readouterr()
        lines = [text.strip() for text in re.split(r"[\r\n]+", found.err)]
        found.error = "".join(text for text in lines if text.startswith("error:"))
        if script is not figure and Path(output).exists():
            found.table = tables.read_csv(Path(output)).set_index("method")
        if Path("each.csv").exists():
            each = tables.read_values(Path("each.csv"))
            found.each = each.pivot_table("value", ["method", "prompt", "name"], "metric")
        return found

    return run


@pytest.fixture(scope="session")
def browser():
    """Starts Chromium, with a camera of its own."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox", *camera])
        yield browser
        browser.close()
