"""models/attention.py, the defenses on it, and models/denoiser.py: by their formulas, and by the scripts."""


from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from diffusers import DDIMScheduler
from diffusers.models.transformers import transformer_flux, transformer_flux2

import defend
import main_defend
from images import load_image
from methods import METHODS
from models.denoiser import Denoiser
from models.editors import EDITORS
from models.vaes import load_vae
from protection import Protector, methods_for
from utils import UserError

torch.set_num_threads(1)

SIDE = 64
MODULES = {"flux-kontext": transformer_flux, "flux2-klein": transformer_flux2}
NAMES = ("veto", "decontext")
each_kind = pytest.mark.parametrize("kind", MODULES)
each_name = pytest.mark.parametrize("name", NAMES)
@pytest.fixture(scope="module")
def loaded(directory):
    """Gives a kind's editor in float64, its VAE, and the noise that its latents take."""

    def of(kind):
        one, path = EDITORS[kind], str(directory(kind))
        settings = {**one.knobs, "resolution": SIDE, "scheduler": None}
        given = torch.device("cpu"), torch.float64
        return one(path, settings, *given), load_vae(one, path, SIDE, *given)

    return of


def image(batch=2):
    return 0.9 * tiny.noise(batch, 3, SIDE, SIDE, seed=1).double()


def generator():
    return torch.Generator().manual_seed(5)


