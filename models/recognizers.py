"""Face recognisers of every kind: a network, its crop, and its cosines of strangers.

`KINDS` lists them; a new one is a function and a row. A recogniser that an attack has seen can't be a judge,
nor can one that was trained like it.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.faces import Box, BoxCrop, PointCrop
from models.loading import compiled, complete, file_way, frozen, loading, read_state, recorded
from utils import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# facenet-pytorch's two trainings of InceptionResnetV1 (its release v2.2.9)
FACENET_RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
FACENET_URLS = {
    "vggface2": FACENET_RELEASE + "20180402-114759-vggface2.pt",
    "casia-webface": FACENET_RELEASE + "20180408-102900-casia-webface.pt",
}
FACENET_CROP = 160  # px

# The crop that InsightFace, AdaFace, SFace and their kin are trained on, 112 px (InsightFace, face_align.py)
ARCFACE_SIDE = 112
ARCFACE = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))

DLIB_SIDE = 150  # px
MOST_SIDE = 4096  # px, of a recogniser's pictures
DLIB = ((47.55, 46.6), (100.46, 46.6), (74, 76.6), (50.4, 103), (97.6, 103))
DLIB_MEAN, DLIB_STD = (122.782, 117.001, 104.298), 256  # of RGB in [0, 255]
DLIB_FILE = "models/dlib_face_recognition_resnet_model_v1.dat"  # of the package face_recognition_models


# dlib's, by the portraits that it is asked about: 171 pairs of photos of 7 people, threshold as if cosines
# were normal (it is dlib's usual distance of 0.6); 44,551 pairs of 299 validation people of mini/
DLIB_STRANGERS = {
    "photos": {"strangers_mean": 0.829, "threshold": 0.921},
    "mini": {"strangers_mean": 0.925, "threshold": 0.973},
}


@dataclass
class Recognizer:
    """A face recogniser: its network, how its crops are made, (crop - mean) / std, and its threshold.

    strangers_mean and threshold are of the cosines of pairs of strangers; None: not measured.
    """

    name: str
    network: torch.nn.Module  # (N, 3, size, size) -> (N, D), or transformers' output with a `pooler_output`
    crop: BoxCrop | PointCrop
    mean: Tensor  # (1, 3, 1, 1), in [-1, 1]
    std: Tensor
    dtype: torch.dtype
    strangers_mean: float | None = None
    threshold: float | None = None  # one pair in a thousand is above it: the same person, then
    is_bgr: bool = False  # whether the network wants blue first
    one_by_one: bool = False  # whether it takes no batches

    def left(self, cosine: Tensor) -> Tensor:
        """Puts cosines on a scale that recognisers share: 1 the same picture, 0 a stranger; NaN: unknown."""
        mean = math.nan if self.strangers_mean is None else self.strangers_mean
        return (cosine - mean) / (1 - mean)

    def embed(self, images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
        """Embeds all boxes of all images, image by image -> unit vectors, float (sum of boxes, D).

        images: (B, 3, H, W) in [-1, 1], boxes in its pixels. Differentiable.
        """
        import torch
        import torch.nn.functional as F

        crops = [
            self.crop(image[None], face) for image, faces in zip(images, boxes, strict=True) for face in faces
        ]
        batch = torch.cat(crops)  # (N, 3, size, size)
        batch = batch.flip(1) if self.is_bgr else batch
        batch = ((batch - self.mean.to(batch)) / self.std.to(batch)).to(self.dtype)
        found = [self.network(part) for part in (batch.split(1) if self.one_by_one else [batch])]
        found = [part if isinstance(part, torch.Tensor) else part.pooler_output for part in found]
        return F.normalize(torch.cat(found).flatten(1).to(images.dtype), dim=1)


def face_similarity_to(
    recognizers: Sequence[Recognizer], clean: Tensor, boxes: Sequence[Sequence[Box]]
) -> Callable[[Tensor], Tensor]:
    """Makes a function of images like `clean` (B, 3, H, W): their faces' cosine similarity to its, (B,).

    Every image has at least one box; the mean over its boxes and over the recognisers. The clean faces are
    embedded here, once.
    """
    import torch

    with torch.no_grad():
        references = [recognizer.embed(clean, boxes) for recognizer in recognizers]  # (sum of boxes, D) each

    def face_similarity(images: Tensor) -> Tensor:
        found = []
        for recognizer, reference in zip(recognizers, references, strict=True):
            cosines = (recognizer.embed(images, boxes) * reference).sum(dim=1)  # (sum of boxes,)
            of_images = cosines.split([len(faces) for faces in boxes])
            found.append(torch.stack([one.mean() for one in of_images]))
        return sum(found) / len(recognizers)

    return face_similarity


# ---------------------------------------------------------------------------------------------------------
# kinds: a function of a member's name -> the network, and the rest of a Recognizer

Parts = tuple["torch.nn.Module", dict[str, Any]]


def _described(path: Path, make_crop: Callable[[int], BoxCrop | PointCrop], side: int | None = None) -> dict:
    """Reads what a JSON in the manner of transformers' preprocessor_config.json says of a recogniser.

    size: height in px, unless the network's own `side` is known; image_mean and image_std, of values in
    [0, 1]; and, of ours, channel_order (RGB or BGR), strangers_mean and verification_threshold.
    """
    said = json.loads(path.read_text())
    order, height = said.get("channel_order", "RGB"), said.get("size", {}).get("height", side)
    if order not in ("RGB", "BGR"):
        raise UserError(f"{path}: channel_order is {order!r}, neither RGB nor BGR")
    if not isinstance(height, int) or not 16 <= height <= MOST_SIDE:
        raise UserError(f"{path}: its size is no height from 16 to {MOST_SIDE} px")
    if side not in (None, height):
        raise UserError(f"{path}: says {height} px, the network takes {side}")
    of_strangers = {}
    for name, key in (("strangers_mean", "strangers_mean"), ("threshold", "verification_threshold")):
        of_strangers[name] = value = said.get(key)
        if value is not None and not (isinstance(value, int | float) and -1 <= value < 1):
            raise UserError(f"{path}: {key} is {str(value)[:40]!r}, not a number from -1 to 1")
    scale = _scaled(said["image_mean"], said["image_std"])
    return {"crop": make_crop(height), "is_bgr": order == "BGR", **of_strangers, **scale}


def _scaled(mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """Turns mean and deviation of values in [0, 1] into those of values in [-1, 1]."""
    import torch

    mean, std = (
        torch.tensor(values, dtype=torch.float32).expand(3).reshape(1, 3, 1, 1) for values in (mean, std)
    )
    return {"mean": 2 * mean - 1, "std": 2 * std}


def _transformers(member: str, portraits: str) -> Parts:
    """Reads a local directory of transformers, whose preprocessor_config.json describes it."""
    from transformers import AutoModel

    # without dtype, transformers keeps the file's float16
    how = {"local_files_only": True, "trust_remote_code": False, "output_loading_info": True}
    network = complete("the network", AutoModel.from_pretrained(member, dtype="float32", **how))
    return network, _described(Path(member) / "preprocessor_config.json", BoxCrop)


def _facenet(member: str, portraits: str) -> Parts:
    """Loads a training of facenet-pytorch by name, or a state-dict file of one."""
    import torch
    from facenet_pytorch import InceptionResnetV1

    if member in FACENET_URLS:
        state = torch.hub.load_state_dict_from_url(
            FACENET_URLS[member], map_location="cpu", weights_only=True
        )
    elif Path(member).is_file():
        state = read_state(Path(member))
    else:
        names = ", ".join([*FACENET_URLS, "dlib", "frbench:BACKBONE-LOSS-DATA"])
        raise FileNotFoundError(f"neither a file, a directory nor one of {names}")
    network = InceptionResnetV1(pretrained=None)
    # The classifier over the training identities is not part of the embedding.
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("logits.")})
    # its fixed standardisation (v - 127.5) / 128
    return network, {"crop": BoxCrop(FACENET_CROP), **_scaled([0.5], [64 / 127.5])}


def _dlib(member: str, portraits: str) -> Parts:
    """Loads dlib's recogniser (King 2017, trained on some 3 million photos), from face_recognition_models."""
    from models.dlib import dlib_network

    if (path := weights_file(member)) is None:
        raise FileNotFoundError("its weights come with a package, which is not installed")
    scale = _scaled([value / 255 for value in DLIB_MEAN], [DLIB_STD / 255])
    parts = {"crop": PointCrop(DLIB_SIDE, DLIB), **DLIB_STRANGERS[portraits], **scale}
    return dlib_network(path.read_bytes()), parts


