"""Faces: recognisers, the similarity that the attack and FR share, and the detector."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from models.loading import compiled, frozen, loading, read_state

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels, x1 and y1 outside

# facenet-pytorch's two trainings of InceptionResnetV1 (its release v2.2.9)
FACENET_RELEASE = "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/"
FACENET_URLS = {
    "vggface2": FACENET_RELEASE + "20180402-114759-vggface2.pt",
    "casia-webface": FACENET_RELEASE + "20180408-102900-casia-webface.pt",
}
FACENET_CROP = 160  # px
FACENET_MEAN = [0.5] * 3  # its fixed standardisation (v - 127.5) / 128, for values in [0, 1]
FACENET_STD = [64 / 127.5] * 3
DETECTION_SIDE = 1024  # px; larger photos are reduced to it before MTCNN looks at them


class Look(NamedTuple):
    """One of the detector's looks at a picture."""

    min_face_size: int  # px; it steers the sizes at which MTCNN sees the picture, too
    sepia: bool = False  # whether the picture's colours are exchanged for those of an old photo


# Each look is given the pictures in which those before found no face. In colour alone MTCNN misses most blue
# and green faces, which the paper's edits make, and by its pyramid's steps some of a picture of 128 px.
LOOKS = (Look(32), Look(32, sepia=True), Look(40))
PHOTO_SIDE = 256  # px; faces may be smaller in pictures above it: the first look is facenet-pytorch's own
PHOTO_LOOKS = (Look(20), *LOOKS[1:])
LUMA, SEPIA = (0.299, 0.587, 0.114), (1.12, 0.97, 0.88)  # weights of R, G, B; R, G, B of a grey of 1
DETECTED_AT_ONCE = 32 * PHOTO_SIDE**2  # px, of all the pictures in one batch


# ---------------------------------------------------------------------------------------------------------
# recognisers


@dataclass
class Recognizer:
    """A face recogniser and how its crops are made: box, resize to `size`, (x - mean) / std."""

    name: str
    network: torch.nn.Module  # (N, 3, size, size) -> (N, D), or transformers' output with a `pooler_output`
    size: int  # px
    mean: Tensor  # (1, 3, 1, 1), in [-1, 1]
    std: Tensor
    dtype: torch.dtype
    threshold: float | None = None  # a cosine above it is taken for the same person, at 0.1 % false accepts

    def embed(self, images: Tensor, boxes: Sequence[Sequence[Box]]) -> Tensor:
        """Embeds all boxes of all images, image by image -> unit vectors, float (sum of boxes, D).

        images: (B, 3, H, W) in [-1, 1], boxes in its pixels. Crops are resized with antialias;
        differentiable.
        """
        import torch
        import torch.nn.functional as F

        crops, size = [], (self.size, self.size)
        for image, faces in zip(images, boxes, strict=True):
            for x0, y0, x1, y1 in faces:
                crop = image[None, :, y0:y1, x0:x1]
                if crop.shape[-2:] != size:
                    crop = F.interpolate(crop, size, mode="bilinear", antialias=True, align_corners=False)
                crops.append(crop)
        batch = torch.cat(crops)  # (N, 3, size, size)
        batch = (batch - self.mean.to(batch)) / self.std.to(batch)
        found = self.network(batch.to(self.dtype))
        found = found if isinstance(found, torch.Tensor) else found.pooler_output.flatten(1)
        return F.normalize(found.to(images.dtype), dim=1)


def face_similarity_to(
    recognizer: Recognizer, clean: Tensor, boxes: Sequence[Sequence[Box]]
) -> Callable[[Tensor], Tensor]:
    """Makes a function of images like `clean` (B, 3, H, W): their faces' cosine similarity to its, (B,).

    Every image has at least one box; with several, the mean over them. The clean faces are embedded here,
    once.
    """
    import torch

    with torch.no_grad():
        reference = recognizer.embed(clean, boxes)  # (sum of boxes, D)
    counts = torch.tensor([len(faces) for faces in boxes])
    owner = torch.repeat_interleave(torch.arange(len(boxes)), counts).to(clean.device)

    def face_similarity(images: Tensor) -> Tensor:
        cosines = (recognizer.embed(images, boxes) * reference).sum(dim=1)  # (sum of boxes,)
        sums = torch.zeros(len(boxes), dtype=cosines.dtype, device=cosines.device)
        return sums.index_add(0, owner, cosines) / counts.to(cosines)

    return face_similarity


@functools.cache
def load_recognizer(
    member: str, device: torch.device, dtype: torch.dtype, compile: bool = False
) -> Recognizer:
    """Loads a facenet-pytorch training by name, a state-dict file of one, or a transformers directory.

    The directory's `preprocessor_config.json` says what crops it wants (size: height; image_mean, image_std)
    and may say a `verification_threshold`; its embedding is `pooler_output`. Once a process.
    Raises UserError.
    """
    import torch

    with loading("the face recogniser", member):
        if member not in FACENET_URLS and Path(member).is_dir():
            from transformers import AutoModel

            wanted = json.loads((Path(member) / "preprocessor_config.json").read_text())
            size, mean, std = wanted["size"]["height"], wanted["image_mean"], wanted["image_std"]
            threshold = wanted.get("verification_threshold")
            # transformers keeps the dtype of the file, float16, unless it is told
            network = AutoModel.from_pretrained(
                member, dtype=dtype, local_files_only=True, trust_remote_code=False
            )
        else:
            size, mean, std, threshold = FACENET_CROP, FACENET_MEAN, FACENET_STD, None
            network = _facenet(member)
        network = frozen(network, device, dtype)
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (mean, std))  # of values in [0, 1]
    if compile:
        compiled(network)
    return Recognizer(Path(member).name, network, size, 2 * mean - 1, 2 * std, dtype, threshold)


