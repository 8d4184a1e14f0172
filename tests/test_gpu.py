"""What only an accelerator can show; skipped, with the reason, where there is none."""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch

import defend
import edit
from utils import METHOD_NAMES, allowed_levels, load_image

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


def on_cuda(flags: list[str]) -> list[str]:
    return ["cuda" if flag == "cpu" else flag for flag in flags]


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_stays_in_the_budget(tmp_path, defend_flags, method, dtype):
    (source,) = tiny.write_portraits(tmp_path, 1)
    output = tmp_path / "out.png"
    arguments = ["--input_path", source, "--output_path", output, "--defend_method", method, "--dtype", dtype]
    assert defend.main([*map(str, arguments), *on_cuda(defend_flags), "--attack_budget", "0.03"]) == 0
    change = np.abs(load_image(output).pixels.astype(int) - load_image(source).pixels)
    assert 0 < change.max() <= allowed_levels(0.03)


def test_the_start_is_the_same_as_on_the_cpu(tmp_path, defend_flags):
    (source,) = tiny.write_portraits(tmp_path, 1)
    for name, flags in (("cpu", defend_flags), ("cuda", on_cuda(defend_flags))):
        arguments = [
            "--input_path", source, "--output_path", tmp_path / f"{name}.png", "--defend_method", "noise"
        ]  # fmt: skip
        assert defend.main([*map(str, arguments), *flags]) == 0
    assert np.array_equal(load_image(tmp_path / "cpu.png").pixels, load_image(tmp_path / "cuda.png").pixels)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_edit_is_close_to_the_cpus(tmp_path, edit_flags, dtype):
    (source,) = tiny.write_portraits(tmp_path, 1)
    pixels = {}
    for name, flags in (("cpu", edit_flags), ("cuda", [*on_cuda(edit_flags), "--dtype", dtype])):
        arguments = [
            "--input_path", source, "--output_path", tmp_path / f"{name}.png", "--prompt", "x", "--seed", 1
        ]  # fmt: skip
        assert edit.main([*map(str, arguments), *flags]) == 0
        pixels[name] = load_image(tmp_path / f"{name}.png").pixels.astype(int)
    assert np.abs(pixels["cpu"] - pixels["cuda"]).mean() < 3
