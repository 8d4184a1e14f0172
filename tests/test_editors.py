"""models/editors.py and models/vaes.py: each editor end to end, tiny and random."""

import functools
import weakref
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pandas as pd
import pytest
import tiny
import tiny_editors
import torch
import torch._dynamo
from PIL import Image
from tiny import CPU, F32, noise
from tiny_editors import WRITERS

import defend
import edit
import experiment
from evaluation import purify
from images import load_image, to_working
from models import editors
from models.config import resolve
from models.editors import (
    EDITORS,
    Editor,
    Flux2Klein,
    FluxKontext,
    InstructPix2Pix,
    QwenImageEdit,
    TokenEditor,
    unload,
)
from models.vaes import Flux2VAE, QwenImageVAE, WorkingVAE, load_vae
from runs import read_record
from utils import UserError

pytestmark = pytest.mark.usefixtures("whole_images")

TOKENS = [kind for kind in WRITERS if issubclass(EDITORS[kind], TokenEditor)]
SHOWN = [kind for kind in WRITERS if kind != "stable-diffusion"]  # whose networks get the latents as they are
SIDE = 96  # px, --resolution


def load(kind: str, directory: Path, **settings) -> Editor:
    one = EDITORS[kind]
    own = {**one.knobs, "num_inference_steps": 2, "resolution": SIDE, "scheduler": one.scheduler}
    return one(str(directory), own | settings, CPU, F32)


@pytest.mark.parametrize("kind", WRITERS)
def test_defend_and_edit(kind, directory, tiny_models, tmp_path):
    """The scripts themselves, with nothing but --model to tell them; a portrait that is no square."""
    source, protected, edited = (tmp_path / name for name in ("face.png", "protected.png", "edit.png"))
    Image.fromarray(tiny.portrait((150, 100))).save(source)
    model = ["--models=mini", f"--model={kind}", f"--model_id={directory(kind)}", "--device=cpu"]
    model.append(f"--resolution={SIDE}")
    more = [f"--{member}={getattr(tiny_models, member)}" for member in ("recognizer", "judge")]
    more += [f"--lpips={tiny_models.perceptual}", "--num_iters=2", f"--output_path={protected}"]
    assert defend.main([f"--input_path={source}", *model, *more]) == 0
    changed = np.abs(load_image(protected).pixels.astype(int) - load_image(source).pixels)
    assert 0 < changed.max() <= 3  # of 255, within 0.03
    line = [f"--input_path={protected}", "--prompt=hat", "--seed=0", "--num_inference_steps=2", *model]
    assert edit.main([*line, f"--output_path={edited}"]) == 0
    assert load_image(edited).size == (150, 100) and load_image(edited).pixels.std() > 1


@pytest.mark.parametrize("kind", SHOWN[1:])
@pytest.mark.parametrize("method", ["denoise:0.3", "restore"])
def test_an_editor_purifies(kind, method, directory, tmp_path, capsys):
    """By its own denoiser, if this project sees that; and by an edit that asks for nothing."""
    (tmp_path / "in").mkdir()
    Image.fromarray(tiny.portrait((150, 100))).save(tmp_path / "in/face.png")
    flags = ["--models=mini", f"--model={kind}", f"--model_id={directory(kind)}", "--device=cpu"]
    flags += [f"--resolution={SIDE}", f"--method={method}", f"--input_dir={tmp_path}/in"]
    status = purify.main([*flags, f"--output_dir={tmp_path}/out"])
    if method != "restore" and EDITORS[kind].denoiser is None:
        assert status == 1 and "denoise needs the denoiser of " in capsys.readouterr().err
    else:
        made = load_image(tmp_path / "out/face.png")
        assert status == 0 and made.size == (150, 100) and made.pixels.std() > 1


@pytest.mark.parametrize("kind", WRITERS)
def test_an_edit_depends_on_seed_prompt_and_image_alone(kind, directory):
    steps = 1 if kind in SHOWN else 2  # at a strength of 0.5
    editor, x = load(kind, directory(kind), num_inference_steps=steps), noise(2, 3, 90, 70)
    batch = editor(x[[0, 1, 0]], ["hat", "beard", "beard"], 7)
    assert batch.shape == (3, 3, 90, 70) and batch.dtype == F32 and batch.abs().max() <= 1
    single = editor(x[1:], ["beard"], 7)
    torch.testing.assert_close(batch[1:2], single, atol=1e-3, rtol=0)
    for other in (editor(x[1:], ["beard"], 8), batch[2], batch[2] - batch[0] + single):
        assert (single - other).abs().max() > 1e-4
    assert getattr(editor.pipeline, "safety_checker", None) is None


