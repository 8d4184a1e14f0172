"""What only an accelerator can show; skipped, with the reason, where there is none."""

import numpy as np
import pytest
import tiny
import torch

import defend
import edit
from images import load_image
from models.config import MINI
from models.editors import InstructPix2Pix
from protection import methods_for
from utils import allowed_levels

TOKENS = f"--model flux-kontext --resolution 128 --model_id {MINI / 'kontext'}"
ON_TOKENS = [f"{name} {TOKENS}" for name in ("veto", "decontext")]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device on this machine"),
]


@pytest.fixture
def pixels(tmp_path, defend_flags, edit_flags):
    """Runs a script on one portrait on a device -> the pixels of its output; device None: of the portrait."""
    (source,) = tiny.write_portraits(tmp_path, 1)

    def run(script, device: str | None, line: str = "") -> np.ndarray:
        if device is None:
            return load_image(source).pixels.astype(int)
        flags = defend_flags if script is defend else edit_flags  # the last --device counts
        output = tmp_path / "out.png"
        paths = ["--input_path", str(source), "--output_path", str(output), "--device", device]
        assert script.main([*flags, *paths, *line.split()]) == 0
        return load_image(output).pixels.astype(int)

    return run


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", [*methods_for(InstructPix2Pix), *ON_TOKENS])
def test_every_method_stays_in_the_budget(pixels, method, dtype):
    made = pixels(defend, "cuda", f"--defend_method {method} --dtype {dtype} --attack_budget 0.03")
    assert 0 < np.abs(made - pixels(defend, None)).max() <= allowed_levels(0.03)


def test_the_start_is_the_same_as_on_the_cpu(pixels):
    cpu, cuda = (pixels(defend, device, "--defend_method noise") for device in ("cpu", "cuda"))
    assert np.array_equal(cpu, cuda)


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_an_edit_is_close_to_the_cpus(pixels, dtype):
    line = "--prompt x --seed 1"
    cpu, cuda = pixels(edit, "cpu", line), pixels(edit, "cuda", f"{line} --dtype {dtype}")
    assert np.abs(cpu - cuda).mean() < 3
