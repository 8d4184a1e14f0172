"""bench.py: what it times is what it says, and its table and ratios are those of its numbers."""

from __future__ import annotations

import argparse
import json

import pytest
import tiny
import torch

import bench
import defend
import methods
import models
import utils


@pytest.fixture
def here(monkeypatch):
    """Rows run in this process, and the mini set's portraits are worked on at 64."""
    monkeypatch.setattr(bench, "in_a_process", lambda function, *arguments: function(*arguments))


def test_one_row_a_job_with_its_numbers(tmp_path, here, capsys):
    line = f"--models mini --device cpu --resolution 64 --iterations 2 --repeats 2 --json {tmp_path}/out.json"
    jobs = ["noise", "encoder", "facelock", "edit", "psnr", "lpips", "clip", "faces"]
    assert bench.main([*line.split(), "--what", *jobs]) == 0
    out = capsys.readouterr().out.splitlines()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert list(rows) == jobs and [text.split()[0] for text in out[2:-1]] == jobs
    for job in jobs:
        assert rows[job]["per_hour"] == pytest.approx(3600 / rows[job]["image"]) and rows[job]["image"] > 0
    assert rows["facelock"]["image"] == pytest.approx(100 * rows["facelock"]["iteration"])
    # a decode costs operations, noise none
    assert rows["noise"]["operations"] == 0 < rows["encoder"]["operations"] < rows["facelock"]["operations"]
    assert "the mini models, input 64x64" in out[0]


@pytest.mark.parametrize("job", ["encoder", "edit", "lpips"])
def test_memory_is_read_before_operations_are_counted(monkeypatch, job):
    """The counter keeps tensors alive, checkpointed ones too: at 1024x1024 it more than doubled the peak."""
    order = []
    peak, count = bench.Memory.peak, bench.operations
    monkeypatch.setattr(bench.Memory, "peak", lambda self: order.append("peak") or peak(self))
    monkeypatch.setattr(bench, "operations", lambda work: order.append("count") or count(work))
    args = bench.parse_args(["--models", "mini", "--device", "cpu", "--iterations", "1", "--repeats", "2"])
    args.resolution = 64
    bench.run_job(job, args, {})
    assert order[0] == "peak" and order.count("peak") == 1 and "count" in order


def test_operations_of_an_edit_grow_with_the_steps(here):
    args = bench.parse_args(
        ["--models", "mini", "--device", "cpu", "--repeats", "1", "--resolution", "64", "--what", "edit"]
    )
    row = bench.run_edit(args, {})
    chosen = models.MODEL_SETS["mini"]
    editor = models.load_editor(
        chosen, "instruct-pix2pix", torch.device("cpu"), torch.float32, progress=False
    )
    images = utils.to_tensor(bench.portraits(1, (64, 64)))
    whole = bench.operations(lambda: editor(images, ["x"], 0))
    assert row["operations"] == pytest.approx(whole, rel=0.02)  # the text encoder is counted in one of them


def test_time_of_an_edit_is_that_of_all_its_steps(here, monkeypatch):
    """1 s and 2 s a step: 41 s for the mini set's 20 steps, from those of 1 and 3."""
    monkeypatch.setattr(bench, "seconds", lambda work, device: 1 + 2 * work.__defaults__[0])
    args = bench.parse_args(["--models", "mini", "--device", "cpu", "--repeats", "1", "--what", "edit"])
    args.resolution = 64
    row = bench.run_edit(args, {})
    assert (row["iteration"], row["image"]) == (2, 41)


def test_the_plain_facelock_is_the_projects(tiny_models):
    """In float64, over few iterations: what is compared does the same work."""
    args = argparse.Namespace(attack_budget=0.06, step_size=0.01, num_iters=4)
    vae = tiny.tiny_vae(dtype=torch.float64)
    device = torch.device("cpu")
    recognizer = models.load_recognizer(str(tiny_models.recognizer), device, torch.float64)
    perceptual = models.load_perceptual(str(tiny_models.perceptual), device, torch.float64)
    x = utils.to_tensor(tiny.portrait(64)[None]).double()
    boxes = [[(8, 8, 56, 56)]]
    plain = bench.plain_facelock(x, vae, recognizer, perceptual, boxes, args)
    ours = methods.facelock(
        x,
        vae,
        models.face_similarity_to(recognizer, x, boxes),
        models.perceptual_distance_to(perceptual, x),
        budget=0.06,
        step_size=0.01,
        num_iters=4,
    )
    start = methods.random_start(x, 0.06, [0])
    assert (ours - start).abs().max() > 0.01
    assert (plain - ours).abs().max() < 1e-9


@pytest.mark.parametrize(("ours", "mark"), [(0.5, False), (2.0, True)])
def test_ratios_and_targets(here, capsys, monkeypatch, ours, mark):
    def compare(args, flags):
        """Of nothing."""
        yield from [(3.0, ours), (1.0, ours), (2.0, ours)]

    monkeypatch.setitem(bench.COMPARISONS, "facelock", (compare, "", 2.5))
    assert bench.main(["--against-release", "--comparisons", "facelock", "--device", "cpu"]) == 0
    line = capsys.readouterr().out.splitlines()[-1].split()
    assert line[:5] == ["facelock", "2.000", f"{ours:.3f}", f"{2 / ours:.2f}", "2.50"]
    assert ("missed" in line) is mark


def test_help_is_measured_of_every_script():
    scripts = {str(path.relative_to(bench.ROOT)) for path in bench.ROOT.glob("evaluation/*.py")}
    scripts -= {"evaluation/common.py", "evaluation/__init__.py"}
    scripts |= {"defend.py", "edit.py", "main_defend.py", "main_edit.py", "bench.py"}
    assert set(bench.SCRIPTS) == scripts


def test_random_weights_are_of_the_size_they_claim(tmp_path):
    """83.7 million parameters has the SD 1.5 VAE; and every loader takes what is written."""
    flags = bench.make_weights("vae", tmp_path)
    args = bench.parse_args(["--size", "sd15", "--device", "cpu", "--resolution", "64"])
    of_method = bench.defense_arguments(args, flags, "facelock")
    tools = defend.Tools(of_method)
    tools.preload(of_method)
    assert sum(p.numel() for p in tools.vae.vae.parameters()) == 83_653_863
    assert (tools.recognizer.size, tools.dtype) == (160, torch.float32)
    embedding = tools.recognizer.embed(torch.rand(1, 3, 64, 64), [[(0, 0, 64, 64)]])
    assert embedding.shape == (1, 512) and embedding.isfinite().all()