def test_an_edit_is_the_pipelines_own(directory):
    editor = load("instruct-pix2pix", directory("instruct-pix2pix"), resolution=64)
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


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float16, "; try --dtype fp32"), (F32, "")])
def test_an_edit_that_is_no_number_is_an_error(directory, monkeypatch, dtype, hint):
    """As a file it would be black, and count as protection."""
    editor = load("instruct-pix2pix", directory("instruct-pix2pix"))
    broken = SimpleNamespace(images=torch.full((1, 3, 64, 64), torch.nan, dtype=dtype))
    monkeypatch.setattr(type(editor.pipeline), "__call__", lambda *_, **__: broken)
    with pytest.raises(UserError) as caught:
        editor(noise(1, 3, 64, 64), ["hat"], 0)
    assert str(caught.value) == f"the edit has NaN or infinite pixels{hint}"


@pytest.mark.parametrize(
    ("scheduler", "loaded"),
    [("EulerAncestralDiscreteScheduler", "EulerAncestralDiscreteScheduler"), (None, "DDIMScheduler")],
)
def test_a_scheduler_is_the_one_that_is_asked_for_or_the_editors_own(directory, scheduler, loaded):
    editor = load("stable-diffusion", directory("stable-diffusion"), scheduler=scheduler)
    assert type(editor.pipeline.scheduler).__name__ == loaded


@pytest.mark.parametrize("kind", ["sdxl-instruct-pix2pix", "flux2-klein"])
def test_an_unloaded_editor_leaves_its_memory_at_once(kind, directory):
    editor = load(kind, directory(kind), num_inference_steps=1)
    editor(noise(1, 3, 64, 64), ["hat"], 0)
    network = weakref.ref(getattr(editor.pipeline, "transformer", None) or editor.pipeline.unet)
    del editor
    unload()
    assert network() is None


def test_no_watermark_is_put_into_an_edit(directory, monkeypatch, fresh_loaders):
    """Also where the package that makes them is installed."""
    module = "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl_instruct_pix2pix"
    monkeypatch.setattr(f"{module}.is_invisible_watermark_available", lambda: True)
    monkeypatch.setattr(f"{module}.StableDiffusionXLWatermarker", SimpleNamespace, raising=False)
    kind = "sdxl-instruct-pix2pix"
    assert load(kind, directory(kind)).pipeline.watermark is None


# ---------------------------------------------------------------------------------------------------------
# what is optimised is what the editor sees


def seen(editor: Editor, x: torch.Tensor) -> SimpleNamespace:
    """What an edit gives to its VAE's encoder and, of that, to its network."""
    found, encode = SimpleNamespace(), editor.pipeline.vae.encode
    network = getattr(editor.pipeline, "transformer", None) or editor.pipeline.unet

    def encoding(image, *args, **kwargs):
        found.image = image
        return encode(image, *args, **kwargs)

    def hook(module, args, kwargs):
        found.given = kwargs.get("hidden_states", args[0] if args else None)

    handle = network.register_forward_pre_hook(hook, with_kwargs=True)
    editor.pipeline.vae.encode = encoding
    try:
        editor(x, ["hat"] * len(x), 0)
    finally:
        handle.remove()
        del editor.pipeline.vae.encode
    return found


def packed(z: torch.Tensor) -> torch.Tensor:
    """2x2 patches as tokens, (B, C, h, w) -> (B, h/2 w/2, 4C): what FLUX.1 and Qwen-Image read."""
    b, c, h, w = z.shape
    return z.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


