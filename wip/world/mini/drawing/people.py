"""The numbers that make a person (Identity) and one picture of them (Variation), each drawn from its seed."""

import math
from dataclasses import dataclass

import numpy as np

from drawing.choices import (
    BACKGROUND_COLOURS,
    BACKGROUNDS,
    CLOTHES_COLOURS,
    EXPRESSIONS,
    EYE_COLOURS,
    HAIR_COLOURS,
    NECKLINES,
    PATTERNS,
    STYLES,
)

# Changing a salt, or the order of the draws below, changes every person, and trained models fit no more.
IDENTITY_SALT = 20_250_711
VARIATION_SALT = 20_250_712


class Draw:
    """Draws parameters; each takes exactly one number in [0, 1) from the stream, whatever its kind."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def uniform(self, low: float, high: float) -> float:
        """Draws a number from a range."""
        return low + (high - low) * float(self.rng.random())

    def pick(self, options: list, weights: list[float] | None = None):
        """Draws one of the options, by weight."""
        edges = np.cumsum(weights if weights is not None else [1.0] * len(options))
        place = int(np.searchsorted(edges, edges[-1] * self.rng.random(), "right"))
        return options[min(place, len(options) - 1)]


@dataclass(frozen=True)
class Identity:
    """Holds what makes a person that person. Lengths in canvas units; widths are half widths."""

    width: float  # of the skull at the temples
    top: float  # y of the skull's top
    chin: float  # y of the chin
    cheek: float  # width at the cheeks
    jaw: float  # width at the height of the mouth
    chin_width: float
    hairline: float  # y
    skin_tone: float  # in [0, 1], dark to pale
    skin_warmth: float
    eye_y: float
    eye_gap: float  # middle line to the eye's centre
    eye_width: float
    eye_height: float
    eye_tilt: float  # degrees, outer corner up
    eye_colour: str
    lashes: float
    lid: float  # how much of the upper lid shows
    brow_y: float
    brow_width: float
    brow_thick: float
    brow_tilt: float
    brow_arch: float
    brow_shade: float
    nose_y: float  # underside of the nose
    nose_width: float
    nose_bridge: float
    nose_tip: float  # how round and bright the tip is
    mouth_y: float
    mouth_width: float
    lip_upper: float
    lip_lower: float
    lip_bow: float
    lip_red: float
    mouth_curve: float
    ear_height: float
    ear_out: float
    ear_y: float
    blush: float
    freckles: float  # 0 for none, else their strength
    mole: tuple[float, float] | None  # across the cheek in [-1, 1], down the cheek in [0, 1]
    age: float  # strength of the lines in the face
    style: str
    hair: str
    hair_shift: float  # lighter or darker than the named colour
    hair_volume: float
    part: float  # +1 or -1: the side of parting, ponytail and quiff
    beard: str  # "", stubble, chin beard, full beard
    neck: float


def _dark_weights(colours: dict, skin_tone: float) -> list[float]:
    """Weighs the colours, with more on the dark ones the darker the skin is."""
    dark = ("black", "dark brown")
    more = 1 + 6 * (1 - skin_tone) ** 2
    return [weight * more if name in dark else weight for name, (_, weight) in colours.items()]


def identity_of(identity: int) -> Identity:
    """Draws the person's parameters; `identity` is any integer >= 0."""
    d = Draw(IDENTITY_SALT, identity)
    width = d.uniform(52, 68)
    top, chin = d.uniform(32, 42), d.uniform(192, 208)
    cheek, jaw = width * d.uniform(0.90, 1.03), width * d.uniform(0.62, 0.88)
    chin_width, hairline = d.uniform(12, 27), d.uniform(56, 70)
    skin_tone, skin_warmth = d.uniform(0, 1), d.uniform(-1, 1)
    eye_y = d.uniform(114, 126)
    eye_width, eye_gap = d.uniform(12.5, 18.5), d.uniform(0.0, 1.0)
    eye_gap = eye_width + 7.5 + 9 * eye_gap  # wide eyes need room between them
    eye_height, eye_tilt = d.uniform(6, 10.5), d.uniform(-6, 9)
    eye_colour = d.pick(list(EYE_COLOURS), _dark_weights(EYE_COLOURS, skin_tone))
    lashes, lid = d.uniform(0, 1), d.uniform(2.5, 6)
    brow_y = eye_y - d.uniform(18, 28)
    brow_width, brow_thick = min(d.uniform(15, 22), eye_gap - 5), d.uniform(2.2, 7.0)
    brow_tilt, brow_arch, brow_shade = d.uniform(-4, 5), d.uniform(0, 7), d.uniform(0, 1)
    nose_y = eye_y + (chin - eye_y) * d.uniform(0.41, 0.54)
    nose_width, nose_bridge, nose_tip = d.uniform(9, 17), d.uniform(3.5, 7.5), d.uniform(0, 1)
    mouth_y = nose_y + (chin - nose_y) * d.uniform(0.38, 0.49)
    mouth_width = d.uniform(18, 31)
    lip_upper, lip_lower, lip_bow = d.uniform(3.5, 8.5), d.uniform(5, 11.5), d.uniform(0.5, 3)
    lip_red, mouth_curve = d.uniform(0, 1), d.uniform(0, 4)
    ear_height, ear_out, ear_y = d.uniform(14, 22), d.uniform(6, 13), d.uniform(-4, 6)
    blush, freckles = d.uniform(0, 1), max(0.0, d.uniform(-2.2, 1))
    mole_odds, mole_x, mole_y = d.uniform(0, 1), d.uniform(-0.35, 0.35), d.uniform(0, 1)
    mole = (mole_x + math.copysign(0.43, mole_x), mole_y) if mole_odds < 0.22 else None
    age = max(0.0, d.uniform(-1.2, 1))
    style = d.pick(list(STYLES), [s.weight for s in STYLES.values()])
    hair = d.pick(list(HAIR_COLOURS), _dark_weights(HAIR_COLOURS, skin_tone))
    hair_shift, hair_volume, part = d.uniform(-1, 1), d.uniform(0.8, 1.25), d.pick([-1.0, 1.0])
    beard_odds, beard = d.uniform(0, 1), d.pick(["stubble", "chin beard", "full beard"])
    beard = beard if beard_odds < STYLES[style].beard_odds else ""
    neck = d.uniform(27, 38)
    return Identity(
        width, top, chin, cheek, jaw, chin_width, hairline, skin_tone, skin_warmth, eye_y, eye_gap,
        eye_width, eye_height, eye_tilt, eye_colour, lashes, lid, brow_y, brow_width, brow_thick, brow_tilt,
        brow_arch, brow_shade, nose_y, nose_width, nose_bridge, nose_tip, mouth_y, mouth_width, lip_upper,
        lip_lower, lip_bow, lip_red, mouth_curve, ear_height, ear_out, ear_y, blush, freckles, mole, age,
        style, hair, hair_shift, hair_volume, part, beard, neck,
    )  # fmt: skip