class Reference:
    """An editor's transformer as its pipeline calls it, for one image, and what its blocks attend to."""

    def __init__(self, kind, editor, vae, monkeypatch):
        self.kind, self.pipeline, self.vae = kind, editor.pipeline, vae
        self.seen = []

        def dispatch(query, key, value, **how):  # (1, tokens, heads, D)
            query, key, value = (each.transpose(1, 2) for each in (query, key, value))
            found = torch.softmax(query @ key.transpose(2, 3) / query.shape[-1] ** 0.5, dim=-1)
            self.seen.append(found)
            return (found @ value).transpose(1, 2)

        monkeypatch.setattr(MODULES[kind], "dispatch_attention_fn", dispatch)

    def latent(self, x):
        """What the pipeline makes of an image at the working size."""
        found = self.vae.vae.encode(x)
        if self.kind == "flux2-klein":
            return self.pipeline._encode_vae_image(x, None)
        config = self.vae.vae.config
        return (found.latent_dist.mode() - config.shift_factor) * config.scaling_factor

    def sigmas(self, steps, n):
        """Of an edit, after the shift that its scheduler has for n tokens."""
        t = torch.linspace(1, 1 / steps, steps, dtype=torch.float64)
        if self.kind == "flux2-klein":
            from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu as shift

            mu = shift(n, steps)
        else:
            mu = 0.5 + (1.15 - 0.5) * (n - 256) / (4096 - 256)
        return (np.e**mu / (np.e**mu + 1 / t - 1)).tolist()

    def attention(self, z_k, sigma, z):
        """Of all blocks, (heads, tokens, tokens) each, and how many tokens the canvas has."""
        pipeline = self.pipeline
        batch, _, height, width = z_k.shape
        if self.kind == "flux2-klein":
            words, word_ids = pipeline.encode_prompt("")
            canvas, reference = pipeline._pack_latents(z_k), pipeline._pack_latents(z)
            ids = torch.cat([pipeline._prepare_latent_ids(z_k), pipeline._prepare_image_ids([z])], dim=1)
            more = {"guidance": None}
        else:
            words, pooled, word_ids = pipeline.encode_prompt("", "", max_sequence_length=64)
            canvas, reference = (pipeline._pack_latents(each, *z_k.shape) for each in (z_k, z))
            how = (batch, height // 2, width // 2, "cpu", torch.float64)
            ids = [pipeline._prepare_latent_image_ids(*how) for _ in range(2)]
            ids[1][..., 0] = 1
            ids = torch.cat(ids)
            more = {"pooled_projections": pooled, "guidance": torch.full((1,), 2.5).double()}
        self.seen.clear()
        pipeline.transformer(
            hidden_states=torch.cat([canvas, reference], dim=1),
            encoder_hidden_states=words,
            timestep=torch.full((1,), sigma).double(),
            img_ids=ids,
            txt_ids=word_ids,
            **more,
        )
        return [found[0] for found in self.seen], canvas.shape[1]


def veto(reference, x, generator):
    z = reference.latent(x)
    total = 0
    for sigma in reference.sigmas(10, (SIDE // 16) ** 2):
        noise = torch.randn(z.shape[1:], generator=generator).double()[None]
        (first, *_), n = reference.attention((1 - sigma) * z + sigma * noise, sigma, z.detach())
        canvas, shown = range(first.shape[1])[-2 * n : -n], range(first.shape[1])[-n:]
        for of, to in ((canvas, shown), (shown, canvas)):
            a = first[:, list(of)][:, :, list(to)]
            total = total - (a * torch.log(a + 1e-8)).sum(dim=(1, 2)).mean() / 10
    return total


def decontext(reference, x, generator):
    z = reference.latent(x)
    sigma = (980 + int(20 * torch.rand((), generator=generator))) / 1000
    noise = torch.randn(z.shape[1:], generator=generator).double()[None]
    blocks, n = reference.attention(noise, sigma, z)
    blocks = blocks[2:4]  # 26 of 38 single blocks are two of three
    return -sum(a[:, -2 * n : -n, -n:].sum(dim=2).mean() for a in blocks) / len(blocks)


FORMULAS = {"veto": veto, "decontext": decontext}


@each_kind
@each_name
def test_value_and_gradient_are_the_references(name, kind, loaded, monkeypatch):
    """On the same transformer with the same noise; checkpointing changes nothing."""
    editor, vae = loaded(kind)
    x, is_checkpointed = image(1).requires_grad_(), name == "decontext"
    attention = editor.denoiser(editor, is_checkpointed)
    given = {"vae": vae, "attention": attention, "generators": [generator()]}
    found = METHODS[name].objective(x, **given)(x, 0.5)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert editor.pipeline.transformer.gradient_checkpointing == is_checkpointed
    editor.pipeline.transformer.disable_gradient_checkpointing()
    value = FORMULAS[name](Reference(kind, editor, vae, monkeypatch), x, generator())
    (expected,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(found[0], value, rtol=1e-5, atol=0)
    scale = expected.abs().max()
    assert scale > 0
    torch.testing.assert_close(gradient / scale, expected / scale, rtol=0, atol=1e-5)


@each_kind
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_to_noise_and_back_by_a_perfect_transformer_is_the_latent(share, kind, loaded, monkeypatch):
    """Which finds the direction from image to noise, in the tokens that a canvas has."""
    editor, vae = loaded(kind)
    attention = editor.denoiser(editor)
    z = vae.encode(image(2)).latent_dist.mean
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)).double()
    away = attention._tokens(attention.noised(z, 1, noise) - attention.noised(z, 0, noise))
    monkeypatch.setattr(attention, "_run", lambda *_: (torch.cat([away, 0 * away], dim=1),))
    torch.testing.assert_close(attention.again(z, noise, share, 5), z)
    monkeypatch.undo()
    found = attention.again(z, noise, share, 2)
    assert found.shape == z.shape and found.isfinite().all() and (found != z).any()


def flags(directory, kind, name):
    model = f"--models=mini --model={kind} --model_id={directory(kind)} --resolution={SIDE} --device=cpu"
    return f"{model} --defend_method={name} --num_iters=1".split()


def pixels(folder):
    return np.stack([load_image(path).pixels.astype(int) for path in sorted(folder.glob("*.png"))])


@pytest.mark.parametrize(("name", "kind"), list(zip(NAMES, MODULES, strict=True)))
def test_a_batch_gives_each_image_its_own_result(name, kind, directory, tmp_path):
    tiny.write_portraits(tmp_path / "in", 3)
    line = [*flags(directory, kind, name), f"--image_dir={tmp_path}/in", "--attack_budget=0.03"]
    for size in (1, 3):
        assert main_defend.main([*line, f"--output_dir={tmp_path}/{size}", f"--batch_size={size}"]) == 0
    one, three = (pixels(tmp_path / str(size) / "budget_0.03") for size in (1, 3))
    assert 1 <= np.abs(one - pixels(tmp_path / "in")).max() <= 3  # of 255, within 0.03
    assert (one != three).mean() < 0.01  # but for signs of gradients that are 0 up to rounding


@each_name
def test_settings_are_the_authors_by_default(name, directory):
    line = [*flags(directory, "flux-kontext", name)[:-1], "--input_path=x"]
    found = Protector(defend.settings_of(defend.parse_args(line))).settings()
    authors = {
        "veto": {"step_size": 4 / 255, "num_iters": 100, "momentum": 0.9},
        "decontext": {"step_size": 0.005, "num_iters": 800},
    }
    assert found.items() >= {**authors[name], "model": "flux-kontext", "resolution": SIDE}.items()
    assert METHODS[name].run.budget == {"veto": 8 / 255, "decontext": 0.1}[name]
    changed = Protector(defend.settings_of(defend.parse_args([*line, "--momentum=0.5"]))).settings()
    assert (changed != found) == (name == "veto")


def test_all_methods_are_those_that_suit_the_editor():
    of_unet, of_tokens = {"photoguard", "advdm", "sds", "diffusionguard"}, set(NAMES)
    for kind, editor in EDITORS.items():
        left_out = METHODS.keys() - methods_for(editor)
        is_of_sd = editor.pipeline_class.startswith("StableDiffusion") and "XL" not in editor.pipeline_class
        assert (of_unet <= left_out) != is_of_sd
        assert (of_tokens <= left_out) == (kind not in MODULES)
        assert left_out - {"instant"} <= of_unet | of_tokens


# ---------------------------------------------------------------------------------------------------------
# models/denoiser.py: what the defenses see of an editor with a U-Net is what its pipeline computes


def latents(*seeds: int) -> list[torch.Tensor]:
    return [tiny.noise(2, 4, 8, 8, seed=seed).double() for seed in seeds]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("shown", [True, False])
@pytest.mark.parametrize("k", [0, 700, torch.tensor([3, 900])])
def test_the_noise_is_that_of_the_network(prediction, shown, k):
    """By the scheduler's own conversion, image by image, with no words as the pipelines encode them.

    Checkpointing changes nothing.
    """
    editor = tiny.tiny_editor(shown, prediction, torch.float64)
    pipeline, (z_k, z) = editor.pipeline, latents(1, 2)
    found = Denoiser(editor, checkpointing=shown).predict_noise(z_k, k, z)
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
    editor = tiny.tiny_editor(True, prediction, torch.float64)
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


def test_timesteps_without_image_do_not_count():
    editor = tiny.tiny_editor(True, "v_prediction", torch.float64)
    scheduler = editor.pipeline.scheduler
    editor.pipeline.scheduler = DDIMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=True)
    assert editor.pipeline.scheduler.alphas_cumprod[-1] == 0
    denoiser, (z, noise) = Denoiser(editor), latents(1, 2)
    assert denoiser.alphas_cumprod.min() >= 0.004 and 800 < denoiser.first < 999
    assert editor.pipeline.scheduler.alphas_cumprod[denoiser.first + 1] < 0.004
    assert denoiser.edit(z, noise, 4).isfinite().all()


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
    denoiser, (z, noise) = Denoiser(tiny.tiny_editor(dtype=torch.float64)), latents(1, 2)
    monkeypatch.setattr(denoiser, "predict_noise", lambda z_k, k, z: noise)
    torch.testing.assert_close(denoiser.again(z, noise, share, 5), z)
