"""models/denoiser.py: what the defenses see of an editor is what its pipeline computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import DDIMScheduler

from models.denoiser import Denoiser
from utils import UserError

DOUBLE = torch.float64


def latents(*seeds: int) -> list[torch.Tensor]:
    return [tiny.noise(2, 4, 8, 8, seed=seed).double() for seed in seeds]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("k", [0, 700, torch.tensor([3, 900])])
def test_the_noise_is_that_of_the_network(prediction, shown, k):
    """By the scheduler's own conversion, image by image, with no words as the pipelines encode them."""
    editor = tiny.tiny_editor(shown, prediction, DOUBLE)
    pipeline, (z_k, z) = editor.pipeline, latents(1, 2)
    found = Denoiser(editor).predict_noise(z_k, k, z)
    ids = pipeline.tokenizer("", padding="max_length", return_tensors="pt").input_ids
    words = pipeline.text_encoder(ids)[0]
    for i, step in enumerate(k.tolist() if isinstance(k, torch.Tensor) else [k, k]):
        given = torch.cat([z_k, z], dim=1) if shown else z_k
        output = pipeline.unet(given[i : i + 1], step, words).sample
        a = pipeline.scheduler.alphas_cumprod[step].double()
        if prediction == "v_prediction":  # v = sqrt(a) e - sqrt(1 - a) z_0, z_k = sqrt(a) z_0 + sqrt(1 - a) e
            output = a**0.5 * output + (1 - a) ** 0.5 * z_k[i : i + 1]
        torch.testing.assert_close(found[i : i + 1], output, rtol=0, atol=1e-10)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_an_edit_is_ddims(prediction):
    """At the same timesteps as diffusers' scheduler, whose last step leads to the clean latent."""
    editor = tiny.tiny_editor(True, prediction, DOUBLE)
    denoiser, (z, noise) = Denoiser(editor), latents(1, 2)
    own = {"timestep_spacing": "trailing", "clip_sample": False, "set_alpha_to_one": True}
    scheduler = DDIMScheduler.from_config(editor.pipeline.scheduler.config, **own)
    scheduler.set_timesteps(4)
    z_k, words = noise, denoiser._words.expand(2, -1, -1)
    for k in scheduler.timesteps:
        output = editor.pipeline.unet(torch.cat([z_k, z], dim=1), k, words).sample
        z_k = scheduler.step(output, k, z_k).prev_sample
    assert scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(denoiser.edit(z, noise, 4), z_k / 0.18215, rtol=1e-4, atol=1e-4)


def test_where_an_edit_begins():
    (z, noise), shown = latents(1, 2), Denoiser(tiny.tiny_editor(dtype=DOUBLE))
    assert shown.first == 999 and torch.equal(shown.begin(z, noise), noise)
    other = Denoiser(tiny.tiny_editor(False, dtype=DOUBLE))
    assert other.first == 499 and torch.equal(other.begin(z, noise), other.noised(z, 499, noise))


def test_timesteps_without_image_do_not_count():
    editor = tiny.tiny_editor(True, "v_prediction", DOUBLE)
    scheduler = editor.pipeline.scheduler
    editor.pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    assert editor.pipeline.scheduler.alphas_cumprod[-1] == 0
    denoiser, (z, noise) = Denoiser(editor), latents(1, 2)
    assert denoiser.alphas_cumprod.min() >= 0.004 and 800 < denoiser.first < 999
    assert editor.pipeline.scheduler.alphas_cumprod[denoiser.first + 1] < 0.004
    assert denoiser.edit(z, noise, 4).isfinite().all()


def test_checkpointing_changes_nothing():
    z_k, z = latents(1, 2)
    plain, checkpointed = (Denoiser(tiny.tiny_editor(dtype=DOUBLE), on) for on in (False, True))
    assert torch.equal(plain.predict_noise(z_k, 500, z), checkpointed.predict_noise(z_k, 500, z))


def test_an_editor_of_another_kind_is_one_clear_error():
    def other(**parts) -> SimpleNamespace:
        editor = tiny.tiny_editor()
        vars(editor.pipeline).update(parts)
        return editor

    channels = tiny.tiny_editor(False).pipeline.unet.config
    flow = SimpleNamespace(config={"prediction_type": "flow"}, alphas_cumprod=None)
    sdxl = SimpleNamespace(config=SimpleNamespace(**channels | {"addition_embed_type": "text_time"}))
    inpainting = SimpleNamespace(config=SimpleNamespace(**channels | {"in_channels": 9}))
    adapted = SimpleNamespace(config=SimpleNamespace(**channels | {"encoder_hid_dim_type": "image_proj"}))
    unets = [{"unet": unet} for unet in (sdxl, inpainting, adapted)]
    for parts in ({"scheduler": flow}, *unets):
        with pytest.raises(UserError, match="SimpleNamespace: this method works on InstructPix2Pix's"):
            Denoiser(other(**parts))


@pytest.mark.parametrize("share", [0.1, 1.0])
def test_to_noise_and_back_by_a_perfect_denoiser_is_the_latent(share, monkeypatch):
    denoiser, (z, noise) = Denoiser(tiny.tiny_editor(dtype=DOUBLE)), latents(1, 2)
    monkeypatch.setattr(denoiser, "predict_noise", lambda z_k, k, z: noise)
    torch.testing.assert_close(denoiser.again(z, noise, share, 5), z)
