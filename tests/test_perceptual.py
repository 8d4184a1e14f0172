"""models/perceptual.py: the distance is lpips' own, from the right weights."""

from __future__ import annotations

from types import SimpleNamespace

import lpips
import pytest
import tiny
import torch
import torchvision
from safetensors.torch import load_file
from tiny import noise

from models.perceptual import load_perceptual, perceptual_distance_to

CPU = torch.device("cpu")
F32 = torch.float32


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
