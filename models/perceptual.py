"""The perceptual distance: an lpips.LPIPS (Zhang et al. 2018), and its form that the attack maximises."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.loading import compiled, file_way, frozen, loading, read_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# lpips' name of a trunk -> torchvision's, and GB
LPIPS_TRUNKS = {"vgg": ("vgg16", 0.5), "alex": ("alexnet", 0.2), "squeeze": ("squeezenet1_1", 0.005)}


def perceptual_distance_to(network: Any, clean: Tensor) -> Callable[[Tensor], Tensor]:
    """Makes a function of images like `clean` (B, 3, H, W) in [-1, 1]: their LPIPS distance to it, (B,).

    The same as `network(images, clean)` of an lpips.LPIPS (Zhang et al. 2018), with the clean image's
    features computed here, once. The gradient is finite where a pixel's features are all zero, which lpips'
    isn't.
    """
    import torch

    dtype = next(network.net.parameters()).dtype

    def features(images: Tensor) -> list[Tensor]:
        unit = []
        for layer in network.net(network.scaling_layer(images.to(dtype))):
            layer = layer.float() if layer.dtype.itemsize == 2 else layer
            norm = (layer.square().sum(dim=1, keepdim=True) + 1e-20).sqrt()
            unit.append(layer / (norm + 1e-10))
        return unit

    with torch.no_grad():
        reference = features(clean)

    def perceptual_distance(images: Tensor) -> Tensor:
        total = torch.zeros(len(images), device=images.device, dtype=reference[0].dtype)
        for k, (layer, other) in enumerate(zip(features(images), reference, strict=True)):
            difference = (layer - other).square()  # (B, C, h, w)
            if network.lpips:
                difference = network.lins[k](difference.to(dtype)).to(total.dtype)
            total = total + difference.sum(dim=1).mean(dim=(1, 2))
        return total

    return perceptual_distance


@functools.cache
def load_perceptual(member: str, device: torch.device, dtype: torch.dtype, compile: bool = False) -> Any:
    """Loads an lpips.LPIPS: by trunk (ImageNet weights of torchvision, heads of lpips), or a directory.

    The directory has `config.json` (the keywords net and lpips) and `model.safetensors`. Cached.
    Raises UserError.
    """
    import lpips
    import torch
    import torchvision

    url = way = ""
    if member in LPIPS_TRUNKS:
        trunk, size = LPIPS_TRUNKS[member]
        url = torchvision.models.get_model_weights(trunk).DEFAULT.url
        way = file_way(size, url)
    with loading("LPIPS", member, way):
        make = functools.partial(lpips.LPIPS, pnet_rand=True, verbose=False)
        if url:  # lpips would load the trunk itself, but without `weights_only`
            network, how = make(net=member), {"weights_only": True, "check_hash": True}
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", **how)
            # slice2.5.weight is features.5.weight in torchvision
            names = {key: re.sub(r"^slice\d+\.", "features.", key) for key in network.net.state_dict()}
            network.net.load_state_dict({key: state[name] for key, name in names.items()})
        elif Path(member).is_dir():
            config = json.loads((Path(member) / "config.json").read_text())
            network = make(net=config["net"], lpips=config["lpips"], pretrained=False)
            network.load_state_dict(read_state(Path(member) / "model.safetensors"))
        else:
            raise FileNotFoundError(f"neither a directory nor one of {', '.join(LPIPS_TRUNKS)}")
        network = frozen(network, device, dtype)
    if compile:
        compiled(network.net)
    return network
