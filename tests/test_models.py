"""models.py: the model sets, and what each member is once it is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import facenet_pytorch
import huggingface_hub
import lpips
import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
import torchvision
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, CLIPModel, CLIPProcessor

import defend
import edit
import models
from models import MINI, MODEL_SETS
from utils import EDITOR_NAMES, UserError, load_image, to_tensor, to_working

CPU = torch.device("cpu")
F32 = torch.float32
PIX2PIX = EDITOR_NAMES[0]


def images(*shape: int, seed: int = 0, dtype: torch.dtype = F32) -> torch.Tensor:
    """Noise (B, 3, H, W) in [-1, 1]."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)).to(dtype) * 2 - 1


def model_set(base: str = "mini", **changes) -> models.ModelSet:
    return dataclasses.replace(MODEL_SETS[base], **{"resolution": 64, **changes})


def editor_set(directory: Path, kind: str = PIX2PIX, base: str = "mini", **changes) -> models.ModelSet:
    return model_set(base, editors={kind: str(directory)}, **changes)


# ---------------------------------------------------------------------------------------------------------
# sets and flags


def test_full_set_is_the_papers():
    assert dataclasses.asdict(MODEL_SETS["full"]) == {
        "name": "full",
        "editors": {
            "instruct-pix2pix": "timbrooks/instruct-pix2pix",
            "stable-diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        },
        "recognizer": "vggface2",
        "judge": "casia-webface",
        "perceptual": "vgg",
        "clip": "openai/clip-vit-base-patch32",
        "scheduler": "EulerAncestralDiscreteScheduler",
        "num_inference_steps": 100,
        "guidance_scale": 7.5,
        "image_guidance_scale": 1.5,
        "strength": 0.5,
        "resolution": 512,
        "detect_faces": True,
        "only_size": None,
    }


def test_mini_set_is_bundled():
    mini = MODEL_SETS["mini"]
    members = [mini.editors[PIX2PIX], mini.recognizer, mini.judge, mini.perceptual, mini.clip]
    names = ["editor", "recognizer", "judge", "perceptual", "clip"]
    assert members == [str(MINI / name) for name in names]
    assert Path(models.__file__).with_name("assets") / "mini" == MINI and MINI.is_absolute()
    assert (mini.name, mini.resolution, mini.only_size, mini.detect_faces) == ("mini", 128, 128, False)
    assert [models.shown(member) for member in members] == [f"assets/mini/{name}" for name in names]


@pytest.mark.parametrize("name", MODEL_SETS)
def test_without_flags_the_set_is_as_it_stands(name):
    for parse_args, needed in (
        (edit.parse_args, ["--prompt", "x"]),
        (defend.parse_args, []),
    ):
        args = parse_args(["--input_path", "a.png", "--models", name, *needed])
        assert models.choose(args) == MODEL_SETS[name]


def test_flags_replace_members_and_values():
    flags = "--input_path a --models mini --model_id me/ed --recognizer r --judge j --lpips p --resolution 96"
    chosen = models.choose(defend.parse_args(flags.split()))
    changed = {
        "editors": {PIX2PIX: "me/ed"},
        "recognizer": "r",
        "judge": "j",
        "perceptual": "p",
        "resolution": 96,
    }
    assert chosen == dataclasses.replace(MODEL_SETS["mini"], **changed)
    flags = "--input_path a --prompt x --num_inference_steps 7 --guidance_scale 0 --image_guidance_scale 2"
    chosen = models.choose(edit.parse_args(flags.split()))
    changed = {"num_inference_steps": 7, "guidance_scale": 0.0, "image_guidance_scale": 2.0}
    assert chosen == dataclasses.replace(MODEL_SETS["full"], **changed)


@pytest.mark.parametrize("flag", ["--model", "--target_model"])
def test_mini_has_no_stable_diffusion(flag):
    given = ["--input_path", "a", "--models", "mini", flag, "stable-diffusion"]
    with pytest.raises(UserError, match="mini models have no stable-diffusion editor") as caught:
        models.choose(defend.parse_args(given))
    assert "\n" not in str(caught.value)
    chosen = models.choose(defend.parse_args([*given, "--model_id", "me/sd"]))
    assert chosen.editors["stable-diffusion"] == "me/sd"


@pytest.mark.parametrize(
    ("name", "size", "warned"),
    [("mini", (128, 128), False), ("mini", (128, 127), True), ("full", (64, 96), False)],
)
def test_warning_for_what_a_set_was_not_made_for(name, size, warned):
    warning = models.size_warning(MODEL_SETS[name], size)
    assert (warning is not None) == warned
    if warned:
        assert "mini" in warning and "127x128 image" in warning and "\n" not in warning


# ---------------------------------------------------------------------------------------------------------
# the VAE


def test_load_vae_needs_the_vae_folder_alone_and_is_float32(tmp_path):
    tiny.tiny_vae(torch.float16).save_pretrained(tmp_path / "vae")
    vae = models.load_vae(editor_set(tmp_path), PIX2PIX, CPU, F32).vae
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
    x = images(2, 3, *size)
    z = models.WorkingVAE(vae, 64).encode(x).latent_dist.mean
    assert z.shape == (2, 4, *latent)
    assert torch.equal(z, vae.encode(to_working(x, 64)).latent_dist.mean)


def test_working_vae_casts_to_the_network():
    vae = models.WorkingVAE(tiny.tiny_vae(torch.bfloat16), 64)
    z = vae.encode(images(1, 3, 64, 64)).latent_dist.mean
    assert z.dtype == torch.bfloat16 and vae.decode(z.float()).sample.shape == (1, 3, 64, 64)


# ---------------------------------------------------------------------------------------------------------
# recognisers


@pytest.fixture(scope="session")
def facenet(tmp_path_factory) -> SimpleNamespace:
    """One random facenet in both of its file formats, its state, and the network itself."""
    root = tmp_path_factory.mktemp("facenet")
    pickle, safe = tiny.write_facenet(root / "net.pt"), tiny.write_facenet(root / "net.safetensors")
    state = load_file(safe)
    network = facenet_pytorch.InceptionResnetV1(pretrained=None, classify=False).eval()
    network.load_state_dict(state, strict=False)
    return SimpleNamespace(pt=pickle, safetensors=safe, state=state, network=network)


@pytest.fixture(scope="session")
def recognizer(tiny_models) -> models.Recognizer:
    return models.load_recognizer(str(tiny_models.recognizer), CPU, F32)


def whole(batch: torch.Tensor) -> list[list[models.Box]]:
    return [[(0, 0, batch.shape[3], batch.shape[2])]] * len(batch)


@pytest.mark.parametrize("write", [tiny.write_recognizer, tiny.write_convnext])
def test_transformers_recognizer_follows_its_preprocessor(tmp_path, write):
    write(tmp_path, size=24, mean=0.4, std=0.3)
    network = AutoModel.from_pretrained(tmp_path, dtype=F32)
    network.half().save_pretrained(tmp_path)  # as it is on disk; it must still run in float32
    loaded = models.load_recognizer(str(tmp_path), CPU, F32)
    x = images(2, 3, 24, 24)
    expected = network.float().eval()(((x + 1) / 2 - 0.4) / 0.3).pooler_output.flatten(1)
    embeddings = loaded.embed(x, whole(x))
    assert loaded.size == 24 and embeddings.dtype == F32 and not embeddings.requires_grad
    torch.testing.assert_close(embeddings, F.normalize(expected.detach()), atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_facenet_file_and_its_standardisation(facenet, suffix):
    loaded = models.load_recognizer(str(getattr(facenet, suffix)), CPU, F32)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 160, 160, 3), dtype=np.uint8)
    raw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()
    standardised = facenet_pytorch.fixed_image_standardization(raw)
    x = to_tensor(pixels)
    torch.testing.assert_close((x - loaded.mean) / loaded.std, standardised, atol=1e-6, rtol=0)
    with torch.no_grad():
        expected = facenet.network(standardised)  # of unit length already
    assert loaded.size == 160
    torch.testing.assert_close(loaded.embed(x, whole(x)), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["vggface2", "casia-webface"])
