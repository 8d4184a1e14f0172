"""What an SVG picture lacks: pores, strands of hair, weave, a wall's grain, and soft shade over all of it.

Each is a field around 0 that is cut out of one table of noise at a place drawn from (identity, variation), so
that a source and its edits show the same one, and is laid on where the drawing's flat copy (Svg.flat) has its
region. Bytes of PCG64 and elementwise arithmetic make the tables: the same pixels on every machine.
"""

from functools import lru_cache

import numpy as np

from drawing.choices import Edit
from drawing.scene import Scene
from drawing.svg import CANVAS

SIDE = 256  # of the tables, which repeat beyond it
TABLE_SEED = 20_250_713
FINE, SMALL, MIDDLE, LARGE, SHADE = range(5)  # the octaves: features of about 1.5, 3, 6, 14 and 40 pixels

STRENGTH = 0.6  # of all texture; at 1 skin looks dirty, and a VAE of 5 channels can't follow it
# How strong the octaves are on each kind of surface, as shares of its brightness
SKIN = (0.012, 0.010, 0.009, 0.014, 0.030)
WALL = (0.004, 0.006, 0.006, 0.012, 0.035)
CLOTH = (0.020, 0.020, 0.018, 0.035, 0.040)
HAIR = (0.030, 0.020, 0.000, 0.020, 0.030)
BUZZ = (0.080, 0.045, 0.020, 0.020, 0.030)
CURLS = (0.040, 0.060, 0.030, 0.030, 0.030)
THING = (0.008, 0.006, 0.006, 0.012, 0.030)  # glasses, jewels, eyes, helmets
PLACES = {
    Edit.SNOW: (0.014, 0.014, 0.014, 0.018, 0.030), Edit.BEACH: (0.024, 0.026, 0.022, 0.022, 0.030),
    Edit.CITY: (0.022, 0.026, 0.024, 0.026, 0.030), Edit.FOREST: (0.038, 0.060, 0.065, 0.050, 0.040),
    Edit.DESERT: (0.024, 0.026, 0.022, 0.022, 0.030), Edit.LIBRARY: (0.028, 0.034, 0.030, 0.026, 0.030),
    Edit.MOON: (0.016, 0.018, 0.024, 0.036, 0.030),
}  # fmt: skip


