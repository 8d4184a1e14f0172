"""models/editors.py: an edit is the pipeline's own, and the VAE alone sees what the editor sees."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import diffusers
import pytest
import tiny
import torch
import torch._dynamo
from tiny import noise

from images import to_working
from models.editors import Editor, InstructPix2Pix, StableDiffusion
from models.vaes import WorkingVAE, load_vae
from utils import UserError

CPU = torch.device("cpu")
F32 = torch.float32


def load_editor(directory: Path, kind: type[Editor] = InstructPix2Pix, **settings) -> Editor:
    """Loads an editor at 64 px; settings: instead of the class's own."""
    own = {**kind.knobs, "resolution": 64, "scheduler": kind.scheduler}
    return kind(str(directory), own | settings, CPU, F32)


def load_tiny_vae(directory: Path, **how) -> WorkingVAE:
    return load_vae(InstructPix2Pix, str(directory), 64, CPU, F32, **how)


# ---------------------------------------------------------------------------------------------------------
# the VAE


def test_load_vae_needs_the_vae_folder_alone_and_is_float32(tmp_path):
    tiny.tiny_vae(torch.float16).save_pretrained(tmp_path / "vae")
    vae = load_tiny_vae(tmp_path).vae
    assert {parameter.dtype for parameter in vae.parameters()} == {F32}
    assert not any(parameter.requires_grad for parameter in vae.parameters()) and not vae.training
    expected = tiny.tiny_vae(torch.float16).float().state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())


@pytest.mark.parametrize(
    ("size", "latent"),
    [((64, 64), (8, 8)), ((40, 64), (5, 8)), ((45, 70), (6, 8)), ((130, 200), (6, 8)), ((33, 33), (5, 5))],
)
def test_working_vae_sees_what_the_editor_sees(size, latent):
    vae = tiny.tiny_vae()
    x = noise(2, 3, *size)
    z = WorkingVAE(vae, 64).encode(x).latent_dist.mean
    assert z.shape == (2, 4, *latent)
    assert torch.equal(z, vae.encode(to_working(x, 64)).latent_dist.mean)


def test_working_vae_casts_to_the_network():
    vae = WorkingVAE(tiny.tiny_vae(torch.bfloat16), 64)
    z = vae.encode(noise(1, 3, 64, 64)).latent_dist.mean
    assert z.dtype == torch.bfloat16 and vae.decode(z.float()).sample.shape == (1, 3, 64, 64)


