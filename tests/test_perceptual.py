"""models/perceptual.py, models/clip.py: the distance and the embeddings are the libraries' own."""

from types import SimpleNamespace

import lpips
import numpy as np
import pytest
import tiny
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file
from tiny import CPU, F32, noise
from transformers import CLIPModel, CLIPProcessor

from models.clip import load_clip
from models.config import MODEL_SETS
from models.perceptual import load_perceptual, perceptual_distance_to


@pytest.mark.parametrize("heads", [True, False])
def test_perceptual_distance_is_lpips(tmp_path, heads):
    network = load_perceptual(str(tiny.write_perceptual(tmp_path, heads)), CPU, F32)
    reference = lpips.LPIPS(
        net="squeeze", lpips=heads, pnet_rand=True, pretrained=heads, verbose=False
    ).eval()
    reference.load_state_dict(load_file(tmp_path / "model.safetensors"))
    clean, other = noise(3, 3, 64, 72), noise(3, 3, 64, 72, seed=1)
    distance = perceptual_distance_to(network, clean)
    expected = reference(other, clean).detach().flatten()
    assert expected.min() > 1e-3
    torch.testing.assert_close(distance(other), expected, atol=1e-5, rtol=1e-5)
    assert distance(clean).tolist() == [0, 0, 0]
    assert not any(parameter.requires_grad for parameter in network.parameters()) and not network.training


class Masked(torch.nn.Module):
    """A trunk whose layer is zero where the image is dark, but not by a ReLU, which would hide a NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.weight * x * (x > -1)]


def test_perceptual_gradient_is_finite_where_features_are_zero():
    network = SimpleNamespace(net=Masked(), scaling_layer=lambda x: x, lpips=False)
    clean, dark = noise(1, 3, 8, 8), noise(1, 3, 8, 8, seed=1)
    dark[..., :4] = -1
    dark.requires_grad_(True)
    (gradient,) = torch.autograd.grad(perceptual_distance_to(network, clean)(dark).sum(), dark)
    assert gradient.isfinite().all() and gradient.abs().sum() > 0


TRUNKS = {  # torchvision's name and the lengths of its features after which lpips looks
    "vgg": ("vgg16", [4, 9, 16, 23, 30]),
    "alex": ("alexnet", [2, 5, 8, 10, 12]),
    "squeeze": ("squeezenet1_1", [2, 5, 8, 10, 11, 12, 13]),
}


@pytest.mark.parametrize("name", TRUNKS)
def test_lpips_trunks_are_torchvisions(monkeypatch, name, tmp_path, fresh_loaders):
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
    loaded = load_perceptual(name, CPU, F32)
    ((url, weights_only),) = asked
    assert weights_only is True and url.startswith(f"https://download.pytorch.org/models/{torchvision_name}-")
    x = noise(1, 3, 64, 64)
    with torch.no_grad():
        for found, length in zip(loaded.net(x), lengths, strict=True):
            torch.testing.assert_close(found, features[:length](x), atol=1e-5, rtol=1e-5)


def test_clip_embeds_as_its_library_does():
    """Projected, not normalised, prepared by the model's own processor; alone or in a batch."""
    clip = load_clip(MODEL_SETS["mini"].clip, CPU, F32)
    network = CLIPModel.from_pretrained(MODEL_SETS["mini"].clip, dtype=F32)
    processor = CLIPProcessor.from_pretrained(MODEL_SETS["mini"].clip)
    pictures = np.stack([tiny.portrait((48, 64), seed=k) for k in range(3)])
    texts = ["a beard", "a much longer sentence about a hat that goes on and on"]
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(pixels) for pixels in pictures], return_tensors="pt")
        wanted = network.get_image_features(**inputs).pooler_output
        tokens = processor(text=texts[0], return_tensors="pt")
        of_text = network.get_text_features(**tokens).pooler_output
    found = clip.embed_images(pictures)
    assert found.dtype == F32 and not any(p.requires_grad for p in clip.network.parameters())
    assert torch.allclose(found, wanted, atol=1e-5) and not torch.allclose(found.norm(dim=1), torch.ones(3))
    assert torch.allclose(clip.embed_images(pictures[1:2]), found[1:2], atol=1e-5)
    assert torch.allclose(clip.embed_texts(texts)[:1], of_text, atol=1e-5)
    assert clip.embed_texts(["x" * 500]).shape == (1, 128)
