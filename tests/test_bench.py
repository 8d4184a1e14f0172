"""bench.py: what it measures is what it says, and its table is that of its numbers."""

import json
import os
import subprocess
import sys

import pytest

import bench
from methods import METHODS
from protection import Settings

MINI = ["--models=mini", "--device=cpu", "--resolution=64"]
SETTINGS = Settings(models="mini", device="cpu", resolution=64, num_iters=2)


def test_one_row_per_job_with_its_numbers(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "in_a_process", lambda function, *arguments: function(*arguments))
    line = f"--iterations=2 --repeats=1 --portraits=10 --input_side=70x60 --json={tmp_path}/out.json".split()
    jobs = ["noise", "encoder", "facelock", "facelock-wide", "edit", "psnr", "lpips", "clip", "faces"]
    assert bench.main([*MINI, *line, "--what", *jobs]) == 0
    about, _, *lines, note = capsys.readouterr().out.splitlines()
    found = json.loads((tmp_path / "out.json").read_text())
    assert list(found["rows"]) == jobs and [text.split()[0] for text in lines] == jobs
    assert found["about"] == about and "the mini models, input 70x60, worked on at 64" in about
    assert "10 portraits" in note and "25 instructions" in note
    for job, row in found["rows"].items():
        assert row["hours"] == pytest.approx((10 if job in METHODS else 250) * row["image"] / 3600)
        own = {"facelock-wide": 32, "encoder": 100, "facelock": 100, "edit": 20}.get(job, 1)
        assert row["image"] == pytest.approx(own * row["iteration"]) and row["image"] > 0


@pytest.mark.parametrize(("job", "image"), [("encoder", 100.0), ("edit", 20.0), ("psnr", 2.0)])
def test_a_batch_is_divided_by_its_images(monkeypatch, job, image):
    monkeypatch.setattr(bench, "seconds", lambda work, device: 8.0)
    assert bench.run_job(job, SETTINGS, (64, 64), batch=4, repeats=1)["image"] == image


@pytest.mark.parametrize("size", ["64", "0x64", "64x", "64x-1", "axb"])
def test_an_input_size_that_is_none_is_refused(size, capsys):
    with pytest.raises(SystemExit):
        bench.parse_args([f"--input_side={size}"])
    assert "WxH" in capsys.readouterr().err


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