def latent_and_gradient(vae: WorkingVAE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    latent = vae.encode(x).latent_dist.mean
    (gradient,) = torch.autograd.grad(latent.square().sum(), x)
    return latent.detach(), gradient


def test_checkpointing_changes_memory_and_no_number(tiny_models, fresh_loaders):
    """Each block's forward runs again in the backward pass, and in it each residual block's once more;
    latents and gradient stay the same.
    """
    found = []
    for checkpointing in (False, True):
        vae = load_tiny_vae(tiny_models.editor, checkpointing=checkpointing)
        calls, inner = [], []
        vae.vae.encoder.mid_block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        norm = vae.vae.encoder.down_blocks[0].resnets[0].norm1
        norm.register_forward_pre_hook(lambda *_, inner=inner: inner.append(1))
        values = latent_and_gradient(vae, noise(1, 3, 32, 32))
        found.append(((len(calls), len(inner)), *values))
    assert [calls for calls, *_ in found] == [(1, 1), (2, 3)]
    assert torch.equal(found[0][1], found[1][1]) and torch.allclose(found[0][2], found[1][2], atol=1e-6)


SIZES = [(64, 64), (56, 64), (64, 48)]


@pytest.mark.slow
def test_a_compiled_vae_takes_any_number_of_sizes(tiny_models, monkeypatch, fresh_loaders):
    """With the tracer alone, without a code generator. Each has its graph, beyond torch's limit, here two."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        plain, compiled = (load_tiny_vae(tiny_models.editor, compile=compile) for compile in (False, True))
        for size in [*SIZES, *SIZES]:
            x = noise(1, 3, *size)
            for one, other in zip(*(latent_and_gradient(vae, x) for vae in (plain, compiled)), strict=True):
                torch.testing.assert_close(other, one, atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
    assert all((1, 3, *size) in shapes for size, shapes in zip(SIZES, graphs, strict=True))


# ---------------------------------------------------------------------------------------------------------
# the editor


@pytest.fixture(scope="session")
def editor(tiny_models) -> Editor:
    # guidance on, so that the instruction and the image both have a say
    return load_editor(tiny_models.editor, num_inference_steps=2)


class Pipeline:
    """Takes what a pipeline takes, and gives the image back, or what it is told to give."""

    def __init__(self, made: torch.Tensor | None = None) -> None:
        self.made, self.given = made, {}
        self.tokenizer = tiny.tiny_tokenizer()

    def set_progress_bar_config(self, **how) -> None:
        self.bar = how

    def __call__(self, **given) -> SimpleNamespace:
        self.given = given
        return SimpleNamespace(images=given["image"] if self.made is None else self.made)


@pytest.mark.parametrize(
    ("dtype", "hint"), [(torch.float16, "; try --dtype fp32"), (torch.float32, "")], ids=["fp16", "fp32"]
)
def test_an_edit_that_is_no_number_is_an_error(editor, monkeypatch, dtype, hint):
    """As a file it would be black, and count as protection."""
    broken = torch.full((1, 3, 64, 64), torch.nan, dtype=dtype)
    monkeypatch.setattr(editor, "pipeline", Pipeline(broken))
    with pytest.raises(UserError) as caught:
        editor(noise(1, 3, 64, 64), ["hat"], 0)
    assert str(caught.value) == f"the edit has NaN or infinite pixels{hint}"


class By16(InstructPix2Pix):
    """An editor of somebody's own: another multiple, and a knob of another name."""

    multiple = 16
    knobs: ClassVar = {"true_cfg_scale": 4.0}


def test_the_vae_of_an_editor_by_16_is_padded_to_16(tiny_models):
    vae = load_vae(By16, str(tiny_models.editor), 64, CPU, F32)
    assert vae.encode(noise(1, 3, 50, 40)).latent_dist.mean.shape == (1, 4, 8, 6)


def test_an_edit_is_the_pipelines_own(editor):
    x = noise(2, 3, 64, 64)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**editor.pipeline.components)
    wanted = pipeline(
        prompt=["hat", "beard"],
        image=(x + 1) / 2,
        num_inference_steps=2,
        guidance_scale=7.5,
        image_guidance_scale=1.5,
        generator=[torch.Generator().manual_seed(3) for _ in range(2)],
        output_type="pt",
    ).images
    assert torch.allclose(editor(x, ["hat", "beard"], 3), wanted * 2 - 1, atol=1e-5)


def test_an_instruction_that_is_cut_is_said_once(editor, capsys):
    x, prompt = noise(1, 3, 64, 64), "h" * (tiny.TOKENS + 3)
    for _ in range(2):
        editor(x, [prompt], 0)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the editor reads {tiny.TOKENS} tokens; the last 5 are cut")
    assert prompt in line


def test_one_pipeline_serves_all_settings_but_the_schedulers(tiny_models, editor):
    other = load_editor(tiny_models.editor, num_inference_steps=7, guidance_scale=1.0)
    assert other.pipeline is editor.pipeline and other.knobs != editor.knobs
    own = load_editor(tiny_models.editor, scheduler="DDIMScheduler")
    assert type(editor.pipeline.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
    assert type(own.pipeline.scheduler).__name__ == "DDIMScheduler"


@pytest.mark.parametrize(
    ("scheduler", "loaded"),
    [("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"), (None, "DDIMScheduler")],
    ids=["full", "mini"],
)
def test_img2img_editor(tiny_models, scheduler, loaded):
    editor = load_editor(tiny_models.img2img, StableDiffusion, num_inference_steps=4, scheduler=scheduler)
    assert type(editor.pipeline).__name__ == "StableDiffusionImg2ImgPipeline"
    assert type(editor.pipeline.scheduler).__name__ == loaded
    x = noise(1, 3, 50, 33)
    assert editor(x, ["hat"], 0).shape == x.shape


@pytest.mark.parametrize("kind", [InstructPix2Pix, StableDiffusion])
def test_no_editor_has_a_safety_checker(kind, tiny_models):
    directory = tiny_models.editor if kind is InstructPix2Pix else tiny_models.img2img
    assert load_editor(directory, kind).pipeline.safety_checker is None
