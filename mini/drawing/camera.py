"""What a camera does to a picture: light, noise of the sensor, and JPEG."""

import io

import numpy as np
from PIL import Image

from drawing.colours import rgb
from drawing.people import Variation
from drawing.texture import raw, smooth

NOISE_SEED = 20_250_714


def light(v: Variation, pixels: np.ndarray) -> np.ndarray:
    """Tints a finished picture, (size, size, 3), warm or cold towards the light and darker away from it.

    Done on pixels, where it costs a quarter of what resvg takes for a gradient over the whole picture.
    """
    size = len(pixels)
    down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size
    far = 0.75 * (1 - across if v.light_side > 0 else across) + 0.25 * down  # 0 at the light, 1 away from it
    tint = "#ffb25e" if v.light_warmth > 0 else "#6ea8ff"
    shares = (tint, 0.15 * abs(v.light_warmth) * (1 - far)), ("#1a1030", 0.22 * v.light_strength * far)
    for colour, share in shares:
        pixels = pixels + share[:, :, None] * (np.array(rgb(colour), np.float32) - pixels)
    return pixels


def noise(identity: int, variation: int, pixels: np.ndarray) -> np.ndarray:
    """Adds a sensor's noise, more where it is bright, as photons come: mostly grey, some of it in colour.

    One picture has one noise: an edit shows its source's wherever it leaves the brightness as it was.
    """
    size = len(pixels)
    drawn = raw((NOISE_SEED, identity, variation), 8 + 6 * size * size)
    strength = 0.7 + 1.1 * float(drawn[0]) / 255  # levels, in a middle grey
    pairs = drawn[8:].reshape(6, size, size).astype(np.float32)
    planes = (pairs[:3] + pairs[3:] - 255) / 104  # (3, size, size), of deviation 1
    grey = 0.6 * planes[0] + 0.65 * smooth(smooth(planes[0], 0), 1)
    colour = smooth(smooth(planes, 1), 2)
    field = grey[:, :, None] + 0.9 * np.moveaxis(colour, 0, -1)
    return pixels + np.float32(strength) * np.sqrt(np.clip(pixels, 8, 255) / 128) * field


def jpeg(identity: int, variation: int, pixels: np.ndarray) -> np.ndarray:
    """Saves and reads (size, size, 3) as JPEG of quality 91 to 97, in full colour -> uint8."""
    quality = 91 + int(raw((NOISE_SEED, identity, variation, 1), 1)[0]) % 7
    file = io.BytesIO()
    Image.fromarray(np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)).save(
        file, "JPEG", quality=quality, subsampling=0
    )
    return np.asarray(Image.open(file))