@dataclass(frozen=True)
class Variation:
    """Holds what differs between two pictures of one person. Drawn in this order."""

    expression: str
    amount: float  # how strong the expression is
    gaze: tuple[float, float]
    neckline: str
    clothes: str
    pattern: str
    second: str  # colour of the pattern, of what is worn beneath, ...
    background: str
    background_colour: str
    background_side: float  # +1 or -1
    background_shift: float
    light_side: float  # -1: from the left
    light_warmth: float  # -1: cold
    light_strength: float
    shift: tuple[float, float]
    scale: float
    tilt: float  # degrees


def variation_of(identity: int, variation: int) -> Variation:
    """Draws the picture's parameters; independent for every (identity, variation)."""
    d = Draw(VARIATION_SALT, identity, variation)
    expression, amount = d.pick(list(EXPRESSIONS)), d.uniform(0.5, 1)
    gaze = (d.uniform(-1, 1), d.uniform(-1, 1))
    neckline, clothes = d.pick(list(NECKLINES)), d.pick(list(CLOTHES_COLOURS))
    pattern, second = d.pick(list(PATTERNS)), d.pick(list(CLOTHES_COLOURS))
    background, background_colour = d.pick(list(BACKGROUNDS)), d.pick(list(BACKGROUND_COLOURS))
    background_side, background_shift = d.pick([-1.0, 1.0]), d.uniform(-1, 1)
    light_side, light_warmth, light_strength = d.uniform(-1, 1), d.uniform(-1, 1), d.uniform(0.25, 1)
    shift = (d.uniform(-7, 7), d.uniform(-9, -2))
    scale, tilt = d.uniform(0.96, 1.04), d.uniform(-4, 4)
    return Variation(
        expression, amount, gaze, neckline, clothes, pattern, second, background, background_colour,
        background_side, background_shift, light_side, light_warmth, light_strength, shift, scale, tilt,
    )  # fmt: skip
