"""bench.py: what it measures is what it says, and its table is that of its numbers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from tiny import WIDTH

import bench
import utils
from images import to_tensor
from methods import METHODS
from models.config import resolve

MINI = ["--models=mini", "--device=cpu", "--resolution=64"]


@pytest.fixture
def here(monkeypatch):
    """Rows run in this process."""
    monkeypatch.setattr(bench, "in_a_process", lambda function, *arguments: function(*arguments))


def plan(*more: str) -> bench.Plan:
    """What bench.py makes of flags, on the mini models at 64x64."""
    return bench.plan_of(bench.parse_args([*MINI, *more]))


def test_one_row_a_job_with_its_numbers(tmp_path, here, capsys):
    line = f"--iterations=2 --repeats=2 --portraits=10 --json={tmp_path}/out.json".split()
    jobs = ["noise", "encoder", "facelock", "edit", "psnr", "lpips", "clip", "faces"]
    assert bench.main([*MINI, *line, "--what", *jobs]) == 0
    about, _, *lines, note = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out.json").read_text())
    rows = found["rows"]
    assert list(rows) == jobs and [text.split()[0] for text in lines] == jobs
    assert found["about"] == about and "the mini models, input 64x64" in about
    assert "10 portraits" in note and "25 instructions" in note
    for job in jobs:
        n = 10 if job in METHODS else 250
        assert rows[job]["hours"] == pytest.approx(n * rows[job]["image"] / 3600)
        assert rows[job]["image"] > 0
        assert (rows[job]["iteration"] is None) == (job in bench.METRICS) == (lines.pop(0).split()[1] == "-")
    assert rows["facelock"]["image"] == pytest.approx(100 * rows["facelock"]["iteration"])
    assert rows["noise"]["image"] == rows["noise"]["iteration"]
    # a decode costs operations, noise none
    assert rows["noise"]["operations"] == 0 < rows["encoder"]["operations"] < rows["facelock"]["operations"]
    assert rows["clip"]["operations"] > 0 < rows["faces"]["operations"]


def test_a_batch_is_divided_by_its_images(monkeypatch):
    monkeypatch.setattr(bench, "seconds", lambda work, device: 8.0)
    for job, image in (("encoder", 100.0), ("edit", 2.0), ("psnr", 2.0)):
        row = bench.run_job(job, plan("--batch_size=4", "--iterations=2", "--repeats=1"))
        assert row["image"] == image and math.isnan(row["operations"])  # one repeat: not counted


@pytest.mark.parametrize("job", ["encoder", "edit", "lpips"])
def test_memory_is_read_before_operations_are_counted(monkeypatch, job):
    """The counter keeps tensors alive, checkpointed ones too: at 1024x1024 it more than doubled the peak."""
    order = []
    peak, count = bench.peak_memory, bench.operations
    monkeypatch.setattr(bench, "peak_memory", lambda device: order.append("peak") or peak(device))
    monkeypatch.setattr(bench, "operations", lambda work, plan: order.append("count") or count(work, plan))
    bench.run_job(job, plan("--iterations=1", "--repeats=2"))
    assert order[:3] == ["peak", "peak", "count"] and order.count("peak") == 2


@pytest.mark.slow
def test_operations_of_an_edit_are_those_of_all_its_steps():
    twice = plan("--repeats=2")
    row = bench.run_job("edit", twice)
    editor = resolve(twice.settings).load_editor()
    images = to_tensor(bench.portraits(1, (64, 64)))
    whole = bench.operations(lambda: editor(images, [utils.edit_prompts[0]], 0), twice)
    assert row["operations"] == pytest.approx(whole, rel=1e-6)


def test_time_of_an_edit_is_that_of_all_its_steps():
    """1 s and 2 s a step: 41 s for 20 steps, from those of 1 and 3."""
    _, cost = bench.load_edit("edit", plan())
    assert resolve(plan().settings).settings["num_inference_steps"] == 20 and cost(3, 7) == (2, 41)


def test_flags_reach_the_protector():
    settings = plan("--iterations=7", "--checkpointing", "--dtype=bf16").settings
    found = settings.num_iters, settings.checkpointing, settings.resolution, settings.dtype, settings.models
    assert found == (7, True, 64, "bf16", "mini")
    assert plan("--compile").settings.compile


@pytest.mark.parametrize("size", ["64", "0x64", "64x", "64x-1", "axb"])
def test_an_input_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args([f"--input_side={size}"])
    assert "WxH" in capsys.readouterr().err


def test_input_side_is_width_by_height():
    assert bench.parse_args(["--input_side=60x40"]).input_side == (40, 60)


@pytest.mark.slow
def test_memory_is_the_peak_above_the_imports():
    """Whatever the process took that started this one."""
    code = """
import bench, torch
before = bench.peak_memory(torch.device("cpu"))
data = b"x" * 200_000_000
print(bench.peak_memory(torch.device("cpu")) - before)
"""
    found = subprocess.run([sys.executable, "-c", code], cwd=bench.ROOT, capture_output=True, check=True)
    assert float(found.stdout) == pytest.approx(0.2, abs=0.02)


def test_a_row_runs_in_a_process_of_its_own():
    assert bench.in_a_process(os.getpid) != os.getpid()


@pytest.mark.slow
def test_random_weights_are_what_the_scripts_load(tmp_path, here, monkeypatch, capsys):
    """Of tiny sizes, but for the recogniser's, which has one size."""
    heads = {"num_attention_heads": 2, "num_hidden_layers": 1}
    text = {"hidden_size": WIDTH, "intermediate_size": WIDTH, **heads}
    blocks = {"block_out_channels": (WIDTH,) * 4, "norm_num_groups": 4, "layers_per_block": 1}
    clip = {"text_config": text, "vision_config": {**text, "patch_size": 32}, "projection_dim": WIDTH}
    tiny = {"vae": bench.SD15["vae"] | blocks, "text": text, "trunk": "squeeze", "clip": clip}
    tiny["unet"] = bench.SD15["unet"] | blocks | {"cross_attention_dim": WIDTH, "attention_head_dim": 2}
    monkeypatch.setattr(bench, "SD15", tiny)
    jobs = ["facelock", "edit", "lpips", "clip", "faces"]
    line = [*MINI, "--size=sd15", "--iterations=1", "--repeats=1", f"--json={tmp_path}/out.json"]
    assert bench.main([*line, "--what", *jobs]) == 0
    assert "random weights of size sd15" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out.json").read_text())["rows"]) == jobs


def test_sizes_are_those_they_claim():
    """Counts parameters; none is made."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        networks = {
            83_653_863: AutoencoderKL(**bench.SD15["vae"]),
            859_532_484: UNet2DConditionModel(**bench.SD15["unet"]),  # 11,520 above SD 1.5's own
            123_060_480: CLIPTextModel(CLIPTextConfig(**bench.SD15["text"])),
            151_277_313: CLIPModel(CLIPConfig(**bench.SD15["clip"])),
        }
    for wanted, network in networks.items():
        assert sum(parameter.numel() for parameter in network.parameters()) == wanted