def raw(seed: tuple[int, ...], count: int) -> np.ndarray:
    """Draws bytes; unlike a Generator's numbers, PCG64's bits are the same in every version of NumPy."""
    bits = np.random.PCG64(np.random.SeedSequence(seed)).random_raw((count + 7) // 8)
    return bits.astype("<u8").view(np.uint8)[:count]


def smooth(field: np.ndarray, axis: int, reach: int = 1) -> np.ndarray:
    """Blurs a field that repeats at its edges: (1, 2, 1) / 4, its taps `reach` apart."""
    return 0.5 * field + 0.25 * (np.roll(field, reach, axis) + np.roll(field, -reach, axis))


def _unit(field: np.ndarray) -> np.ndarray:
    """Scales to mean 0 and deviation 1, in steps of 1/64, which no order of a sum can move."""
    field = field - field.mean(dtype=np.float64)
    return (np.rint(64 * field / field.std(dtype=np.float64)) / 64).astype(np.float32)


@lru_cache(maxsize=1)
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Makes the octaves of noise (5, SIDE, SIDE) and the strands (SIDE across, SIDE along)."""
    white = raw((TABLE_SEED,), SIDE * SIDE).reshape(SIDE, SIDE).astype(np.float32) - 127.5
    field, octaves, reach = white, [], 1
    for repeats in (1, 1, 1, 2, 2):  # each pass doubles the reach, as in the à-trous transform
        finer = field
        for _ in range(repeats):
            for axis in (0, 1):
                field = smooth(field, axis, reach)
            reach *= 2
        octaves.append(_unit(finer - field))
    strands = raw((TABLE_SEED, 1), SIDE * SIDE).reshape(SIDE, SIDE).astype(np.float32) - 127.5
    for reach in (1, 2, 4, 8, 16):
        strands = smooth(strands, 1, reach)
    thin = strands
    for reach in (1, 2):
        thin = smooth(thin, 0, reach)
    locks = thin
    for reach in (4, 8):
        locks = smooth(locks, 0, reach)
    return np.stack(octaves), 0.75 * _unit(thin) + 0.65 * _unit(locks)


@lru_cache
def _surface(strengths: tuple[float, ...]) -> np.ndarray:
    """Adds up the octaves by their strengths -> (SIDE, SIDE)."""
    return sum(np.float32(by) * octave for by, octave in zip(strengths, _tables()[0], strict=True))


class Texture:
    """Holds one picture's place in the tables, and where its pixels are on the head."""

    def __init__(self, scene: Scene, identity: int, variation: int, size: int) -> None:
        self.scene = scene
        self.places = raw((TABLE_SEED, identity, variation), 64).astype(np.int32)
        self.steps = np.arange(size)
        self.across = (np.arange(size, dtype=np.float32) + 0.5) * (CANVAS / size)
        self.unit = size / CANVAS  # pixels of a unit of the canvas

    def cut(self, table: np.ndarray, layer: int) -> np.ndarray:
        """Cuts a (size, size) piece out of a table that repeats; each layer has a place of its own."""
        rows, columns = (self.steps + self.places[2 * layer + k] for k in (0, 1))
        return table.take(rows, 0, mode="wrap").take(columns, 1, mode="wrap")

    def grain(self, strengths: tuple[float, ...], layer: int) -> np.ndarray:
        """Cuts a surface out."""
        return self.cut(_surface(strengths), layer)

    def octave(self, number: int, layer: int) -> np.ndarray:
        """Cuts an octave out."""
        return self.cut(_tables()[0][number], layer)

    def hair(self) -> np.ndarray:
        """Makes hair: strands along its outline, waves, curls or stubble."""
        s, p, v = self.scene, self.scene.id, self.scene.var
        extra = s.style.extra
        if extra == "buzz":
            return self.grain(BUZZ, 1)
        if extra == "curls":
            return self.grain(CURLS, 1) - 0.09 * (np.minimum(np.abs(self.octave(MIDDLE, 1)), 1.6) - 0.8)
        x = (self.across - 128 - v.shift[0])[None, :] / v.scale
        y = (self.across - v.shift[1])[:, None]
        y = 200 + (y - 200) / v.scale  # it turns about the neck by so little that a shear does
        lean = np.float32(np.deg2rad(v.tilt))
        x, y = x - lean * (200 - y), y - lean * x
        centre, height = p.eye_y - 10, p.eye_y - 10 - p.top
        up = np.maximum(centre - y, 0) * np.float32(p.width / height)
        from_middle = np.sqrt(x * x + up * up)
        along = np.sign(x) * (np.abs(x) + np.where(y < centre, from_middle - up, np.abs(x) + y - centre))
        if extra == "waves":
            from_middle = from_middle + 3 * self.octave(LARGE, 1)
        from_middle = from_middle + 1.2 * self.octave(SHADE, 1)
        row = (4 * self.unit * from_middle).astype(np.int32) + self.places[20]
        column = (1.6 * self.unit * along).astype(np.int32) + self.places[21]
        return 0.16 * _tables()[1][row % SIDE, column % SIDE] + self.grain(HAIR, 1)

    def cloth(self) -> np.ndarray:
        """Makes a fabric: the knit's ribs, twill, fleece or a plain weave."""
        kind = "collar" if self.scene.edit == Edit.POLICE else self.scene.var.neckline
        soft = self.grain(CLOTH, 2)
        if kind == "hoodie":
            return 1.6 * soft
        x, y = self.unit * self.across[None, :], self.unit * self.across[:, None]
        slip = 0.9 * self.octave(LARGE, 3)
        turns = {
            "crew": (0.31 * x + 0.04 * y, 0.05), "v": (0.26 * x, 0.075), "turtleneck": (0.24 * x, 0.085),
            "collar": (0.24 * x + 0.24 * y, 0.05), "jacket": (0.21 * x + 0.24 * y, 0.065),
        }  # fmt: skip
        phase, depth = turns[kind]
        return soft + np.float32(depth) * np.sin(2 * np.pi * phase + slip).astype(np.float32)

    def laid_on(self, pixels: np.ndarray, regions: np.ndarray) -> np.ndarray:
        """Lays it on (size, size, 3). regions: (size, size, 4) in [0, 1], skin, hair, cloth, person."""
        skin, hair, cloth, person = np.moveaxis(regions, -1, 0)
        thing = person - skin - hair - cloth
        wall = self.grain(PLACES.get(self.scene.edit, WALL), 0)
        field = (1 - person) * wall + skin * self.grain(SKIN, 4) + thing * self.grain(THING, 4)
        if hair.any():
            field += hair * self.hair()
        if cloth.any():
            field += cloth * self.cloth()
        return pixels + STRENGTH * field[:, :, None] * (
            0.85 * pixels + 30
        )  # 30: dark hair and cloth show some too