def test_facenet_by_name_is_read_as_weights_only(facenet, monkeypatch, name, tmp_path):
    asked = []
    (tmp_path / name).mkdir()  # the data set, which is no model
    monkeypatch.chdir(tmp_path)

    def fetch(url, **options):
        asked.append((url, options.get("weights_only")))
        return dict(facenet.state)

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    loaded = models.load_recognizer(name, CPU, F32)
    ((url, weights_only),) = asked
    assert weights_only is True and loaded.name == name
    assert url.startswith("https://github.com/timesler/facenet-pytorch/releases/") and url.endswith(
        f"{name}.pt"
    )


@pytest.mark.parametrize("member", ["recognizer", "vae", "clip"])
def test_a_pickle_that_would_run_code_is_refused(member, tmp_path, tiny_models):
    """A state dict on its own, and a directory that has pickles instead of safetensors."""
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    if member == "recognizer":
        path = place = tmp_path / "evil.pt"
    else:
        source, name = {
            "vae": (tiny_models.editor, "vae/diffusion_pytorch_model.bin"),
            "clip": (tiny_models.clip, "pytorch_model.bin"),
        }[member]
        place = shutil.copytree(source, tmp_path / "evil")
        path = place / name
        next(path.parent.glob("*.safetensors")).unlink()
    torch.save({"conv2d_1a.conv.weight": Evil()}, path)
    torch.load(path, weights_only=False)
    assert ran.exists()  # the bait works
    ran.unlink()
    load = {
        "recognizer": models.load_recognizer,
        "vae": lambda member, *where: models.load_vae(editor_set(member), PIX2PIX, *where),
        "clip": models.load_clip,
    }[member]
    with pytest.raises(UserError) as caught:
        load(str(place), CPU, F32)
    assert not ran.exists() and "\n" not in str(caught.value) and "evil" in str(caught.value)


