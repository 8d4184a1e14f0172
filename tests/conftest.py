"""Fixtures that every test file may use: tiny models on disk, made once, and no way to the network."""

from __future__ import annotations

import os
import socket
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

    connect = socket.socket.connect
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        patch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: refuse_name())
        yield


def refuse_name():
    raise socket.gaierror("no network in the tests")


@pytest.fixture
def fresh_loaders():
    """Forgets the networks that other tests have loaded, before a test and after it."""
    from models import clip, editors, perceptual, protector, recognizers, vaes

    loaders = (
        vaes.load_vae,
        editors._load_pipeline,
        recognizers.load_recognizer,
        perceptual.load_perceptual,
        clip.load_clip,
        protector.load_protector,
    )
    for loader in loaders:
        loader.cache_clear()
    yield
    for loader in loaders:
        loader.cache_clear()


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> SimpleNamespace:
    """Writes directories of tiny random models: editor, img2img, recognizer, judge, perceptual, clip."""
    import tiny

    root = tmp_path_factory.mktemp("models")
    return SimpleNamespace(
        root=root,
        editor=tiny.write_editor(root / "editor"),
        img2img=tiny.write_img2img(root / "img2img"),
        recognizer=tiny.write_recognizer(root / "recognizer"),
        judge=tiny.write_convnext(root / "judge"),
        perceptual=tiny.write_perceptual(root / "perceptual"),
        protector=tiny.write_protector(root / "protector", root / "editor"),
        clip=tiny.write_clip(root / "clip"),
    )


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
    """Gives what makes the defend scripts run on the tiny models, three iterations."""
    return (
        f"--models mini --model_id {tiny_models.editor} --recognizer {tiny_models.recognizer} "
        f"--judge {tiny_models.judge} --lpips {tiny_models.perceptual} --protector {tiny_models.protector} "
        "--resolution 64 --device cpu --num_iters 3"
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