def _onnx(member: str, portraits: str) -> Parts:
    """Reads FILE.onnx, of five-point crops on ArcFace's template, which FILE.json describes."""
    path, said = Path(member), Path(member).with_suffix(".json")
    if not path.is_file():
        raise FileNotFoundError("no such file")
    if util.find_spec("onnx2torch") is None:
        raise UserError(f"{path}: ONNX files are read once onnx2torch is installed (pip install onnx2torch)")
    if not said.is_file():
        example = '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "channel_order": "RGB"}'
        raise UserError(f"{said}: not there; it says what {path.name} wants, of values in [0, 1]: {example}")
    import onnx
    import onnx2torch

    model = onnx.load(path)
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [entry for entry in model.graph.input if entry.name not in weights]
    shape = [axis.dim_value for axis in inputs[0].type.tensor_type.shape.dim]
    side = shape[-1]
    if len(inputs) != 1 or len(shape) != 4 or shape[1] != 3 or shape[2] != side or not side:
        raise UserError(f"{path}: takes {shape}, not one batch of square pictures (N, 3, S, S)")
    return onnx2torch.convert(model), _described(said, arcface, side) | {"one_by_one": shape[0] == 1}


def _frbench(member: str, portraits: str) -> Parts:
    """Loads one of FRBench's recognisers, frbench:BACKBONE-LOSS-DATA, which fetches its weights once."""
    if util.find_spec("frbench") is None:
        raise UserError(f"{member}: needs a package (pip install frbench)")
    import torch
    import yaml
    from frbench.backbones import build_backbone
    from frbench.utils import download

    # not through its FR class, which asks for news of itself and brings a detector
    asset = download.get_asset("_".join(member.removeprefix(FRBENCH).rsplit("-", 2)))
    config, weights = (Path(asset["path"]) / asset["contents"][name] for name in ("config", "weight"))
    said = yaml.safe_load(config.read_text())
    network = build_backbone(
        said["backbone"]["name"], said["backbone"].get("kwargs", {}), torch.device("cpu")
    )
    network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    wanted = said.get("input", {})
    side = wanted.get("size", [ARCFACE_SIDE])[0]
    own = wanted.get("template")
    crop = PointCrop(side, tuple(map(tuple, own))) if own else arcface(side)
    scale = _scaled(wanted.get("mean", [0.5]), wanted.get("var", wanted.get("std", [0.5])))
    return network, {"crop": crop, "is_bgr": wanted.get("channel") == "bgr", **scale}