@pytest.mark.parametrize("kind", SHOWN)
@pytest.mark.parametrize("size", [(150, 100), (90, 70)])
def test_the_vae_sees_what_the_editor_sees(kind, size, directory, monkeypatch):
    """Pixels, up to the 8 bits in which a token editor gets them, and the latents that its network gets."""
    editor, x = load(kind, directory(kind), num_inference_steps=1), noise(1, 3, *size)
    vae = load_vae(EDITORS[kind], str(directory(kind)), SIDE, CPU, F32)
    found, is_token = seen(editor, x), kind in TOKENS
    working = EDITORS[kind].to_working(x, SIDE)
    pixels = found.image[:, :, 0] if found.image.ndim == 5 else found.image
    torch.testing.assert_close(pixels, working, atol=0.501 / 127.5 if is_token else 1e-6, rtol=0)
    whole = vae.encode(x).latent_dist.mean
    monkeypatch.setattr(vae, "to_working", lambda images, _: images)
    torch.testing.assert_close(vae.encode(working).latent_dist.mean, whole)
    z = vae.encode(pixels).latent_dist.mean
    if kind == "flux2-klein":  # its patches are channels already
        expected = z.flatten(2).transpose(1, 2)
    elif kind == "flux-kontext":
        config = editor.pipeline.vae.config
        expected = packed((z - config.shift_factor) * config.scaling_factor)
    else:
        expected = packed(z) if is_token else z
    given = found.given[:, -expected.shape[1] :] if is_token else found.given[:1, -4:]
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert z.std() > 0.05


@pytest.mark.parametrize("kind", WRITERS)
def test_a_gradient_reaches_the_portrait(kind, directory):
    """Through the resize: each pixel of a portrait of another size and shape has its say."""
    vae = load_vae(EDITORS[kind], str(directory(kind)), SIDE, CPU, F32)
    x = noise(1, 3, 150, 100).requires_grad_()
    y = vae.decode(vae.encode(x).latent_dist.mean).sample
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.9
    assert y.shape[-2:] == EDITORS[kind].to_working(x, SIDE).shape[-2:]


@pytest.mark.parametrize(
    ("make", "kind", "adapter"),
    [("tiny_flux2_vae", Flux2Klein, Flux2VAE), ("tiny_qwen_vae", QwenImageEdit, QwenImageVAE)],
)
def test_an_adapter_is_the_usual_vae(make, kind, adapter, tmp_path):
    """Mean, log variance and decoder of a network's own, by its config's class, from its folder alone."""
    network, x = getattr(tiny_editors, make)(), noise(2, 3, 64, 96)
    network.save_pretrained(tmp_path / "vae")
    vae = load_vae(kind, str(tmp_path), 96, CPU, F32)
    assert type(vae) is adapter and type(vae.vae) is type(network)
    vae.to_working = to_working  # at the image's own size
    video = x[:, :, None] if adapter is QwenImageVAE else x
    own, given = network.encode(video).latent_dist, vae.encode(x).latent_dist
    back = vae.decode(given.mean).sample
    reference = network.decode(own.mean).sample
    torch.testing.assert_close(back, reference[:, :, 0] if video.ndim == 5 else reference, atol=1e-4, rtol=0)
    assert given.mean.numel() == own.mean.numel() and given.logvar.shape == given.mean.shape
    narrower = (own.logvar.flatten(1).sum(1) - given.logvar.flatten(1).sum(1)) / 2  # as the mean is
    expected = scale_of(network).log().sum() * given.mean[0, 0].numel()
    torch.testing.assert_close(narrower, expected.expand(2), atol=0.01, rtol=1e-4)


def scale_of(network: torch.nn.Module) -> torch.Tensor:
    """By how much an adapter divides each channel."""
    if hasattr(network, "bn"):
        return (network.bn.running_var + network.bn.eps).sqrt()
    return torch.tensor(network.config.latents_std)


def test_a_vae_of_another_class_is_loaded_by_its_config(tmp_path):
    """Whatever the editor's kind: somebody's checkpoint may have another."""
    tiny_editors.tiny_qwen_vae().save_pretrained(tmp_path / "vae")
    assert type(load_vae(FluxKontext, str(tmp_path), 64, CPU, F32)) is QwenImageVAE
    tiny.tiny_vae().save_pretrained(tmp_path / "plain" / "vae")
    assert type(load_vae(Flux2Klein, str(tmp_path / "plain"), 64, CPU, F32)) is WorkingVAE
    config = tmp_path / "plain" / "vae" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKL", "AutoencoderOfTomorrow"))
    with pytest.raises(UserError, match="no class AutoencoderOfTomorrow in this version of diffusers"):
        load_vae(Flux2Klein, str(tmp_path / "plain"), 32, CPU, F32)


