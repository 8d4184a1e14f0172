"""benchmarks/against_release.py: both forms do the same work, and its ratios are those of its numbers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch

import bench
import utils
from benchmarks import against_release
from images import to_tensor
from loops import Run, random_start
from methods import METHODS
from models.clip import Clip
from models.faces import FaceDetector, face_similarity_to, load_recognizer
from models.perceptual import load_perceptual, perceptual_distance_to

both_forms = pytest.mark.parametrize("plain", [True, False], ids=["plain", "project"])


@pytest.fixture
def args(tiny_models, monkeypatch):
    """bench.py's flags on the tiny models, for images of 64x64; one portrait and two instructions."""
    monkeypatch.setattr(against_release, "SIZE", (64, 64))
    monkeypatch.setattr(against_release, "FACE", (8, 8, 56, 56))
    monkeypatch.setattr(against_release, "N_PORTRAITS", 1)
    monkeypatch.setattr(against_release, "N_EDITED", 1)
    monkeypatch.setattr(utils, "edit_prompts", {0: "Let it be snowy", 1: "Add elf-like ears"})
    flags = bench.parse_args(["--models=mini", "--device=cpu", "--resolution=64", "--iterations=3"])
    members = {"model_id": "editor", "recognizer": "recognizer", "judge": "judge", "lpips": "perceptual"}
    members["clip"] = "clip"
    vars(flags).update({flag: str(getattr(tiny_models, name)) for flag, name in members.items()})
    return flags


def test_the_plain_facelock_is_the_projects(args, tiny_models):
    """In float64, over few iterations: what is compared does the same work."""
    kind = torch.device("cpu"), torch.float64
    vae = tiny.tiny_vae(dtype=torch.float64)
    recognizer = load_recognizer(str(tiny_models.recognizer), *kind)
    perceptual = load_perceptual(str(tiny_models.perceptual), *kind)
    run = Run(budget=0.06, num_iters=4)
    x = to_tensor(tiny.portrait(64)[None]).double()
    protector = SimpleNamespace(vae=vae, recognizer=recognizer, perceptual=perceptual, run=run)
    plain = against_release.plain_facelock(x, protector)
    ours = METHODS["facelock"].protect(
        x,
        run,
        vae=vae,
        face_similarity=face_similarity_to(recognizer, x, [[against_release.FACE]]),
        perceptual_distance=perceptual_distance_to(perceptual, x),
    )
    assert (ours - random_start(x, 0.06, [0])).abs().max() > 0.01
    assert (plain - ours).abs().max() < 1e-9


@both_forms
def test_facelock_and_start_up_run(args, plain):
    assert against_release.facelock(args, plain) > 0
    assert against_release.start_up("seconds", args, plain) > 0


@both_forms
def test_the_whole_editor_is_loaded_by_the_plain_form_alone(args, plain, monkeypatch):
    import diffusers

    loaded = []
    load = diffusers.DiffusionPipeline.from_pretrained.__func__

    def note(cls, *given, **keywords):
        loaded.append(cls)
        return load(cls, *given, **keywords)

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", classmethod(note))
    against_release.start_up("memory", args, plain)
    assert bool(loaded) is plain


@pytest.mark.parametrize(("plain", "seen"), [(True, 2 * 4 * 2), (False, 1 + 4)])
def test_each_image_is_embedded_once_or_for_each_pair_and_metric(args, monkeypatch, plain, seen):
    """One source, four edits, two metrics."""
    counts = []
    embed = Clip.embed_images
    monkeypatch.setattr(
        Clip, "embed_images", lambda self, images: counts.append(len(images)) or embed(self, images)
    )
    assert against_release.scoring("clip", args, plain) > 0
    assert sum(counts) == seen


@pytest.mark.parametrize(("plain", "seen"), [(True, 2 * 4 * 2), (False, 1 + 4)])
def test_each_face_is_looked_for_once_or_for_each_pair_and_recogniser(args, monkeypatch, plain, seen):
    looks = []
    find = FaceDetector.find
    monkeypatch.setattr(FaceDetector, "find", lambda self, images: looks.extend(images) or find(self, images))
    assert against_release.scoring("faces", args, plain) > 0
    assert len(looks) == seen


@both_forms
def test_edits_run(args, plain):
    assert against_release.edit(args, plain) > 0


def test_help_is_measured_of_every_script():
    names = {str(path.relative_to(against_release.ROOT)) for path in against_release.scripts()}
    assert names >= {"defend.py", "edit.py", "main_defend.py", "main_edit.py", "bench.py"}
    assert names >= {f"evaluation/{name}.py" for name in ("eval_psnr", "eval_all", "purify", "figure")}
    assert not names & {"utils.py", "methods.py", "evaluation/scoring.py", "evaluation/directories.py"}


@pytest.mark.parametrize(("ours", "mark"), [(0.5, False), (2.0, True)])
def test_ratios_and_targets(monkeypatch, capsys, ours, mark):
    plainly = iter([3.0, 1.0, 2.0])

    def measure(args, plain):
        return next(plainly) if plain else ours

    monkeypatch.setattr(bench, "in_a_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setitem(against_release.COMPARISONS, "help", (measure, 2.5, "Seconds of nothing."))
    assert against_release.main(["--comparisons", "help", "--device=cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split()[:5] == ["help", "2.000", f"{ours:.3f}", f"{2 / ours:.2f}", "2.50"]
    assert ("missed" in line) is mark and line.endswith("Seconds of nothing.")