def test_code_beside_the_weights_is_not_run(tmp_path, tiny_models):
    """A recogniser's directory whose config names a module of its own."""
    place = shutil.copytree(tiny_models.recognizer, tmp_path / "evil")
    (place / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Net: pass\n")
    config = json.loads((place / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Net"}
    (place / "config.json").write_text(json.dumps(config))
    with contextlib.suppress(UserError):
        models.load_recognizer(str(place), CPU, F32)
    assert not (tmp_path / "ran").exists()


def test_networks_are_channels_last(tiny_models):
    """In the place where they are loaded, so that every gradient runs through them so."""
    chosen = editor_set(tiny_models.editor)
    vae = models.load_vae(chosen, PIX2PIX, CPU, F32).vae
    editor = models.load_editor(chosen, PIX2PIX, CPU, F32, progress=False).pipeline
    for network in (vae, editor.vae, editor.unet):
        weights = [w for w in network.parameters() if w.ndim == 4]
        assert weights and all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_checkpointing_changes_memory_and_no_number(tiny_models):
    """Each block's forward runs again in the backward pass, and in it each residual block's once more;
    latents and gradient stay the same.
    """
    found = []
    for checkpointing in (False, True):
        chosen = editor_set(tiny_models.editor)
        vae = models.load_vae(chosen, PIX2PIX, CPU, F32, checkpointing=checkpointing)
        calls, inner = [], []
        vae.vae.encoder.mid_block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        norm = vae.vae.encoder.down_blocks[0].resnets[0].norm1
        norm.register_forward_pre_hook(lambda *_, inner=inner: inner.append(1))
        x = images(1, 3, 32, 32).requires_grad_()
        latent = vae.encode(x).latent_dist.mean
        (gradient,) = torch.autograd.grad(latent.square().sum(), x)
        found.append(((len(calls), len(inner)), latent.detach(), gradient))
    assert [calls for calls, *_ in found] == [(1, 1), (2, 3)]
    assert torch.equal(found[0][1], found[1][1]) and torch.allclose(found[0][2], found[1][2], atol=1e-6)


def test_embeddings_of_crops_are_unit_vectors_in_order(recognizer):
    x = images(2, 3, 64, 64)
    boxes = [[(0, 0, 40, 30), (10, 20, 64, 64)], [(5, 5, 37, 37)]]
    embeddings = recognizer.embed(x, boxes)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(3), atol=1e-5, rtol=0)
    for row, (image, (x0, y0, x1, y1)) in enumerate(((0, boxes[0][0]), (0, boxes[0][1]), (1, boxes[1][0]))):
        crop = F.interpolate(
            x[image : image + 1, :, y0:y1, x0:x1], size=(32, 32), mode="bilinear", antialias=True
        )
        torch.testing.assert_close(embeddings[row], recognizer.embed(crop, whole(crop))[0], atol=1e-5, rtol=0)


def test_face_similarity_is_the_mean_cosine_of_each_images_faces(recognizer):
    clean, other = images(3, 3, 64, 64), images(3, 3, 64, 64, seed=1)
    boxes = [[(0, 0, 64, 64)], [(0, 0, 32, 40), (8, 8, 64, 48), (20, 0, 60, 64)], [(16, 16, 48, 48)]]
    seen = []
    counting = dataclasses.replace(
        recognizer, network=lambda crops: seen.append(len(crops)) or recognizer.network(crops)
    )
    similarity = models.face_similarity_to(counting, clean, boxes)
    assert seen == [5]  # the clean faces, once
    other.requires_grad_(True)
    found = similarity(other)
    assert seen == [5, 5]
    by_hand = []
    for one, two, faces in zip(clean, other.detach(), boxes, strict=True):
        pairs = [
            (recognizer.embed(one[None], [[box]])[0], recognizer.embed(two[None], [[box]])[0])
            for box in faces
        ]
        by_hand.append(np.mean([float(a @ b) / float(a.norm() * b.norm()) for a, b in pairs]))
    assert found.detach().tolist() == pytest.approx(by_hand, abs=1e-5)
    assert similarity(clean).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    (gradient,) = torch.autograd.grad(found[2], other)
    assert gradient[2].abs().sum() > 0 and gradient[:2].abs().sum() == 0


# ---------------------------------------------------------------------------------------------------------
# finding faces


@pytest.fixture(scope="session")
def detector() -> models.FaceDetector:
    return models.FaceDetector(True, CPU)


@pytest.fixture(scope="session")
def astronaut() -> np.ndarray:
    """The face is at about x 180 to 270, y 60 to 175."""
    return load_image(models.ROOT / "assets/portraits/astronaut.png").pixels


def test_one_face_in_the_astronaut(detector, astronaut, monkeypatch):
    monkeypatch.setattr(models, "DETECTION_SIDE", 256)  # it is reduced, and the box scaled back
    ((x0, y0, x1, y1),) = detector(astronaut)
    assert np.abs(np.array([x0, y0, x1, y1]) - [181, 62, 267, 172]).max() <= 12


def test_the_largest_face_is_first(detector, astronaut):
    face = astronaut[:256, 96:352]
    canvas = np.full((256, 384, 3), 128, np.uint8)
    canvas[:128, :128] = np.asarray(Image.fromarray(face).resize((128, 128)))
    canvas[:, 128:] = face
    large, small = detector(canvas)
    assert large[0] > 128 and small[2] <= 128
    assert all(isinstance(side, int) for side in large)


@pytest.mark.parametrize(
    "pixels",
    [
        np.full((64, 64, 3), 128, np.uint8),
        np.random.default_rng(0).integers(0, 256, (128, 96, 3), dtype=np.uint8),
        np.random.default_rng(0).integers(0, 256, (33, 33, 3), dtype=np.uint8),
        np.zeros((9, 9, 3), np.uint8),
    ],
    ids=["flat", "noise", "33x33", "9x9"],
)
def test_no_face(detector, pixels):
    assert detector(pixels) == []


def test_without_detection_the_face_is_the_whole_image():
    assert models.FaceDetector(False, CPU)(np.zeros((45, 70, 3), np.uint8)) == [(0, 0, 70, 45)]


@pytest.mark.parametrize(
    ("box", "inside"),
    [
        ((1.9, 2.1, 10.9, 20), (1, 2, 10, 20)),
        ((-5.5, -1, 100, 100), (0, 0, 70, 45)),
        ((70, 0, 90, 10), None),
        ((-9, -9, 0, 0), None),
        ((10, 10, 10.5, 20), None),
    ],
)
def test_clip_box(box, inside):
    assert models.clip_box(box, (45, 70)) == inside


# ---------------------------------------------------------------------------------------------------------
# perceptual distance


@pytest.mark.parametrize("heads", [True, False])
def test_perceptual_distance_is_lpips(tmp_path, heads):
    network = models.load_perceptual(str(tiny.write_perceptual(tmp_path, heads)), CPU, F32)
    reference = lpips.LPIPS(
        net="squeeze", lpips=heads, pnet_rand=True, pretrained=heads, verbose=False
    ).eval()
    reference.load_state_dict(load_file(tmp_path / "model.safetensors"))
    clean, other = images(3, 3, 64, 72), images(3, 3, 64, 72, seed=1)
    distance = models.perceptual_distance_to(network, clean)
    expected = reference(other, clean).detach().flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance(other), expected, atol=1e-5, rtol=1e-5)
    assert distance(clean).tolist() == [0, 0, 0]
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training


def test_the_clean_features_are_computed_once(tiny_models, monkeypatch):
    network = models.load_perceptual(str(tiny_models.perceptual), CPU, F32)
    seen = []
    network.net.register_forward_hook(lambda *_: seen.append(1))
    distance = models.perceptual_distance_to(network, images(1, 3, 64, 64))
    distance(images(1, 3, 64, 64, seed=1))
    distance(images(1, 3, 64, 64, seed=2))
    assert len(seen) == 3


class Masked(torch.nn.Module):
    """A trunk whose one layer is zero where the image is dark, and not through a ReLU:
    that would hide a NaN.
    """

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.weight * x * (x > -1)]