def gradient_of(vae: WorkingVAE, x: torch.Tensor) -> torch.Tensor:
    """Of the latent's squares."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(vae.encode(x).latent_dist.mean.square().sum(), x)[0]


def test_checkpointing_computes_again_and_changes_no_number(tiny_models, fresh_loaders):
    calls, found = [], []
    for checkpointing in (False, True):
        vae = load_vae(InstructPix2Pix, str(tiny_models.editor), 64, CPU, F32, checkpointing=checkpointing)
        vae.vae.encoder.mid_block.register_forward_pre_hook(lambda *_: calls.append(len(found)))
        found.append(gradient_of(vae, noise(1, 3, 32, 32)))
    assert calls == [0, 1, 1] and torch.allclose(*found, atol=1e-6)


@pytest.mark.slow
def test_a_compiled_vae_takes_any_number_of_sizes(tiny_models, monkeypatch, fresh_loaders):
    """With the tracer alone, without a code generator. Each has its graph, beyond torch's limit, here two."""
    graphs, sizes = [], [(64, 64), (56, 64), (64, 48)]

    def backend(graph, inputs):
        graphs.append([tuple(value.shape) for value in inputs if isinstance(value, torch.Tensor)])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    place = InstructPix2Pix, str(tiny_models.editor), 64, CPU, F32
    with torch._dynamo.config.patch(recompile_limit=2, accumulated_recompile_limit=2):
        plain, compiled = (load_vae(*place, compile=compile) for compile in (False, True))
        for size in [*sizes, *sizes]:
            x = noise(1, 3, *size)
            torch.testing.assert_close(gradient_of(compiled, x), gradient_of(plain, x), atol=1e-6, rtol=1e-5)
    torch._dynamo.reset()
    assert all((1, 3, *size) in shapes for size, shapes in zip(sizes, graphs, strict=True))


def test_sdxls_vae_is_float32_where_float16_would_overflow_and_qwens_is_not_checkpointed(directory):
    """As the pipelines run them."""
    with pytest.raises(UserError, match="--checkpointing: AutoencoderKLQwenImage can't"):
        load_vae(QwenImageEdit, str(directory("qwen-image-edit")), SIDE, CPU, F32, checkpointing=True)
    place = str(directory("sdxl-instruct-pix2pix"))
    kind = EDITORS["sdxl-instruct-pix2pix"]
    assert load_vae(kind, place, SIDE, CPU, torch.float16).vae.dtype == F32
    assert load_vae(kind, place, SIDE, CPU, torch.bfloat16).vae.dtype == torch.bfloat16


def test_kontexts_sizes_are_those_of_its_pipeline():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

    for width, height in PREFERRED_KONTEXT_RESOLUTIONS:
        assert FluxKontext.working_size((2 * height, 2 * width), 1024) == (height, width)
    assert FluxKontext.working_size((1350, 1080), 1024) == (1104, 944)  # 4:5, which is not among them
    assert FluxKontext.working_size((1350, 1080), 512) == (544, 480)


def test_qwens_sizes_are_those_of_its_pipeline():
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    for height, width in ((300, 200), (1350, 1080), (4000, 6000), (512, 512)):
        expected = calculate_dimensions(1024**2, width / height)[::-1]
        assert QwenImageEdit.working_size((height, width), 1024) == expected


@pytest.mark.parametrize(
    ("size", "expected"),
    [((512, 512),) * 2, ((1350, 1080), (1136, 912)), ((3000, 2000), (1248, 832)), ((99, 75), (96, 64))],
)
def test_kleins_sizes_are_never_larger_nor_over_the_area(size, expected):
    assert Flux2Klein.working_size(size, 1024) == expected
    assert expected[0] * expected[1] <= 1024**2


@pytest.mark.parametrize("size", [(60, 200), (70, 700)])
def test_klein_refuses_what_its_pipeline_refuses(size):
    with pytest.raises(UserError, match="under 64 px, or over 8:1"):
        Flux2Klein.working_size(size, 1024)
    with pytest.raises(UserError, match="--resolution: over 1024"):
        resolve(model="flux2-klein", resolution=1100)


@pytest.mark.parametrize(("kind", "ignored"), [("flux2-klein", True), ("flux-kontext", False)])
def test_who_works_without_guidance_says_that_it_is_ignored(kind, ignored, directory, capsys):
    for scale in (1.0, 2.0):
        assert capsys.readouterr().err == ""
        load(kind, directory(kind), guidance_scale=scale)
    assert ("--guidance_scale is ignored" in capsys.readouterr().err) is ignored