def arcface(side: int, share: float = 1.0) -> PointCrop:
    """Makes a crop of a side in px; ArcFace's, scaled, is this share of it, in the middle."""
    border, size = side * (1 - share) / 2, side * share
    return PointCrop(side, tuple(tuple(border + size * x / ARCFACE_SIDE for x in point) for point in ARCFACE))


FRBENCH = "frbench:"
KINDS: Sequence[tuple[Callable[[str], bool], Callable[[str, str], Parts]]] = (  # the first that fits is it
    (lambda member: member == "dlib", _dlib),
    (lambda member: member.startswith(FRBENCH), _frbench),
    (lambda member: member.lower().endswith(".onnx"), _onnx),
    (lambda member: member not in FACENET_URLS and Path(member).is_dir(), _transformers),
    (lambda member: True, _facenet),
)
KINDS_HELP = (
    f"{', '.join(FACENET_URLS)}, a facenet-pytorch state dict, dlib, a local transformers directory, "
    "FILE.onnx with a FILE.json beside it, or frbench:BACKBONE-LOSS-DATA"
)


@functools.cache
def load_recognizer(
    member: str, device: torch.device, dtype: torch.dtype, compile: bool = False, portraits: str = "photos"
) -> Recognizer:
    """Loads a recogniser of one of `KINDS`; cached. Raises UserError.

    portraits: photos or mini; dlib's threshold depends on what it is asked about.
    """
    way = "0.1 GB, pip install face_recognition_models" if member == "dlib" else ""
    if member in FACENET_URLS:
        way = file_way(0.1, FACENET_URLS[member])
    with loading("the face recogniser", member, way):
        load = next(load for fits, load in KINDS if fits(member))
        network, parts = load(member, portraits)
        network = frozen(network, device, dtype)
    if compile:
        compiled(network)
    return Recognizer(name_of(member), network, dtype=dtype, **parts)


def weights_file(member: str) -> Path | None:
    """Finds the weights of `dlib` or of a training of facenet-pytorch on this machine; None: not there."""
    if member == "dlib":
        package = util.find_spec("face_recognition_models")  # not imported, since it wants pkg_resources
        path = Path(package.submodule_search_locations[0]) / DLIB_FILE if package else None
    else:
        import torch

        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(FACENET_URLS[member]).name
    return path if path and path.exists() else None


def recorded_recognizer(member: str, hashed: bool = False) -> str:
    """Names a recogniser for run.json; a folder called like a known training is not that training.

    hashed: a known one with a hash of its weights, too, if they are on this machine.
    """
    if member not in (*FACENET_URLS, "dlib"):
        return recorded(member)
    path = weights_file(member) if hashed else None
    return f"{member} {recorded(str(path)).rpartition(' ')[2]}" if path else member


def name_of(member: str) -> str:
    """Names a recogniser in tables and columns: its file or directory without the path."""
    return Path(member).stem if member.lower().endswith(".onnx") else Path(member.removeprefix(FRBENCH)).name