def _facenet(member: str) -> torch.nn.Module:
    import torch
    from facenet_pytorch import InceptionResnetV1

    if member in FACENET_URLS:
        state = torch.hub.load_state_dict_from_url(
            FACENET_URLS[member], map_location="cpu", weights_only=True
        )
    elif Path(member).is_file():
        state = read_state(Path(member))
    else:
        raise FileNotFoundError(f"neither a file, a directory nor one of {', '.join(FACENET_URLS)}")
    network = InceptionResnetV1(pretrained=None)
    # The classifier over the training identities is not part of the embedding.
    network.load_state_dict({key: value for key, value in state.items() if not key.startswith("logits.")})
    return network


# ---------------------------------------------------------------------------------------------------------
# boxes


class FaceDetector:
    """Finds faces with MTCNN, whose weights come inside facenet-pytorch, in float32.

    Zhang et al. 2016, arXiv 1604.02878; the thresholds and pyramid are facenet-pytorch's own.
    """

    def __init__(self, device: torch.device) -> None:
        from facenet_pytorch import MTCNN

        sizes = {look.min_face_size for look in LOOKS + PHOTO_LOOKS}
        self.mtcnn = {size: MTCNN(keep_all=True, min_face_size=size, device=device) for size in sizes}
        self.device = device

    def __call__(self, pixels: np.ndarray) -> list[Box]:
        """Gives the boxes in an image (H, W, 3) uint8, the largest first, cut to the image; margin 0."""
        return self.find([pixels])[0]

    def find(self, images: Sequence[np.ndarray]) -> list[list[Box]]:
        """Gives the boxes in each of several images of one size, as a call with it alone does, but faster."""
        import numpy as np

        found: list[list[Box]] = [[] for _ in images]
        if not len(images):
            return found
        size = images[0].shape[:2]
        scale = max(1.0, max(size) / DETECTION_SIDE)
        height, width = (round(side / scale) for side in size)
        at_once = max(1, DETECTED_AT_ONCE // (height * width))
        for look in PHOTO_LOOKS if max(size) > PHOTO_SIDE else LOOKS:
            if min(height, width) < look.min_face_size:  # no face fits, and the pyramid would be empty
                continue
            left = [row for row, boxes in enumerate(found) if not boxes]
            for start in range(0, len(left), at_once):
                rows = left[start : start + at_once]
                batch = np.stack([_reduced(images[row], (height, width)) for row in rows])
                for row, boxes in zip(rows, self._look(look, batch), strict=True):
                    inside = [box for one in boxes if (box := clip_box(one * scale, size))]
                    found[row] = sorted(inside, key=_area, reverse=True)
        return found

    def _look(self, look: Look, images: np.ndarray) -> list[np.ndarray]:
        """Looks once at images (B, H, W, 3) uint8 -> the boxes in each, (n, 4)."""
        import numpy as np
        import torch

        images = sepia(images) if look.sepia else images
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            found, _ = self.mtcnn[look.min_face_size].detect(images)
        return [np.zeros((0, 4)) if boxes is None else np.asarray(boxes, np.float64) for boxes in found]


def sepia(images: np.ndarray) -> np.ndarray:
    """Gives images (..., 3) uint8 the colours of an old photo: whatever their hue, skin is brown to MTCNN."""
    import numpy as np

    luma = images.astype(np.float32) @ np.array(LUMA, np.float32)  # (...)
    return np.clip(np.rint(luma[..., None] * np.array(SEPIA, np.float32)), 0, 255).astype(np.uint8)


def _reduced(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Reduces an image (H, W, 3) uint8 to a size (H, W)."""
    import numpy as np
    from PIL import Image

    if pixels.shape[:2] == size:
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size[::-1], Image.Resampling.BILINEAR))


def _area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def clip_box(box: Sequence[float], size: Sequence[int]) -> Box | None:
    """Cuts a box to whole pixels inside an image of size (H, W); None if nothing of it is inside."""
    height, width = size
    x0, y0 = max(0, int(box[0])), max(0, int(box[1]))
    x1, y1 = min(width, int(box[2])), min(height, int(box[3]))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None


def scale_box(box: Box, size: Sequence[int], target: Sequence[int]) -> Box | None:
    """Carries a box of an image of `size` (H, W) to its form of size `target`; None if nothing is left."""
    across, down = target[1] / size[1], target[0] / size[0]
    return clip_box([round(side * by) for side, by in zip(box, (across, down) * 2, strict=True)], target)