@pytest.mark.parametrize(("kind", "read"), [("instruct-pix2pix", tiny.TOKENS), ("flux-kontext", 64)])
def test_an_instruction_that_is_cut_is_said_once(kind, read, directory, capsys):
    """By the tokenizer that counts: that of FLUX's T5, though CLIP's reads fewer."""
    editor, x = load(kind, directory(kind), num_inference_steps=1), noise(1, 3, 64, 64)
    editor(x, ["h" * (read - 3)], 0)
    assert "are cut" not in capsys.readouterr().err
    for _ in range(2):
        editor(x, ["h" * (read + 3)], 0)
    (line,) = [text for text in capsys.readouterr().err.splitlines() if "are cut" in text]
    assert line.startswith(f"warning: the editor reads {read} tokens; the last ") and "hhh" in line


@pytest.mark.parametrize(
    ("kind", "dtype"), [("instruct-pix2pix", torch.float16), ("flux-kontext", torch.bfloat16)]
)
def test_sixteen_bits_are_those_of_the_editor(kind, dtype, monkeypatch):
    monkeypatch.setattr("utils.pick_device", lambda _: torch.device("cuda"))
    assert resolve(model=kind).dtype == dtype
    assert resolve(model=kind, dtype="fp16").dtype == torch.float16


def test_transfer_is_a_row_a_protection_and_a_column_an_editor(directory, tiny_models, tmp_path, capsys):
    """Protected once, edited by two."""
    tiny.write_portraits(tmp_path / "faces", n=2)
    root, members = tmp_path / "out", vars(tiny_models)
    line = [f"--image_dir={tmp_path / 'faces'}", f"--output_dir={root}", "--methods", "encoder", "noise"]
    line += ["--models=mini", "--device=cpu", f"--lpips={tiny_models.perceptual}"]
    line += [f"--{name}={members[name]}" for name in ("recognizer", "judge")]
    line += ["--prompts=13", "--num_iters=1", "--num_inference_steps=1", f"--clip_id={tiny_models.clip}"]
    line += [f"--model_id={tiny_models.editor}", "--resolution=64", "--edit_models"]
    line += [str(tiny_models.editor), f"flux-kontext={directory('flux-kontext')}"]
    line[2:2] = ["--latex", "--baseline=noise"]
    assert experiment.main(line) == 0
    assert pd.read_csv(root / "all_metric_minus_baseline.csv")["method"].tolist() == ["clean", "encoder"]
    assert "toprule" in (root / "all_metric.tex").read_text() and (root / "transfer.tex").exists()
    table = pd.read_csv(root / "transfer.csv")
    assert list(table["method"]) == ["clean", "encoder", "noise"] and table["budget"][1] == 0.03
    assert list(table["attacked"]) == ["none", "instruct-pix2pix-editor", "none"]
    other = root / "editors" / "flux-kontext-flux-kontext"
    columns = {"edited by instruct-pix2pix-editor": root, "edited by flux-kontext-flux-kontext": other}
    assert list(table.columns[3:]) == list(columns)
    for column, place in columns.items():
        own = pd.read_csv(place / "all_metric.csv")["left"]
        np.testing.assert_allclose(table[column], own, atol=1e-5)
        made = read_record(place / "edits" / "noise" / "budget_0.03" / "seed0")["arguments"]
        assert column.startswith(f"edited by {made['model']}-")
        editor = pd.read_csv(place / "per_image.csv")["editor"].unique().tolist()
        assert len(editor) == 1 and editor[0].startswith(f"{made['model']}=")
    assert not (other / "protected").exists()
    assert editors._load_pipeline.cache_info().currsize == 1  # the first one made room
    assert "edited by flux-kontext" in (root / "transfer.md").read_text()
    capsys.readouterr()
    assert experiment.main([*line[:-2], "me/ed", "me/ed"]) == 1
    assert "--edit_models: an editor is named twice" in capsys.readouterr().err
    other = [f"--judge={tiny_models.recognizer}", f"--recognizer={tiny_models.judge}"]
    assert experiment.main([*line, *other]) == 1
    assert "all_metric.csv: measured by other networks or photos (attacked recog" in capsys.readouterr().err
    assert experiment.main([*line, "--baseline=vae"]) == 1
    assert "--baseline vae: no row has this name (there are clean encoder@0.03" in capsys.readouterr().err
    line[1] = f"--output_dir={tmp_path / 'new'}"
    assert experiment.main([*line[:-1], "/no/such"]) == 1  # before anything is protected
    assert "'/no/such' can't be loaded" in capsys.readouterr().err and not (tmp_path / "new").exists()