def test_perceptual_gradient_is_finite_where_features_are_zero():
    network = SimpleNamespace(net=Masked(), scaling_layer=lambda x: x, lpips=False)
    clean, dark = images(1, 3, 8, 8), images(1, 3, 8, 8, seed=1)
    dark[..., :4] = -1
    dark.requires_grad_(True)
    (gradient,) = torch.autograd.grad(models.perceptual_distance_to(network, clean)(dark).sum(), dark)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


TRUNKS = {  # torchvision's name and the lengths of its features after which lpips looks
    "vgg": ("vgg16", [4, 9, 16, 23, 30]),
    "alex": ("alexnet", [2, 5, 8, 10, 12]),
    "squeeze": ("squeezenet1_1", [2, 5, 8, 10, 11, 12, 13]),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_trunks_are_torchvisions(monkeypatch, name, tmp_path):
    (tmp_path / name).mkdir()  # a folder of that name is no model
    monkeypatch.chdir(tmp_path)
    torchvision_name, lengths = TRUNKS[name]
    with torch.device("meta"):  # the classifiers are large and not needed
        network = torchvision.models.get_model(torchvision_name, weights=None)
    features = network.features.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in features.parameters():
        spread = 1.4 / max(1, parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
        parameter.data.normal_(0, spread, generator=generator)
    state = {f"features.{key}": value.clone() for key, value in features.state_dict().items()}
    asked = []

    def fetch(url, **options):
        asked.append((url, options.get("weights_only")))
        return {**state, "classifier.6.weight": torch.zeros(2, 2)}

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    for initialiser in ("normal_", "kaiming_normal_", "kaiming_uniform_", "uniform_"):  # 100 M values, unused
        monkeypatch.setattr(torch.nn.init, initialiser, lambda tensor, *_, **__: tensor)
    loaded = models.load_perceptual(name, CPU, F32)
    ((url, weights_only),) = asked
    assert weights_only is True and url.startswith(f"https://download.pytorch.org/models/{torchvision_name}-")
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        for found, length in zip(loaded.net(x), lengths, strict=True):
            torch.testing.assert_close(found, features[:length](x), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------
# CLIP


def test_clip_embeds_as_its_library_does(tiny_models):
    """Projected, not normalised, prepared by the model's own processor; alone or in a batch."""
    clip = models.load_clip(str(tiny_models.clip), CPU, F32)
    network = CLIPModel.from_pretrained(tiny_models.clip)
    processor = CLIPProcessor.from_pretrained(tiny_models.clip)
    pictures = np.stack([tiny.portrait((48, 64), seed=k) for k in range(3)])
    texts = ["a beard", "a much longer sentence about a hat that goes on and on"]
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(pixels) for pixels in pictures], return_tensors="pt")
        wanted = network.get_image_features(**inputs).pooler_output
        tokens = processor(text=texts[0], return_tensors="pt")
        of_text = network.get_text_features(**tokens).pooler_output
    found = clip.embed_images(pictures)
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(clip.embed_images(pictures[1:2]), found[1:2], atol=1e-5)
    assert torch.allclose(clip.embed_texts(texts)[:1], of_text, atol=1e-5)
    assert clip.embed_texts(["x" * 500]).shape == (1, 8)


def test_the_bundled_clip_is_float32_on_cpu():
    clip = models.load_clip(models.MODEL_SETS["mini"].clip, CPU, F32)
    assert clip.network.dtype == F32 and not any(p.requires_grad for p in clip.network.parameters())
    assert clip.embed_texts(["Let it be snowy"]).dtype == F32


# ---------------------------------------------------------------------------------------------------------
# weights that can't be had


def load_any_editor(chosen: models.ModelSet) -> models.Editor:
    return models.load_editor(chosen, PIX2PIX, CPU, F32, progress=False)


ABSENT = "facelock-tests/no-such-model"
LOADS = {
    "vae": (ABSENT, lambda: models.load_vae(editor_set(ABSENT), PIX2PIX, CPU, F32)),
    "editor": (ABSENT, lambda: load_any_editor(editor_set(ABSENT))),
    "vggface2": ("vggface2", lambda: models.load_recognizer("vggface2", CPU, F32)),
    "lpips": ("squeeze", lambda: models.load_perceptual("squeeze", CPU, F32)),
    "clip": (ABSENT, lambda: models.load_clip(ABSENT, CPU, F32)),
}


@pytest.mark.parametrize("what", LOADS)
def test_no_network_is_one_line_at_once(what, monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("the hub can't be reached")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # nothing is cached
    member, load = LOADS[what]
    begun = time.monotonic()
    with pytest.raises(UserError) as caught:
        load()
    text = str(caught.value)
    assert time.monotonic() - begun < 20  # no waiting for retries
    assert f"'{member}' can't be loaded (" in text and "--models mini" in text and "\n" not in text
    assert len(text.split("(", 1)[1].split(")")[0]) > 10  # a reason


def test_a_model_that_the_hub_does_not_know(monkeypatch):
    def missing(*args, **kwargs):
        response = SimpleNamespace(headers={}, request=None, status_code=404)
        raise RepositoryNotFoundError("404: no such repository\nmore", response=response)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", missing)
    with pytest.raises(UserError, match="404: no such repository") as caught:
        models.load_vae(editor_set(ABSENT), PIX2PIX, CPU, F32)
    assert ABSENT in str(caught.value) and "\n" not in str(caught.value)


def test_without_a_network_the_cache_is_used(monkeypatch, tmp_path):
    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConnectionError, match="no route, and it is not in the local cache"):
        models._from_hub("me/model")
    (tmp_path / "models--me--model").mkdir()
    assert models._from_hub("me/model") == ("me/model", {"local_files_only": True})


def test_a_revision_is_asked_for_and_passed_on(monkeypatch):
    asked = []
    hub = huggingface_hub.HfApi
    monkeypatch.setattr(hub, "model_info", lambda self, name, **how: asked.append((name, how)))
    assert models._from_hub("me/model@v2") == ("me/model", {"revision": "v2"})
    assert models._from_hub("me/model") == ("me/model", {})
    assert asked == [("me/model", {"timeout": 10, "revision": "v2"}), ("me/model", {"timeout": 10})]


@pytest.mark.parametrize("member", ["/no/such/dir", "./none", "a/b/c"])
def test_a_directory_that_is_not_there_is_not_asked_of_the_hub(member, monkeypatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: pytest.fail("asked the hub"))
    for load in (
        lambda: models.load_vae(editor_set(member), PIX2PIX, CPU, F32),
        lambda: models.load_recognizer(member, CPU, F32),
        lambda: models.load_perceptual(member, CPU, F32),
        lambda: models.load_clip(member, CPU, F32),
    ):
        with pytest.raises(UserError, match="--models mini") as caught:
            load()
        assert member in str(caught.value) and "director" in str(caught.value)


# ---------------------------------------------------------------------------------------------------------
# the editor


@pytest.fixture(scope="session")
def editor(tiny_models) -> models.Editor:
    # guidance on, so that the instruction and the image both have a say
    chosen = editor_set(
        tiny_models.editor, num_inference_steps=2, guidance_scale=7.5, image_guidance_scale=1.5
    )
    return load_any_editor(chosen)


@pytest.mark.parametrize("size", [(64, 64), (50, 33), (45, 70), (131, 97)])
def test_an_edit_has_its_images_size(editor, size):
    x = images(1, 3, *size)
    edited = editor(x, ["hat"], 0)
    assert edited.shape == x.shape and edited.dtype == F32 and edited.abs().max() <= 1
    assert edited.std() > 0 and not torch.allclose(edited, x, atol=0.1)


def test_an_edit_depends_on_seed_prompt_and_image_alone(editor):
    x = images(3, 3, 48, 40)
    prompts = ["hat", "beard", "hat"]
    batch = editor(x, prompts, 7)
    singles = torch.cat([editor(x[i : i + 1], prompts[i : i + 1], 7) for i in range(3)])
    torch.testing.assert_close(batch, singles, atol=1e-3, rtol=0)
    assert torch.equal(singles[:1], editor(x[:1], ["hat"], 7))
    for other in (editor(x[:1], ["hat"], 8), editor(x[:1], ["beard"], 7), editor(x[2:], ["hat"], 7)):
        assert (singles[:1] - other).abs().max() > 1e-4


def test_an_edit_that_is_no_number_is_an_error(editor, monkeypatch):
    """As a file it would be black, and count as protection."""
    made = SimpleNamespace(images=torch.full((1, 3, 64, 64), torch.nan))
    monkeypatch.setattr(editor, "pipeline", lambda **knobs: made)
    monkeypatch.setattr(editor, "embed", lambda prompts: None)
    with pytest.raises(UserError, match="NaN or infinite pixels; try --dtype fp32"):
        editor(images(1, 3, 64, 64), ["hat"], 0)


@pytest.mark.parametrize("kind", ["instruct-pix2pix", "stable-diffusion"])
def test_what_the_pipeline_is_given(kind, monkeypatch):
    given = {}

    class Pipeline:
        vae = SimpleNamespace(encode=None)

        def __call__(self, **options):
            given.update(options)
            return SimpleNamespace(images=options["image"])

    monkeypatch.setattr(models.Editor, "embed", lambda self, texts: [f"E({text})" for text in texts])
    chosen = model_set(num_inference_steps=9, guidance_scale=3.0, image_guidance_scale=2.0, strength=0.4)
    x = images(2, 3, 50, 40)
    edited = models.Editor(Pipeline(), chosen, kind)(x, ["a", "b"], 5)
    torch.testing.assert_close(edited, x)  # out of [-1, 1], padded, and back
    image, noise = given.pop("image"), given.pop("generator")
    assert image.shape == (2, 3, 56, 40) and 0 <= image.min() < 0.1 and 0.9 < image.max() <= 1
    assert [generator.initial_seed() for generator in noise] == [5, 5] and noise[0] is not noise[1]
    knob = {"image_guidance_scale": 2.0} if kind == "instruct-pix2pix" else {"strength": 0.4}
    assert given == {
        "prompt_embeds": ["E(a)", "E(b)"],
        "negative_prompt_embeds": ["E()", "E()"],
        "num_inference_steps": 9,
        "guidance_scale": 3.0,
        "output_type": "pt",
        **knob,
    }


def test_an_edit_is_the_pipelines_own(editor):
    """What is computed once is the same: text embeddings, image latents, with guidance."""
    x = images(2, 3, 64, 64)
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(**editor.pipeline.components)
    pipeline.vae.encode, once = editor.pipeline.vae.encode.encode, editor.pipeline.vae.encode
    try:
        wanted = pipeline(
            prompt=["hat", "beard"],
            image=(x + 1) / 2,
            num_inference_steps=2,
            guidance_scale=7.5,
            image_guidance_scale=1.5,
            generator=[torch.Generator().manual_seed(3) for _ in range(2)],
            output_type="pt",
        ).images
    finally:
        pipeline.vae.encode = once
    assert torch.allclose(editor(x, ["hat", "beard"], 3), wanted * 2 - 1, atol=1e-5)


def test_texts_and_portraits_are_encoded_once(editor, monkeypatch):
    encoded, embedded = [], []
    once = editor.pipeline.vae.encode
    monkeypatch.setattr(once, "encode", lambda x, f=once.encode: encoded.append(len(x)) or f(x))
    monkeypatch.setattr(editor, "texts", {})
    hook = editor.pipeline.text_encoder.register_forward_pre_hook(lambda *_: embedded.append(1))
    a, b = images(2, 3, 64, 64, seed=8)
    editor(torch.stack([a, a]), ["one", "two"], 0)
    editor(torch.stack([a, b]), ["three", "one"], 0)
    editor(torch.stack([b, b]), ["two", "three"], 0)
    hook.remove()
    assert encoded == [1, 1] and len(embedded) == 4  # and the empty one


@pytest.mark.parametrize(
    ("base", "scheduler"), [("full", "EulerAncestralDiscreteScheduler"), ("mini", "DDIMScheduler")]
)
def test_img2img_editor(tiny_models, base, scheduler):
    kind = "stable-diffusion"
    chosen = editor_set(tiny_models.img2img, kind, base, num_inference_steps=4)
    loaded = models.load_editor(chosen, kind, CPU, F32, progress=False)
    assert type(loaded.pipeline).__name__ == "StableDiffusionImg2ImgPipeline"
    assert type(loaded.pipeline.scheduler).__name__ == scheduler
    assert loaded.pipeline.safety_checker is None and loaded.kind == kind
    x = images(1, 3, 50, 33)
    assert loaded(x, ["hat"], 0).shape == x.shape
