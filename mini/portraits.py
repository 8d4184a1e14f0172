"""Synthetic portraits: the world that every embedded mini model is trained on and tested in.

A portrait is an SVG picture built from parameters and rendered by resvg. `identity` fixes the person
(geometry, skin, eyes, hair, beard); `variation` fixes what a person can change between two photos
(expression, clothes, background, light, pose); `prompt` applies one of the 25 edits to exactly that
picture. An edit is a function of what the source picture shows, so that an editor network can learn it
from pairs.

Look at eight people, plain, in a second variation and under all 25 edits:

    python mini/portraits.py --sheet portraits.png

Write source pictures into a folder:

    python mini/portraits.py --write data/mini --first 1000000 --count 20

It is a stand-in: nothing measured on it says how well a real photo is protected.
"""

import argparse
import io
import math
import sys
from dataclasses import dataclass, replace
from enum import IntEnum
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image, ImageDraw

# Who may look at which identities. The judge's half is kept apart from everything it judges.
TRAIN = range(0, 100_000)  # the judge alone uses JUDGE, everything else trains on range(0, 50_000)
JUDGE = range(50_000, 100_000)
VALIDATION = range(100_000, 200_000)
TEST_FROM = 1_000_000  # this identity and all above it: tests, demos and final figures only

# Changing a salt, or the order of the draws below, changes every person, and trained models fit no more.
IDENTITY_SALT = 20_250_711
VARIATION_SALT = 20_250_712

USUAL_EARS = (18, 9.5, 1)  # height, how far out, how far down, as in Identity
CANVAS = 256  # the drawing's own units; x is measured from the middle line, y from the top


class Edit(IntEnum):
    """The 25 edits; the value is the prompt's number."""

    PINK_HAIR = 0
    BALD = 1
    TATTOO = 2
    PURPLE_MAKEUP = 3
    MUSTACHE = 4
    ZOMBIE = 5
    BLUE_SKIN = 6
    ELF_EARS = 7
    FANGS = 8
    GOTH = 9
    POLICE = 10
    BOWTIE = 11
    HELMET = 12
    SUNGLASSES = 13
    EARRINGS = 14
    CIGAR = 15
    HEADBAND = 16
    TIARA = 17
    SNOW = 18
    BEACH = 19
    CITY = 20
    FOREST = 21
    DESERT = 22
    LIBRARY = 23
    MOON = 24


Colour = tuple[float, float, float]  # red, green, blue in [0, 255]
Points = list[tuple[float, float]]


def _rgb(code: str) -> Colour:
    return tuple(float(int(code[i : i + 2], 16)) for i in (1, 3, 5))


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{round(min(max(c, 0), 255)):02x}" for c in colour)


def _mix(a: Colour, b: Colour, t: float) -> Colour:
    return tuple((1 - t) * x + t * y for x, y in zip(a, b))


def _brighter(colour: Colour, t: float) -> Colour:
    """Brighter in its own hue, where mixing with white would grey it."""
    t *= 1.1 - _luminance(colour)  # light colours have no room left: they would clip
    return tuple(min(255, c * (1 + t) + 26 * t) for c in colour)


def _luminance(colour: Colour) -> float:
    """In [0, 1]."""
    return (0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]) / 255


BLACK, WHITE = _rgb("#000000"), _rgb("#ffffff")

SKIN_SCALE = [_rgb(c) for c in "#5c3928 #78492f #925d3a #b57f54 #d39f74 #e6b992 #f3cfb3 #f9e0d0".split()]
SKIN_WORDS = ("dark brown", "brown", "tan", "olive", "light", "fair", "pale")

HAIR_COLOURS = {
    "black": ("#26211f", 5),
    "dark brown": ("#453026", 5),
    "brown": ("#6b4630", 5),
    "chestnut": ("#8a4d2c", 3),
    "red": ("#b6491f", 3),
    "ginger": ("#d47a35", 2),
    "dark blond": ("#a98450", 3),
    "blond": ("#dcb968", 4),
    "platinum": ("#ece0bd", 2),
    "grey": ("#8d8b8a", 2),
    "white": ("#dddcd9", 1.5),
    "blue": ("#3a5f9e", 1),
    "green": ("#4c8a63", 1),
    "purple": ("#6d4a94", 1),
}
EYE_COLOURS = {
    "dark brown": ("#43291a", 4),
    "brown": ("#77491f", 4),
    "hazel": ("#94793a", 2),
    "green": ("#4d8a4b", 3),
    "blue": ("#3f78b8", 3),
    "light blue": ("#7fb3d6", 2),
    "grey": ("#7e8c96", 2),
}


@dataclass(frozen=True)
class HairStyle:
    """`top`, `side`: how far the hair stands off the skull. `hairline`: its inner edge. `fall`: its end."""

    words: str
    top: float
    side: float
    hairline: str  # round, widow, receding, side, centre, bangs
    fall: str  # short, bob, long
    extra: str = ""  # curls, waves, quiff, ponytail, bun, pigtails, buzz
    weight: float = 1.0
    beard_odds: float = 0.0  # styles with 0 never come with a beard


STYLES = {
    "buzz": HairStyle("buzz-cut {} hair", 2, 1, "round", "short", "buzz", 1.0, 0.5),
    "short": HairStyle("short {} hair", 9, 5, "round", "short", "", 1.0, 0.5),
    "side part": HairStyle("short side-parted {} hair", 14, 7, "side", "short", "", 1.2, 0.5),
    "quiff": HairStyle("swept-up {} hair", 20, 4, "widow", "short", "quiff", 1.0, 0.5),
    "receding": HairStyle("receding {} hair", 6, 5, "receding", "short", "", 0.8, 0.5),
    "pixie": HairStyle("short {} hair with bangs", 12, 7, "bangs", "short", "", 0.8, 0.15),
    "bob bangs": HairStyle("a {} bob with bangs", 13, 12, "bangs", "bob"),
    "bob": HairStyle("a parted {} bob", 13, 13, "centre", "bob"),
    "long": HairStyle("long straight {} hair", 11, 10, "centre", "long"),
    "long side": HairStyle("long wavy {} hair", 14, 13, "side", "long", "waves", 1.2),
    "long bangs": HairStyle("long {} hair with bangs", 12, 10, "bangs", "long", "", 0.8),
    "curly": HairStyle("short curly {} hair", 13, 9, "round", "short", "curls", 1.2, 0.4),
    "long curly": HairStyle("long curly {} hair", 14, 14, "round", "long", "curls", 1.0),
    "afro": HairStyle("a {} afro", 20, 24, "round", "short", "curls", 0.9, 0.3),
    "ponytail": HairStyle("a {} ponytail", 7, 4, "round", "short", "ponytail", 1.0),
    "bun": HairStyle("a {} bun", 6, 4, "widow", "short", "bun", 1.0, 0.1),
    "pigtails": HairStyle("{} pigtails", 8, 5, "centre", "short", "pigtails", 0.8),
    "bald": HairStyle("a bald head", 0, 0, "", "", "", 0.6, 0.5),
}

CLOTHES_COLOURS = {
    "red": "#b23a3f", "orange": "#d3783a", "yellow": "#dbb650", "green": "#4d8357", "olive": "#7b7a48",
    "teal": "#357f83", "blue": "#3f69a6", "navy": "#2f3d5e", "purple": "#76559a", "rose": "#c98291",
    "brown": "#7d5b45", "beige": "#cdb796", "white": "#e6e4df", "grey": "#85888d", "black": "#34343a",
}  # fmt: skip
NECKLINES = {
    "crew": "T-shirt", "v": "V-neck sweater", "collar": "shirt", "turtleneck": "turtleneck",
    "hoodie": "hoodie", "jacket": "jacket",
}  # fmt: skip
PATTERNS = ("plain", "plain", "striped", "dotted", "two-tone")
BACKGROUND_COLOURS = {
    "grey": "#b3b5b8", "beige": "#d5c7b0", "light blue": "#a9c3d6", "sage green": "#a9bda2",
    "peach": "#e2bfa4",
    "lavender": "#b9b1d0", "teal": "#7ea9ab", "brown": "#a58d78", "slate": "#74808f", "mustard": "#cdb277",
    "rose": "#cfa5a8", "cream": "#e8e0cf",
}  # fmt: skip
BACKGROUNDS = {
    "plain": "a plain {} wall", "glow": "a softly lit {} backdrop", "panel": "a {} wall with a panel",
    "window": "a {} room with a window", "picture": "a {} room with a picture", "curtain": "a {} curtain",
    "lights": "blurred lights on {}", "diagonal": "a two-tone {} backdrop",
}  # fmt: skip
EXPRESSIONS = ("neutral", "smiling", "smiling broadly", "open-mouthed", "surprised", "serious")


# Parameters ---------------------------------------------------------------------------------------


class _Draw:
    """Every parameter takes exactly one number in [0, 1) from the stream, whatever its kind."""

    def __init__(self, *seed: int):
        self.rng = np.random.default_rng(seed)

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * float(self.rng.random())

    def pick(self, options: list, weights: list[float] | None = None):
        """One of the options, by weight."""
        edges = np.cumsum(weights if weights is not None else [1.0] * len(options))
        place = int(np.searchsorted(edges, edges[-1] * self.rng.random(), "right"))
        return options[min(place, len(options) - 1)]


@dataclass(frozen=True)
class Identity:
    """What makes a person that person. Lengths in canvas units; widths are half widths."""

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
    """The colours' weights, with more on the dark ones the darker the skin is."""
    dark = ("black", "dark brown")
    more = 1 + 6 * (1 - skin_tone) ** 2
    return [weight * more if name in dark else weight for name, (_, weight) in colours.items()]


def identity_of(identity: int) -> Identity:
    """The person's parameters; `identity` is any integer >= 0."""
    d = _Draw(IDENTITY_SALT, identity)
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
    """What differs between two pictures of one person. Drawn in this order."""

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
    """The picture's parameters; independent for every (identity, variation)."""
    d = _Draw(VARIATION_SALT, identity, variation)
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


# Drawing tools ------------------------------------------------------------------------------------


def _curve(points: Points, closed: bool = False) -> str:
    """SVG path data of a Catmull-Rom spline through the points."""
    p = [points[-1], *points, points[0], points[1]] if closed else [points[0], *points, points[-1]]
    data = f"{p[1][0]:.1f} {p[1][1]:.1f}"
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in zip(p, p[1:], p[2:], p[3:]):
        data += (
            f"C{x1 + (x2 - x0) / 6:.1f} {y1 + (y2 - y0) / 6:.1f}"
            f" {x2 - (x3 - x1) / 6:.1f} {y2 - (y3 - y1) / 6:.1f} {x2:.1f} {y2:.1f}"
        )
    return f"M{data}Z" if closed else data


def _between(first: Points, second: Points) -> str:
    """Path data of the area between two splines that both run from left to right; the corners stay sharp."""
    return f"M{_curve(first)}L{_curve(second[::-1])}Z"


def _mirror(points: Points) -> Points:
    """The points, which run from the left to the middle line, and on to the right as their mirror image."""
    tail = points[:-1] if points[-1][0] == 0 else points
    return points + [(-x, y) for x, y in tail[::-1]]


class _Svg:
    """Collects the picture's elements and the gradients that they use."""

    def __init__(self):
        self.defs: list[str] = []
        self.body: list[str] = []

    def _define(self, element: str, attributes: str, content: str) -> str:
        name = f"d{len(self.defs)}"
        self.defs.append(f'<{element} id="{name}" {attributes}>{content}</{element}>')
        return f"url(#{name})"

    def linear(self, x1: float, y1: float, x2: float, y2: float, *stops: tuple) -> str:
        """A gradient in canvas units; a stop is (offset, colour) or (offset, colour, opacity)."""
        where = f'gradientUnits="userSpaceOnUse" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return self._define("linearGradient", where, _stops(stops))

    def radial(self, cx: float, cy: float, r: float, *stops: tuple) -> str:
        where = f'gradientUnits="userSpaceOnUse" cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}"'
        return self._define("radialGradient", where, _stops(stops))

    def clip(self, path: str) -> str:
        return self._define("clipPath", "", f'<path d="{path}"/>')

    def path(self, data: str, fill: Colour | str, opacity: float = 1.0) -> None:
        fill = fill if isinstance(fill, str) else _hex(fill)
        self.body.append(f'<path d="{data}" fill="{fill}" fill-opacity="{opacity:.2f}"/>')

    def stroke(self, points: Points, colour: Colour, width: float, opacity: float = 1.0) -> None:
        self.body.append(
            f'<path d="M{_curve(points)}" fill="none" stroke="{_hex(colour)}" stroke-width="{width:.1f}" '
            f'stroke-opacity="{opacity:.2f}" stroke-linecap="round"/>'
        )

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: Colour | str,
                opacity: float = 1.0) -> None:
        fill = fill if isinstance(fill, str) else _hex(fill)
        self.body.append(
            f'<ellipse cx="{cx:.1f}" cy="{cy:.1f}" rx="{rx:.1f}" ry="{ry:.1f}" fill="{fill}" '
            f'fill-opacity="{opacity:.2f}"/>'
        )

    def rect(self, x: float, y: float, width: float, height: float, fill: Colour | str,
             opacity: float = 1) -> None:
        fill = fill if isinstance(fill, str) else _hex(fill)
        self.body.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}" '
            f'fill-opacity="{opacity:.2f}"/>'
        )

    def glow(self, cx: float, cy: float, rx: float, ry: float, colour: Colour, opacity: float) -> None:
        """A soft spot, clear at the rim: what a blur would do, at a gradient's price."""
        fill = self._define("radialGradient", "", _stops(((0, colour, opacity), (1, colour, 0))))
        self.ellipse(cx, cy, rx, ry, fill)

    def open(self, transform: str = "", clip: str = "") -> None:
        clip = f' clip-path="{clip}"' if clip else ""
        self.body.append(f'<g transform="{transform}"{clip}>')

    def close(self) -> None:
        self.body.append("</g>")

    def text(self) -> str:
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CANVAS} {CANVAS}">'
            f"<defs>{''.join(self.defs)}</defs>{''.join(self.body)}</svg>"
        )


def _stops(stops: tuple) -> str:
    text = ""
    for offset, colour, *rest in stops:
        opacity = rest[0] if rest else 1
        text += f'<stop offset="{offset}" stop-color="{_hex(colour)}" stop-opacity="{opacity:.3f}"/>'
    return text


class _Scene:
    """One picture: its parameters, the colours that follow from them, and the drawing so far."""

    def __init__(self, identity: int, variation: int, edit: Edit | None):
        self.svg = _Svg()
        self.id = p = identity_of(identity)
        self.var = variation_of(identity, variation)
        self.edit = edit
        self.style = STYLES[p.style]
        self.ears = (p.ear_height, p.ear_out, p.ear_y)
        if edit in (Edit.BALD, Edit.EARRINGS) and self.style.fall in ("bob", "long"):
            self.ears = USUAL_EARS  # the source's hair hides them, so an edit can't know them
        if edit == Edit.BALD or (edit == Edit.HELMET and self.style.fall == "short"):
            self.style = STYLES["bald"]  # a helmet hides short hair wholly
        elif edit == Edit.HELMET and p.style != "bald":
            self.style = replace(self.style, top=2, side=7)
        elif edit == Edit.PINK_HAIR and p.style == "bald":
            self.style = STYLES["buzz"]  # there must be something to turn pink
            self.id = p = replace(p, hair_volume=1.0)  # what a bald head doesn't show
        hair = _rgb(HAIR_COLOURS[p.hair][0])
        self.hair = _mix(hair, WHITE if p.hair_shift > 0 else BLACK, 0.14 * abs(p.hair_shift))
        self.brow = _mix(_mix(self.hair, _rgb("#3a2a20"), 0.35), BLACK, 0.25 * p.brow_shade)
        self.beard = _mix(_mix(self.hair, _rgb("#3a2a20"), 0.30), BLACK, 0.10)
        if edit == Edit.PINK_HAIR:
            self.hair = _mix(_rgb("#d6307f"), _rgb("#ff9ecb"), _luminance(self.hair))
        self.skin = _edited_skin(_skin(p), edit)
        self.skin_dark = _mix(_mix(self.skin, _rgb("#5a1c1c"), 0.30), BLACK, 0.20)
        self.skin_light = _mix(self.skin, _rgb("#fff0dd"), 0.30)
        self.lips = _lip_colour(p, self.skin, edit)
        self.light = 24 * self.var.light_side  # x of the face's brightest place


def _skin(p: Identity) -> Colour:
    place = p.skin_tone * (len(SKIN_SCALE) - 1)
    low = min(int(place), len(SKIN_SCALE) - 2)
    skin = _mix(SKIN_SCALE[low], SKIN_SCALE[low + 1], place - low)
    return tuple(c + p.skin_warmth * w for c, w in zip(skin, (5, -1, -8)))


def _edited_skin(skin: Colour, edit: Edit | None) -> Colour:
    """The edits that recolour the skin keep some of its lightness, so that the person stays recognisable."""
    light = _luminance(skin)
    if edit == Edit.ZOMBIE:
        return _mix(_rgb("#536748"), _rgb("#a9bd92"), light)
    if edit == Edit.BLUE_SKIN:
        return _mix(_rgb("#1d4a94"), _rgb("#6db4ee"), light)
    if edit == Edit.GOTH:
        return _mix(skin, _rgb("#ece9ee"), 0.62)
    return skin


def _lip_colour(p: Identity, skin: Colour, edit: Edit | None) -> Colour:
    fixed = {Edit.GOTH: "#1d1220", Edit.PURPLE_MAKEUP: "#8a24a8", Edit.ZOMBIE: "#5b4a55"}
    if edit in fixed:
        return _rgb(fixed[edit])
    return _mix(_mix(skin, _rgb("#a83a42"), 0.40 + 0.38 * p.lip_red), BLACK, 0.06)


# Background ---------------------------------------------------------------------------------------


def _background(s: _Scene) -> None:
    scenes = {
        Edit.SNOW: _snow_scene, Edit.BEACH: _beach, Edit.CITY: _city, Edit.FOREST: _forest,
        Edit.DESERT: _desert, Edit.LIBRARY: _library, Edit.MOON: _night,
    }  # fmt: skip
    if s.edit in scenes:
        scenes[s.edit](s.svg)
    else:
        _room(s)


def _room(s: _Scene) -> None:
    svg, v = s.svg, s.var
    base = _rgb(BACKGROUND_COLOURS[v.background_colour])
    light, dark = _mix(base, WHITE, 0.28), _mix(base, _rgb("#2c2a33"), 0.30)
    side, shift = v.background_side, v.background_shift
    x = 128 + 84 * side + 8 * shift  # where a thing on the wall is seen beside the head
    svg.rect(0, 0, 256, 256,
             svg.linear(128 - 128 * v.light_side, 0, 128 + 128 * v.light_side, 256, (0, dark), (0.55, base),
                        (1, light)))
    if v.background == "glow":
        svg.glow(128 + 40 * shift, 110, 170, 150, _mix(base, WHITE, 0.7), 0.8)
    elif v.background == "panel":
        svg.rect(0, 168 + 20 * shift, 256, 100, _mix(base, BLACK, 0.25), 0.8)
        svg.rect(0, 164 + 20 * shift, 256, 6, light)
    elif v.background == "window":
        svg.rect(x - 42, 22, 84, 128, _mix(base, WHITE, 0.75))
        svg.rect(x - 36, 28, 72, 116, svg.linear(0, 28, 0, 144, (0, _rgb("#a8cdea")), (1, _rgb("#e9f1ee"))))
        svg.rect(x - 3, 28, 6, 116, _mix(base, WHITE, 0.75))
        svg.rect(x - 36, 82, 72, 6, _mix(base, WHITE, 0.75))
    elif v.background == "picture":
        svg.rect(x - 34, 34 + 8 * shift, 68, 80, _mix(base, _rgb("#4a3524"), 0.75))
        svg.rect(x - 27, 41 + 8 * shift, 54, 66, _mix(light, WHITE, 0.4))
        svg.ellipse(x, 74 + 8 * shift, 17, 20, _mix(base, _rgb("#c8674e"), 0.5))
    elif v.background == "curtain":
        for k in range(7):
            fold = 20 + 40 * k + 12 * shift
            svg.rect(fold - 20, 0, 40, 256,
                     svg.linear(fold - 20, 0, fold + 20, 0, (0, dark, 0.75), (0.5, light, 0.5),
                                (1, dark, 0.75)))
    elif v.background == "lights":
        svg.rect(0, 0, 256, 256, _mix(base, _rgb("#1d2230"), 0.6), 0.8)
        for k in range(9):
            spot = _mix(base, _rgb(("#ffd9a0", "#ffb98a", "#cfe3ff")[k % 3]), 0.7)
            svg.ellipse((37 * k * k + 31 * k + 40 * shift) % 256, (53 * k + 20) % 190, 13 + 3 * (k % 4),
                        13 + 3 * (k % 4), spot, 0.38)
    elif v.background == "diagonal":
        edge = 128 + 50 * shift
        svg.path(f"M{edge + 70 * side} 0L{edge - 70 * side} 256H{128 + 128 * side}V0Z", dark, 0.6)


def _sky(svg: _Svg, *stops: tuple) -> None:
    svg.rect(0, 0, 256, 256, svg.linear(0, 0, 0, 256, *((o, _rgb(c)) for o, c in stops)))


def _snow_scene(svg: _Svg) -> None:
    _sky(svg, (0, "#8fa6bd"), (0.6, "#c9d6e2"), (1, "#e6edf3"))
    for x, y, height in ((14, 176, 92), (52, 168, 60), (212, 170, 72), (246, 178, 100)):
        for k in range(3):
            half, low = height * (0.20 + 0.07 * k), y - height * (0.60 - 0.28 * k)
            svg.path(f"M{x} {low - height * 0.42}L{x - half} {low}L{x + half} {low}Z", _rgb("#5f7d86"), 0.75)
            svg.path(f"M{x} {low - height * 0.42}L{x - half * 0.6} {low - height * 0.15}L{x + half * 0.6} "
                     f"{low - height * 0.15}Z", _rgb("#f2f6fa"), 0.9)
    svg.path(f"M{_curve([(-10, 172), (50, 160), (128, 176), (200, 162), (266, 174)])}V260H-10Z",
             _rgb("#f3f7fb"))


def _snowfall(svg: _Svg) -> None:
    """Flakes at fixed places in front of everything; a low-discrepancy sequence spreads them evenly."""
    for k in range(1, 49):
        x, y, r = 256 * ((0.7549 * k) % 1), 256 * ((0.5698 * k) % 1), 2.6 + 2.6 * ((0.618 * k) % 1)
        svg.glow(x, y, 1.9 * r, 1.9 * r, WHITE, 0.9)
        svg.ellipse(x, y, 0.8 * r, 0.8 * r, WHITE, 0.9)


def _beach(svg: _Svg) -> None:
    _sky(svg, (0, "#4ea3dd"), (0.5, "#bfe3f2"), (1, "#e3f2f5"))
    svg.glow(40, 42, 46, 46, _rgb("#fff3b5"), 0.9)
    svg.ellipse(40, 42, 18, 18, _rgb("#fff1a8"))
    svg.rect(0, 128, 256, 62, svg.linear(0, 128, 0, 190, (0, _rgb("#1f7fb4")), (1, _rgb("#5cc3c7"))))
    svg.path(f"M{_curve([(-5, 184), (40, 178), (90, 186), (170, 178), (220, 186), (262, 180)])}V260H-5Z",
             WHITE, 0.8)
    svg.path(f"M{_curve([(-5, 192), (40, 186), (90, 194), (170, 186), (220, 194), (262, 188)])}V260H-5Z",
             svg.linear(0, 186, 0, 256, (0, _rgb("#ecd59c")), (1, _rgb("#d3b375"))))
    svg.stroke([(240, 196), (234, 130), (222, 70)], _rgb("#7d5b3c"), 9)
    for x, y in ((176, 62), (184, 36), (222, 26), (256, 44), (262, 76)):
        mid = ((x + 222) / 2, min(y, 68) - 8)
        svg.path(_between([(222, 68), (mid[0], mid[1] - 6), (x, y)],
                          [(222, 76), (mid[0], mid[1] + 8), (x, y)]), _rgb("#2f7d49"))


def _city(svg: _Svg) -> None:
    _sky(svg, (0, "#4c5f95"), (0.45, "#d78f86"), (0.75, "#f4c58d"), (1, "#f6d9a8"))
    for x, width, y in ((0, 40, 96), (34, 26, 62), (70, 40, 110), (150, 36, 104), (196, 26, 70),
                        (226, 34, 88)):
        svg.rect(x, y, width, 200, _rgb("#8b7d9b"))
    for x, width, y in ((-4, 30, 132), (22, 32, 104), (56, 26, 142), (176, 28, 134), (206, 24, 98),
                        (232, 30, 126)):
        svg.rect(x, y, width, 160, svg.linear(0, y, 0, 256, (0, _rgb("#3b3f60")), (1, _rgb("#5a5270"))))
        for row in range(3):
            for column in (0.22, 0.62):
                svg.rect(x + column * width, y + 12 + 24 * row, 7, 10, _rgb("#ffdd8a"), 0.85)


def _forest(svg: _Svg) -> None:
    _sky(svg, (0, "#a9cf9a"), (0.5, "#6f9f68"), (1, "#3c6440"))
    svg.glow(128, 40, 130, 100, _rgb("#f2f5c8"), 0.7)
    for x, width in ((12, 15), (52, 10), (84, 8), (176, 8), (206, 11), (244, 16)):
        svg.rect(x - width / 2, 20, width, 236,
                 svg.linear(x - width / 2, 0, x + width / 2, 0, (0, _rgb("#6a4f38")), (1, _rgb("#3f2e23"))))
    for x, y, r in ((4, 18, 44), (58, 6, 38), (112, -8, 40), (170, 0, 40), (222, 10, 44), (262, 34, 36),
                    (-6, 70, 26)):
        svg.glow(x, y, 1.25 * r, 1.1 * r, _rgb("#2f6a3a"), 1)
        svg.ellipse(x, y, r, 0.8 * r, _rgb("#3d7d45"), 0.85)
    for x, y, r in ((8, 218, 40), (66, 230, 36), (196, 228, 38), (250, 214, 42)):
        svg.ellipse(x, y, r, 0.8 * r,
                    svg.radial(x, y - r / 2, 1.4 * r, (0, _rgb("#4f9150")), (1, _rgb("#234a2c"))))


def _desert(svg: _Svg) -> None:
    _sky(svg, (0, "#5fa7cf"), (0.4, "#f5d9a4"), (0.7, "#f2b46c"), (1, "#e09a4e"))
    svg.ellipse(208, 46, 22, 22, _rgb("#fff2c4"))
    far = [(-10, 150), (40, 128), (100, 150), (180, 124), (266, 148)]
    near = [(-10, 176), (50, 190), (128, 168), (210, 184), (266, 164)]
    svg.path(f"M{_curve(far)}V260H-10Z",
             svg.linear(0, 120, 0, 220, (0, _rgb("#dd9a55")), (1, _rgb("#c47a3e"))))
    svg.path(f"M{_curve(near)}V260H-10Z",
             svg.linear(0, 165, 0, 256, (0, _rgb("#f0bd75")), (1, _rgb("#cf8d49"))))
    cactus = svg.linear(18, 0, 48, 0, (0, _rgb("#5e9a5a")), (1, _rgb("#2f6a3f")))
    for x, y, width, height in ((24, 84, 18, 116), (2, 112, 12, 38), (8, 138, 24, 12), (48, 98, 12, 40),
                                (36, 126, 22, 12)):
        svg.body.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{cactus}"/>')


def _library(svg: _Svg) -> None:
    svg.rect(0, 0, 256, 256, _rgb("#4a3020"))
    books = ("#8c3b34", "#3f5f7d", "#b08a45", "#4f6b4a", "#6d4a6b", "#a5623c", "#36505a")
    for row in range(4):
        low = 58 + 62 * row
        svg.rect(0, low - 54, 256, 54, _rgb("#33211a"))
        for k in range(14):
            x, height = 19 * k - 6 + 7 * (row % 2), 36 + 4 * ((3 * k + 5 * row) % 4)
            colour = _rgb(books[(2 * k + 3 * row) % len(books)])
            svg.rect(x, low - height, 17, height,
                     svg.linear(x, 0, x + 17, 0, (0, _mix(colour, WHITE, 0.18)),
                                (1, _mix(colour, BLACK, 0.25))))
        svg.rect(0, low, 256, 8, svg.linear(0, low, 0, low + 8, (0, _rgb("#a2754a")), (1, _rgb("#6d4a2c"))))


def _night(svg: _Svg) -> None:
    _sky(svg, (0, "#0e1638"), (0.6, "#27356b"), (1, "#46508a"))
    for x, y in ((20, 30), (48, 84), (30, 140), (76, 20), (14, 190), (240, 120), (226, 168), (150, 10),
                 (110, 8)):
        svg.glow(x, y, 6, 6, _rgb("#f2f2ff"), 1)
    svg.glow(212, 50, 66, 66, _rgb("#dfe6ff"), 0.55)
    svg.ellipse(212, 50, 34, 34, svg.radial(204, 42, 44, (0, _rgb("#fffdf0")), (1, _rgb("#dcd9c0"))))
    for x, y, r in ((202, 42, 7), (222, 60, 9), (224, 38, 4)):
        svg.ellipse(x, y, r, r, _rgb("#c4c1ab"), 0.6)


# Body ---------------------------------------------------------------------------------------------


def _neck(s: _Scene) -> None:
    svg, p = s.svg, s.id
    n, low = p.neck, 226
    neck = _mirror([(-n, 150), (-n, 196), (-n - 6, low - 6), (-n - 30, low + 8), (-n - 34, 286), (0, 286)])
    shape = _curve(neck, closed=True)
    lit = 0.5 + 0.3 * s.var.light_side
    svg.path(shape, svg.linear(-n, 0, n, 0, (0, s.skin_dark), (lit, s.skin), (1, s.skin_dark)))
    svg.path(shape, svg.linear(0, p.chin - 6, 0, p.chin + 26, (0, s.skin_dark, 0.95), (1, s.skin_dark, 0)))
    for side in (-1, 1):  # collar bones
        svg.stroke([(6 * side, low + 12), (24 * side, low + 7), (50 * side, low + 8)], s.skin_dark, 3, 0.35)


def _clothes(s: _Scene) -> None:
    """The shirt: its outline with the neckline cut out, pattern, folds, and what belongs to the neckline."""
    svg, v = s.svg, s.var
    police = s.edit == Edit.POLICE
    colour = _rgb("#25355c") if police else _rgb(CLOTHES_COLOURS[v.clothes])
    second = _rgb(CLOTHES_COLOURS[v.second])
    neckline = "collar" if police else v.neckline
    n = s.id.neck + 3
    dip = {"crew": 234, "v": 258, "collar": 240, "turtleneck": 226, "hoodie": 236, "jacket": 280}[neckline]
    shoulder = [(-114, 286), (-106, 244), (-84, 232), (-n - 16, 223), (-n, 215)]
    sharp = [(-n * 0.5, (215 + dip) / 2 + 2), (0, dip)]
    round_ = [(-n * 0.72, dip - 6), (0, dip)]
    outline = _mirror(shoulder + (sharp if neckline in ("v", "collar", "jacket") else round_))
    body = f"M{_curve(outline)}Z"
    if neckline == "jacket":
        svg.path(f"M{_curve(_mirror([(-60, 286), (-n, 218), (-n * 0.7, 228), (0, 234)]))}Z",
                 _mix(second, WHITE, 0.25))
    light, dark = _mix(colour, WHITE, 0.18), _mix(colour, BLACK, 0.38)
    lit = 0.5 + 0.3 * v.light_side
    svg.path(body, svg.linear(-110, 0, 110, 0, (0, dark), (lit, light), (1, dark)))
    if not police and v.pattern != "plain":
        _pattern(s, body, _mix(colour, second if second != colour else WHITE, 0.55))
    for side in (-1, 1):  # folds, and the shadow of the head
        svg.stroke([(73 * side, 270), (67 * side, 252), (54 * side, 240)], dark, 7, 0.22)
    svg.glow(0, 216, s.id.neck + 8, 22, BLACK, 0.35)
    _neckline(s, neckline, colour, second, n, dip)
    if police:
        _police_details(svg)


def _pattern(s: _Scene, body: str, colour: Colour) -> None:
    svg = s.svg
    svg.open(clip=svg.clip(body))
    if s.var.pattern == "striped":
        for y in (226, 243, 260):
            svg.rect(-120, y, 240, 7, colour, 0.7)
    elif s.var.pattern == "dotted":
        for k in range(36):
            svg.ellipse(-104 + 26 * (k % 9) + 13 * (k // 9 % 2), 226 + 13 * (k // 9), 4.2, 4.2, colour, 0.75)
    else:
        svg.rect(-120, 244, 240, 44, colour, 0.9)
    svg.close()


def _neckline(s: _Scene, neckline: str, colour: Colour, second: Colour, n: float, dip: float) -> None:
    svg = s.svg
    light, dark = _mix(colour, WHITE, 0.22), _mix(colour, BLACK, 0.30)
    if neckline in ("crew", "v"):
        middle = [(-n * 0.5, (215 + dip) / 2 + 2)] if neckline == "v" else [(-n * 0.72, dip - 6)]
        svg.stroke(_mirror([(-n, 215), *middle, (0, dip)]), dark, 5, 0.85)
    elif neckline == "turtleneck":
        top = _mirror([(-n + 1, 206), (-n * 0.5, 212), (0, 214)])
        svg.path(_between(top, _mirror([(-n - 5, 226), (-n * 0.5, 234), (0, 236)])),
                 svg.linear(-n, 0, n, 0, (0, dark), (0.5, light), (1, dark)))
        svg.stroke(_mirror([(-n - 5, 226), (-n * 0.5, 234), (0, 236)]), dark, 3, 0.6)
    elif neckline == "hoodie":
        hood = _mirror([(-n - 3, 208), (-n * 0.75, 226), (0, 237)])
        low = _mirror([(-n - 26, 226), (-n * 0.7, 246), (0, 254)])
        svg.path(_between(hood, low), svg.linear(0, 208, 0, 256, (0, dark), (1, light)))
        for side in (-1, 1):
            svg.stroke([(13 * side, 248), (14 * side, 276)], _mix(light, WHITE, 0.6), 4)
    else:
        if neckline == "collar":
            wing = [(-n - 2, 208), (-n * 0.45, 228), (0, dip)]
            out = [(-n - 14, 222), (-n * 0.7, 248), (0, dip)]
        else:  # a jacket's lapels
            wing, out = [(-n - 2, 210), (-12, 286)], [(-n - 26, 226), (-25, 286)]
        for side in (-1, 1):
            path = _between([(side * -x, y) for x, y in wing], [(side * -x, y) for x, y in out])
            svg.path(path, light if side * s.var.light_side > 0 else _mix(light, dark, 0.45))
            svg.stroke([(side * -x, y) for x, y in out], dark, 2.5, 0.6)


def _police_details(svg: _Svg) -> None:
    gold, dark = _rgb("#f0c548"), _rgb("#10182c")
    svg.path("M-9 233L9 233L6 243L13 286L-13 286L-6 243Z", dark)
    for side in (-1, 1):
        svg.path(f"M{62 * side} 224L{100 * side} 233L{97 * side} 243L{60 * side} 234Z", gold)
        svg.path(f"M{67 * side} 227.5L{96 * side} 235L{95 * side} 240L{66 * side} 233Z", dark)
    svg.path("M50 229L57 234L65 232L66 244Q63 254 50 260Q37 254 34 244L35 232L43 234Z",
             svg.linear(34, 230, 66, 260, (0, _rgb("#fff0a8")), (1, _rgb("#c8922a"))))
    svg.ellipse(50, 243, 6, 6, _rgb("#7d5a14"))


def _bowtie(s: _Scene) -> None:
    svg = s.svg
    red, dark = _rgb("#d42a3c"), _rgb("#8c1322")
    for side in (-1, 1):
        wing = [(4 * side, 222), (20 * side, 213), (40 * side, 209), (43 * side, 227), (40 * side, 245),
                (20 * side, 240), (4 * side, 232)]
        svg.path(_curve(wing, closed=True), svg.linear(0, 0, 44 * side, 0, (0, dark), (0.6, red), (1, red)))
        svg.stroke([(9 * side, 226), (26 * side, 222)], dark, 3, 0.6)
    svg.ellipse(0, 227, 9, 11, svg.radial(-2, 223, 14, (0, _rgb("#f0596a")), (1, dark)))


# Head ---------------------------------------------------------------------------------------------


def _dome(p: Identity, top: float, side: float, count: int = 9) -> Points:
    """The skull's outline from the left temple over the top to the right one, pushed out by top and side.

    A superellipse: fuller than an ellipse, as heads are.
    """
    y, points = p.eye_y - 10, []
    for k in range(count):
        across, up = math.cos(math.pi * k / (count - 1)), math.sin(math.pi * k / (count - 1))
        across, up = math.copysign(abs(across) ** 0.88, across), up**0.88
        points.append((-(p.width + side) * across, y - (y - p.top + top) * up))
    return points


def _head_outline(p: Identity) -> str:
    right = [(p.cheek, p.nose_y - 8), (p.jaw, p.mouth_y + 4), (p.chin_width, p.chin - 3)]
    return _curve([*_dome(p, 0, 0), *right, (0, p.chin), *[(-x, y) for x, y in right[::-1]]], closed=True)


def _head(s: _Scene) -> None:
    """Skin of the face: base, side shading by the light, warm cheeks, bright forehead and chin."""
    svg, p, v = s.svg, s.id, s.var
    outline = _head_outline(p)
    svg.path(outline, svg.radial(s.light, p.eye_y + 8, 104, (0, s.skin_light), (0.5, s.skin),
                                 (1, s.skin_dark)))
    away = -p.width if v.light_side > 0 else p.width
    amount = (0.35 + 0.40 * abs(v.light_side)) * v.light_strength
    svg.path(outline, svg.linear(-0.2 * away, p.eye_y - 20, 0.9 * away, p.chin + 4, (0, s.skin_dark, 0),
                                 (1, s.skin_dark, 0.25 + amount)))
    blush = _mix(s.skin, _rgb("#d2483f"), 0.20 + 0.40 * _luminance(s.skin))
    if s.edit in (Edit.ZOMBIE, Edit.GOTH, Edit.BLUE_SKIN):
        blush = s.skin_dark
    cheek_y = (p.eye_y + p.nose_y) / 2 + 12
    for side in (-1, 1):
        svg.glow(side * p.cheek * 0.62, cheek_y, 22, 17, blush, 0.20 + 0.35 * p.blush)
        if s.edit == Edit.PURPLE_MAKEUP:
            svg.glow(side * p.cheek * 0.66, cheek_y - 2, 26, 17, _rgb("#b14fd0"), 0.6)
    svg.glow(0.6 * s.light, (p.hairline + p.brow_y) / 2 + 4, 34, 20, s.skin_light, 0.45 * v.light_strength)
    svg.glow(0.2 * s.light, p.chin - 10, 13, 8, s.skin_light, 0.5 * v.light_strength)


def _ears(s: _Scene) -> None:
    svg, p = s.svg, s.id
    h, out, y = s.ears
    y += (p.eye_y + p.nose_y) / 2 - 4
    for side in (-1, 1):
        x = side * (max(p.width, p.cheek) - 2)
        shape = [(0, -h * 0.7), (out * 0.7, -h), (out * 1.15, -h * 0.45), (out * 0.9, h * 0.3),
                 (out * 0.5, h * 0.9), (0, h)]
        svg.path(_curve([(x + side * a, y + b) for a, b in shape], closed=True),
                 svg.linear(x, 0, x + side * out, 0, (0, s.skin_dark), (0.8, s.skin)))
        inner = [(0, -h * 0.4), (out * 0.6, -h * 0.55), (out * 0.6, 0), (0, h * 0.5)]
        svg.path(_curve([(x + side * a, y + b) for a, b in inner], closed=True), s.skin_dark, 0.55)


def _elf_ears(s: _Scene) -> None:
    """Drawn in front of the hair, so that everybody's can be seen."""
    svg, p = s.svg, s.id
    y = (p.eye_y + p.nose_y) / 2
    for side in (-1, 1):
        x = p.width - 5
        shape = [(x, y - 16), (x + 14, y - 28), (x + 44, y - 64), (x + 36, y - 26), (x + 18, y + 8),
                 (x, y + 18)]
        inner = [(x + 2, y - 8), (x + 16, y - 20), (x + 34, y - 46), (x + 26, y - 20), (x + 12, y + 2)]
        svg.path(_curve([(side * a, b) for a, b in shape], closed=True),
                 svg.linear(side * x, 0, side * (x + 44), 0, (0, s.skin_dark), (0.4, s.skin),
                            (1, s.skin_light)))
        svg.path(_curve([(side * a, b) for a, b in inner], closed=True), s.skin_dark, 0.5)


def _marks(s: _Scene) -> None:
    """Freckles, a mole, lines of age, and the scars and pictures that edits put on the skin."""
    svg, p = s.svg, s.id
    brown = _mix(s.skin_dark, _rgb("#6a3a1c"), 0.35)
    if p.freckles:
        for k in range(16):  # a fixed scatter over nose and cheeks
            x, y = p.cheek * 0.75 * (2 * ((0.618 * k) % 1) - 1), p.nose_y - 22 + 1.4 * k
            svg.ellipse(x, y, 1.9, 1.7, brown, 0.22 + 0.33 * p.freckles)
    if p.mole:
        svg.ellipse(p.cheek * p.mole[0], p.nose_y - 16 + 24 * p.mole[1], 2.9, 2.7, brown, 0.9)
    if p.age:
        for side in (-1, 1):
            fold = [(side * (p.nose_width + 3), p.nose_y - 4), (side * (p.nose_width + 11), p.nose_y + 8),
                    (side * (p.mouth_width + 4), p.mouth_y)]
            svg.stroke(fold, s.skin_dark, 3.2, 0.45 * p.age)
            bag = [(side * (p.eye_gap + a), p.eye_y + b) for a, b in ((-11, 12), (0, 16), (11, 12))]
            svg.stroke(bag, s.skin_dark, 2.6, 0.5 * p.age)
        for k in range(2):
            y = p.brow_y - 13 - 11 * k
            svg.stroke([(-26, y + 2), (0, y), (26, y + 2)], s.skin_dark, 2.4, 0.45 * p.age)


def _nose(s: _Scene) -> None:
    svg, p = s.svg, s.id
    w, y, bridge = p.nose_width, p.nose_y, p.nose_bridge
    top = p.brow_y + 8
    away = -1 if s.var.light_side > 0 else 1
    side = [(away * bridge, top), (away * (bridge - 1), p.eye_y + 6), (away * w * 0.75, y - 9),
            (away * w, y - 2)]
    inner = [(0, top), (away * 1.5, p.eye_y + 6), (away * 2, y - 10), (away * w * 0.4, y)]
    amount = 0.30 + 0.30 * s.var.light_strength
    svg.path(_between(inner, side),
             svg.linear(0, top, 0, y, (0, s.skin_dark, 0), (0.45, s.skin_dark, 0.6 * amount),
                        (1, s.skin_dark, amount)))
    svg.glow(0, y + 2, w + 8, 9, s.skin_dark, 0.8)
    ball = [(-w, y - 4), (-w * 0.55, y - 11), (0, y - 13), (w * 0.55, y - 11), (w, y - 4), (w * 0.6, y + 1),
            (0, y + 4), (-w * 0.6, y + 1)]
    svg.path(_curve(ball, closed=True),
             svg.radial(0.15 * s.light, y - 8, w * 1.15, (0, s.skin_light), (0.55, s.skin),
                        (1, s.skin_dark)), 0.75)
    deep = _mix(s.skin_dark, _rgb("#3a1512"), 0.55)
    for side in (-1, 1):
        svg.ellipse(side * w * 0.48, y, w * 0.24, 2.1, deep, 0.6)
    svg.glow(0.1 * s.light, (top + y) / 2 + 2, bridge * 0.9, (y - top) * 0.42, s.skin_light, 0.75)
    svg.glow(0.12 * s.light, y - 7, 5 + 3 * p.nose_tip, 4 + 3 * p.nose_tip, _mix(s.skin_light, WHITE, 0.5),
             0.35 + 0.4 * p.nose_tip)


def _eyes(s: _Scene) -> None:
    svg, p, v = s.svg, s.id, s.var
    opened = {"smiling": 0.92, "smiling broadly": 0.80, "surprised": 1.22, "serious": 0.90}
    h, w = p.eye_height * opened.get(v.expression, 1.0), p.eye_width
    upper = [(-w, 1.5), (-w * 0.45, -h * 0.85), (w * 0.3, -h), (w, -1.5)]
    lower = [(-w, 1.5), (-w * 0.35, h * 0.72), (w * 0.4, h * 0.75), (w, -1.5)]
    almond = _between(upper, lower)
    lash = _mix(_rgb("#22150f"), s.brow, 0.2)
    for side in (-1, 1):
        svg.open(f"translate({side * p.eye_gap:.1f} {p.eye_y:.1f}) scale({side} 1) rotate({-p.eye_tilt:.1f})")
        _socket(s, w, h)
        svg.path(almond,
                 svg.linear(0, -h, 0, h, (0, _rgb("#b9b2b0")), (0.45, _rgb("#f4f1ee")), (1, _rgb("#e6dcd8"))))
        _iris(s, almond, h, side)
        thick = 1.8 + 1.8 * p.lashes + (2.0 if s.edit == Edit.GOTH else 0)
        wing = (w + 0.5 + 4.5 * p.lashes**2, -2 - 4 * p.lashes**2)
        raised = [(-w - 0.5, 1), (-w * 0.45, -h * 0.85 - thick * 0.8), (w * 0.35, -h - thick), wing]
        svg.path(_between(raised, [*upper[:-1], (w, -0.5)]), lash, 0.95)
        svg.stroke(lower[1:], lash if s.edit == Edit.GOTH else s.skin_dark, 1.8, 0.75)
        crease = [(-w * 0.9, -h * 0.5 - p.lid), (-w * 0.3, -h - p.lid), (w * 0.4, -h - p.lid - 1),
                  (w, -h * 0.6)]
        svg.stroke(crease, s.skin_dark, 2.2, 0.7)
        svg.close()


def _socket(s: _Scene, w: float, h: float) -> None:
    """The shade around one eye; make-up and the undead colour it."""
    svg = s.svg
    svg.glow(-2, -4, w + 8, h + 12, s.skin_dark, 0.55)
    paint = {Edit.PURPLE_MAKEUP: ("#8a2bc0", 0.95), Edit.GOTH: ("#120c16", 1.0),
             Edit.ZOMBIE: ("#2a2a22", 1.0)}
    if s.edit in paint:
        colour, opacity = paint[s.edit]
        low = 0 if s.edit == Edit.PURPLE_MAKEUP else 6
        svg.glow(1, -5 + 0.6 * low, w + 10, h + 9 + low, _rgb(colour), opacity)
        svg.glow(1, -6, w + 6, h + 4, _rgb(colour), opacity * 0.8)


def _iris(s: _Scene, almond: str, h: float, side: int) -> None:
    """Clipped to the almond. Left eyes are drawn mirrored: gaze and highlight are turned back."""
    svg, v = s.svg, s.var
    colour = _rgb(EYE_COLOURS[s.id.eye_colour][0])
    if s.edit == Edit.ZOMBIE:
        colour = _mix(colour, _rgb("#e8e4b0"), 0.7)
    r = 6.2 + 0.28 * s.id.eye_height
    x, y = side * 2.6 * v.gaze[0], -1.2 + 1.2 * v.gaze[1]
    svg.open(clip=svg.clip(almond))
    svg.ellipse(x, y, r, r,
                svg.radial(x, y + 3, r + 2, (0, _mix(colour, WHITE, 0.40)), (0.55, colour),
                           (1, _mix(colour, BLACK, 0.65))))
    svg.ellipse(x, y, r * 0.45, r * 0.45, _rgb("#120d0c"))
    svg.ellipse(0, -h - 1, s.id.eye_width, 5.5, _rgb("#2a1a1a"), 0.35)
    svg.close()
    svg.ellipse(x - side * 2.6, y - 2.6, 2.1, 2.1, WHITE, 0.95)


def _brows(s: _Scene) -> None:
    svg, p, v = s.svg, s.id, s.var
    lift = {"surprised": 6.0, "serious": -2.0, "open-mouthed": 2.0}.get(v.expression, 0.0) * v.amount
    frown = 3.0 * v.amount if v.expression == "serious" else 0.0
    w, t = p.brow_width, p.brow_thick
    for side in (-1, 1):
        x, y = side * (p.eye_gap + 1), p.brow_y - lift
        upper = [(-w, frown + p.brow_tilt * 0.5 - t * 0.3), (-w * 0.2, -t * 0.6 - p.brow_arch * 0.6),
                 (w * 0.4, -t * 0.55 - p.brow_arch), (w, -p.brow_tilt)]
        lower = [(-w, frown + p.brow_tilt * 0.5 + t * 0.6), (-w * 0.2, t * 0.45 - p.brow_arch * 0.6),
                 (w * 0.4, t * 0.3 - p.brow_arch), (w, -p.brow_tilt + 1)]
        turned = [[(x + side * a, y + b) for a, b in line] for line in (upper, lower)]
        svg.path(_curve(turned[0] + turned[1][::-1], closed=True),
                 svg.linear(x - side * w, 0, x + side * w, 0, (0, s.brow, 0.75), (0.3, s.brow, 0.95),
                            (1, s.brow, 0.85)))


def _mouth_lines(s: _Scene) -> tuple[Points, Points, Points, Points]:
    """Upper lip's upper and lower edge, lower lip's upper and lower edge; each from left to right."""
    p, v = s.id, s.var
    smile = {"smiling": 0.6, "smiling broadly": 1.0, "serious": -0.35}.get(v.expression, 0.0) * v.amount
    gap = {"smiling broadly": 8.0, "open-mouthed": 10.0, "surprised": 9.0}.get(v.expression, 0.0) * v.amount
    w = p.mouth_width + 4 * max(smile, 0) - (4 * v.amount if v.expression == "surprised" else 0)
    up, low, y = p.lip_upper, p.lip_lower, p.mouth_y - 0.25 * gap
    corner = (-w, y - 5.5 * smile - p.mouth_curve)
    middle = y + 2.5 * max(smile, 0)
    a = _mirror([corner, (-w * 0.55, (corner[1] + middle) / 2 - up * 0.72), (-w * 0.2, middle - up),
                 (0, middle - up + p.lip_bow)])
    b = _mirror([corner, (-w * 0.5, (0.35 * corner[1] + 0.65 * middle)), (0, middle + 1)])
    c = _mirror([corner, (-w * 0.5, (0.35 * corner[1] + 0.65 * middle) + gap * 0.8), (0, middle + 1 + gap)])
    d = _mirror([corner, (-w * 0.55, (0.3 * corner[1] + 0.7 * middle) + gap * 0.85 + low * 0.6),
                 (0, middle + gap + low)])
    return a, b, c, d


def _mouth(s: _Scene) -> None:
    svg = s.svg
    a, b, c, d = _mouth_lines(s)
    y, bottom, w = b[len(b) // 2][1], d[len(d) // 2][1], -a[0][0]
    deep = _mix(_mix(s.lips, _rgb("#3a0d10"), 0.6), BLACK, 0.35)
    svg.glow(0, bottom + 3, w * 0.6, 6, s.skin_dark, 0.65)
    svg.path(_between(b, c), deep)
    gap = c[len(c) // 2][1] - y
    if gap > 1.5:
        teeth = [(x * 0.86, by + 0.45 * (cy - by)) for (x, by), (_, cy) in zip(b, c)]
        svg.path(_between([(x * 0.86, by) for x, by in b], teeth), _rgb("#f3efe8"))
        svg.glow(0, y + gap, w * 0.45, gap * 0.42, _rgb("#b5525a"), 0.9)
    top = a[len(a) // 2][1]
    svg.path(_between(a, b), svg.linear(0, top, 0, y, (0, s.lips), (1, _mix(s.lips, BLACK, 0.22))))
    svg.path(_between(c, d),
             svg.linear(0, y + gap, 0, bottom, (0, _mix(s.lips, BLACK, 0.05)),
                        (0.45, _mix(s.lips, WHITE, 0.16)), (1, _mix(s.lips, BLACK, 0.12))))
    if gap <= 1.5:
        svg.stroke(b, deep, 2.2, 0.85)
    svg.glow(0.2 * s.light, bottom - 0.5 * s.id.lip_lower, w * 0.28, 2.4, WHITE, 0.45)
    for side in (0, -1):
        svg.glow(*b[side], 4, 4, s.skin_dark, 0.6)


def _beard(s: _Scene) -> None:
    svg, p = s.svg, s.id
    if not p.beard:
        return
    if p.beard == "chin beard":
        shape = _mirror([(-p.chin_width - 3, p.chin - 12), (-p.mouth_width * 0.75, p.mouth_y + 9),
                         (0, p.mouth_y + 14)])
        low = _mirror([(-p.chin_width - 3, p.chin - 12), (-p.chin_width * 0.8, p.chin + 4), (0, p.chin + 12)])
        svg.path(_between(shape, low),
                 svg.linear(0, p.mouth_y + 8, 0, p.chin + 12, (0, s.beard, 0.85),
                            (1, _mix(s.beard, BLACK, 0.3))))
        return
    grow = 9 if p.beard == "full beard" else 0
    opacity = 0.95 if p.beard == "full beard" else 0.36
    outer = _mirror([(-p.width - 0.1 * grow, p.eye_y + 14), (-p.cheek - 0.3 * grow, p.nose_y - 4),
                     (-p.jaw - 0.6 * grow, p.mouth_y + 5),
                     (-p.chin_width - 0.7 * grow, p.chin - 2 + 0.7 * grow), (0, p.chin + grow)])
    inner = _mirror([(-p.width + 5, p.eye_y + 14), (-p.cheek + 10, p.nose_y + 2),
                     (-p.mouth_width - 9, p.mouth_y - 3), (-p.mouth_width * 0.7, p.mouth_y + 15),
                     (0, p.mouth_y + p.lip_lower + 9)])
    svg.path(_between(inner, outer),
             svg.linear(0, p.nose_y - 10, 0, p.chin + grow, (0, s.beard, 0.6 * opacity),
                        (0.4, s.beard, opacity), (1, _mix(s.beard, BLACK, 0.28), opacity)))
    for k in range(1, 4) if grow else ():
        line = [(a + (b - a) * k / 4, c + (e - c) * k / 4) for (a, c), (b, e) in zip(inner, outer)]
        svg.stroke(line, _brighter(s.beard, 0.8), 2.6, 0.14)


# Hair ---------------------------------------------------------------------------------------------


def _hair_paint(s: _Scene) -> str:
    """Bright at the crown, dark towards the neck."""
    base, top = s.hair, s.id.top
    return s.svg.linear(2 * s.light, top - 14, -0.5 * s.light, 250, (0, _brighter(base, 0.15)),
                        (0.10, _brighter(base, 0.42)), (0.30, base), (1, _mix(base, BLACK, 0.48)))


def _hair_edges(s: _Scene) -> tuple[Points, Points]:
    """Outer and inner edge of the hair in front, both from the left tip to the right one."""
    p, style = s.id, s.style
    w, top, side = p.width, style.top * p.hair_volume, style.side * p.hair_volume
    dome = _dome(p, top, side, 9)
    if style.extra == "quiff":
        crest = (4, 4 + p.part)  # the points of the dome that stand up
        dome = [(x + p.part * (p.eye_y - y) / 15, y - 9 * (k in crest)) for k, (x, y) in enumerate(dome)]
    temple, forehead, brow = w - 6, p.hairline, p.brow_y
    falls = {
        "short": ([(-w - 0.5 * side, p.eye_y + 10)], [(-w + 5, p.eye_y + 10)]),
        "bob": ([(-w - side + 10, p.chin - 2), (-w - side - 5, p.mouth_y + 4), (-w - side - 4, p.nose_y)],
                [(-w + 14, p.chin - 4), (-w + 5, p.mouth_y + 4), (-w + 2, p.nose_y)]),
        "long": ([(-w - side - 4, 286), (-w - side - 9, 220), (-w - side - 5, p.mouth_y)],
                 [(-w + 12, 286), (-w + 9, 220), (-w + 3, p.mouth_y)]),
    }  # fmt: skip
    inner = {
        "round": [(-temple + 1, brow + 4), (-w * 0.66, forehead + 8), (-w * 0.34, forehead + 1),
                  (0, forehead)],
        "widow": [(-temple, brow + 2), (-w * 0.70, forehead + 6), (-w * 0.42, forehead - 5),
                  (0, forehead + 4)],
        "receding": [(-temple + 1, brow + 4), (-w * 0.80, forehead), (-w * 0.52, p.top + 11),
                     (0, p.top + 15)],
        "centre": [(-temple - 2, brow + 14), (-w * 0.72, brow - 12), (-w * 0.36, forehead + 2),
                   (0, p.top + 14)],
        "bangs": [(-temple + 2, brow + 8), (-w * 0.80, brow - 6), (-w * 0.42, brow - 8), (0, brow - 10)],
    }  # fmt: skip
    if style.hairline == "side":
        line = [(-temple, brow + 6), (-w * 0.74, forehead + 8), (-w * 0.44, p.top + 13),
                (w * 0.05, forehead + 6), (w * 0.52, brow - 14), (w * 0.80, brow - 4), (temple, brow + 10)]
        line = line if p.part < 0 else [(-x, y) for x, y in line[::-1]]
    else:
        line = _mirror(inner[style.hairline])
    out, back = falls[style.fall]
    right_out, right_in = [(-x, y) for x, y in out[::-1]], [(-x, y) for x, y in back[::-1]]
    return [*out, *dome, *right_out], [*back, *line, *right_in]


def _resample(points: Points, count: int) -> np.ndarray:
    """`count` points at even distances along the polyline."""
    line = np.array(points)
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    even = np.linspace(0, at[-1], count)
    return np.stack([np.interp(even, at, line[:, 0]), np.interp(even, at, line[:, 1])], axis=1)


def _hair_front(s: _Scene) -> None:
    if s.style.words == STYLES["bald"].words:
        return
    svg, p, style = s.svg, s.id, s.style
    outer, inner = _hair_edges(s)
    edge = [(x, y) for x, y in inner if y < p.brow_y + 16]
    shadow = [(0.97 * x, y + 8) for x, y in edge]  # on the forehead
    svg.path(_between(edge, shadow), s.skin_dark, 0.42)
    paint = _hair_paint(s)
    svg.path(_between(outer, inner), paint, 0.72 if style.extra == "buzz" else 1.0)
    if style.extra == "curls":
        _curls(s, outer, inner, paint)
    elif style.extra != "buzz":
        _strands(s, outer, inner)


def _curls(s: _Scene, outer: Points, inner: Points, paint: str) -> None:
    """Balls along the outline share its gradient and melt into it; fainter ones inside are the curls."""
    svg = s.svg
    count = 26 if s.style.fall == "long" else 18
    edge, middle = _resample(outer, count), _resample(inner, count)
    for k, (x, y) in enumerate(edge[1:-1]):
        svg.ellipse(x, y, 11 + 3 * (k % 3), 11 + 3 * (k % 3), paint)
    for k, (x, y) in enumerate(middle):
        if y < s.id.brow_y:  # not over the eyes and cheeks
            svg.ellipse(x, y - 3, 8 + 2 * (k % 2), 6, paint)
    light, dark = _brighter(s.hair, 0.7), _mix(s.hair, BLACK, 0.55)
    for row, share in enumerate((0.0, 0.38, 0.72)):
        for k in range(1, count - 1):
            x, y = edge[k] + (share + 0.14 * (k % 2)) * (middle[k] - edge[k])
            size = 7 + 1.5 * ((k + row) % 3)
            svg.ellipse(x, y, size, size, light if (k + row) % 2 else dark, 0.07)


def _strands(s: _Scene, outer: Points, inner: Points) -> None:
    """Soft strokes that run along the hair, between its two edges."""
    svg = s.svg
    a, b = _resample(outer, 9), _resample(inner, 9)
    light, dark = _brighter(s.hair, 0.9), _mix(s.hair, BLACK, 0.60)
    for share, colour, width in ((0.18, light, 3.4), (0.40, dark, 3.0), (0.62, light, 3.6),
                                 (0.84, dark, 3.0)):
        svg.stroke([tuple(xy) for xy in a + share * (b - a)], colour, width, 0.18)


def _tail_paint(s: _Scene, sign: float) -> str:
    """For hair that hangs beside the head: bright along its middle."""
    w = s.id.width
    return s.svg.linear(sign * (w - 4), 0, sign * (w + 36), 0, (0, _mix(s.hair, BLACK, 0.45)),
                        (0.55, _mix(s.hair, WHITE, 0.08)), (1, _mix(s.hair, BLACK, 0.30)))


def _hair_back(s: _Scene) -> None:
    """What is seen behind neck and head."""
    svg, p, style = s.svg, s.id, s.style
    if style.words == STYLES["bald"].words:
        return
    w, side, top = p.width, style.side * p.hair_volume, style.top * p.hair_volume
    if style.fall != "short":
        low = p.chin + 2 if style.fall == "bob" else 286
        shape = [*_dome(p, top - 2, side - 2), (w + side, p.mouth_y), (w + side, low), (0, low + 4),
                 (-w - side, low), (-w - side, p.mouth_y)]
        svg.path(_curve(shape, closed=True), _mix(s.hair, BLACK, 0.5))
    if style.extra == "curls" and style.fall == "long":
        for k in range(7):
            for sign in (-1, 1):
                svg.ellipse(sign * (w + side + 1), p.eye_y + 22 * k, 15, 15, _mix(s.hair, BLACK, 0.42))
    if style.extra == "ponytail":
        tail = [(20, p.top + 6), (w + 6, p.top - 2), (w + 34, p.top + 40), (w + 36, p.eye_y + 30),
                (w + 20, p.mouth_y + 22), (w + 14, p.eye_y + 30), (w, p.eye_y - 30)]
        svg.path(_curve([(p.part * x, y) for x, y in tail], closed=True), _tail_paint(s, p.part))
        for k in (0, 8):
            lock = [(w + 4 + k, p.top + 8), (w + 22 + k, p.top + 46), (w + 22 + k / 2, p.eye_y + 34)]
            svg.stroke([(p.part * x, y) for x, y in lock], _mix(s.hair, WHITE, 0.5), 3, 0.22)
    elif style.extra == "bun":
        fill = svg.radial(0.5 * s.light, p.top - 14, 40, (0, _brighter(s.hair, 0.4)), (0.5, s.hair),
                          (1, _mix(s.hair, BLACK, 0.5)))
        svg.ellipse(0, p.top - 3, 29, 23, fill)
        svg.stroke([(-18, p.top - 8), (0, p.top - 17), (18, p.top - 8)], _brighter(s.hair, 0.9), 4, 0.2)
    elif style.extra == "pigtails":
        for sign in (-1, 1):
            tail = [(w - 4, p.eye_y - 16), (w + 22, p.eye_y - 14), (w + 34, p.nose_y), (w + 26, p.chin),
                    (w + 16, p.chin + 14), (w + 8, p.mouth_y), (w, p.eye_y + 14)]
            svg.path(_curve([(sign * x, y) for x, y in tail], closed=True), _tail_paint(s, sign))
            svg.stroke([(sign * (w + 14), p.eye_y), (sign * (w + 22), p.nose_y), (sign * (w + 18), p.chin)],
                       _mix(s.hair, WHITE, 0.5), 5, 0.16)


# Things that edits add ----------------------------------------------------------------------------


def _tattoo(s: _Scene) -> None:
    """A flame-like swirl on the cheek at the viewer's right, always the same."""
    svg, p = s.svg, s.id
    ink = _rgb("#173c94")
    svg.open(f"translate({0.58 * p.width:.1f} {(p.eye_y + p.nose_y) / 2 + 8:.1f}) scale({p.width / 60:.3f})")
    svg.stroke([(-16, 12), (-4, 4), (9, 7), (11, 17), (2, 20)], ink, 5.5, 0.88)
    svg.stroke([(-9, -1), (4, -5), (15, 1), (17, 12)], ink, 5.0, 0.88)
    svg.stroke([(15, -7), (21, -19), (19, -34)], ink, 5.0, 0.88)
    svg.ellipse(6, -15, 3.4, 3.4, ink, 0.88)
    svg.close()


def _scar(s: _Scene) -> None:
    svg, p = s.svg, s.id
    line = [(-p.eye_gap - 14, p.nose_y - 14), (-p.eye_gap, p.nose_y), (-p.mouth_width + 2, p.mouth_y - 2)]
    svg.stroke(line, _rgb("#5d1f26"), 5, 0.9)
    for share in (0.2, 0.5, 0.8):
        x, y = line[0][0] + share * (line[2][0] - line[0][0]), line[0][1] + share * (line[2][1] - line[0][1])
        svg.stroke([(x - 7, y + 5), (x + 6, y - 5)], _rgb("#3a1519"), 3, 0.9)
    svg.glow(p.cheek * 0.55, p.brow_y - 10, 20, 13, _rgb("#46503a"), 0.8)


def _mustache(s: _Scene) -> None:
    svg, p = s.svg, s.id
    y = (p.nose_y + p.mouth_y) / 2 + 1
    w = 34
    upper = _mirror([(-w - 5, y - 8), (-w * 0.8, y + 3), (-w * 0.45, y - 5), (-6, y - 6), (0, y - 3)])
    lower = _mirror([(-w - 5, y - 8), (-w * 0.85, y + 11), (-w * 0.45, y + 10), (-8, y + 5), (0, y + 3)])
    svg.path(_between(upper, lower),
             svg.linear(0, y - 8, 0, y + 11, (0, _mix(s.brow, WHITE, 0.12)), (1, _mix(s.brow, BLACK, 0.30))))


def _fangs(s: _Scene) -> None:
    svg = s.svg
    _, b, _, _ = _mouth_lines(s)
    y = b[len(b) // 2][1] - 1
    svg.path(_curve([(-21, y), (0, y - 3), (21, y), (12, y + 9), (0, y + 11), (-12, y + 9)], closed=True),
             _rgb("#3a0b12"))
    for side in (-1, 1):
        x = 11 * side
        svg.path(f"M{x - 7} {y - 1}Q{x - 6} {y + 15} {x} {y + 30}Q{x + 6} {y + 15} {x + 7} {y - 1}Z",
                 svg.linear(0, y, 0, y + 28, (0, _rgb("#e9e2d2")), (0.4, WHITE), (1, _rgb("#f4f1ea"))))


def _cigar(s: _Scene) -> None:
    svg, p = s.svg, s.id
    y = p.mouth_y + 1
    svg.open(f"translate({p.mouth_width * 0.45:.1f} {y:.1f}) rotate(16)")
    svg.rect(0, -6.5, 54, 13,
             svg.linear(0, -6.5, 0, 6.5, (0, _rgb("#a56a3c")), (0.4, _rgb("#8a5229")), (1, _rgb("#4f2c14"))))
    svg.rect(14, -6.5, 8, 13, _rgb("#d9a93a"))
    svg.rect(54, -6, 7, 12, _rgb("#c9c4be"))
    svg.ellipse(62, 0, 4, 6, _rgb("#ff6a1f"))
    svg.close()
    for dx, dy, r in ((64, 6, 9), (70, -12, 13), (64, -34, 16), (74, -58, 19)):
        svg.glow(p.mouth_width * 0.45 + dx, y + dy, r, r, _rgb("#e9e9ec"), 0.62)


def _sunglasses(s: _Scene) -> None:
    svg, p = s.svg, s.id
    y, gap, w, h = p.eye_y + 1, p.eye_gap, p.eye_width + 7, 17
    dark = svg.linear(0, y - h, 0, y + h, (0, _rgb("#0e0f14")), (1, _rgb("#3a3f4d")))
    svg.stroke([(-gap, y - 8), (0, y - 10), (gap, y - 8)], _rgb("#15161b"), 5)
    for side in (-1, 1):
        svg.stroke([(side * (gap + w - 4), y - 8), (side * (p.width + 2), y - 6)], _rgb("#15161b"), 5)
        lens = [(-w, -h * 0.75), (0, -h), (w + 2, -h * 0.8), (w, h * 0.2), (w * 0.35, h),
                (-w * 0.5, h * 0.9), (-w, 0)]
        svg.path(_curve([(side * (gap + a), y + b) for a, b in lens], closed=True), dark)
        svg.stroke([(side * gap - 10, y - 1), (side * gap - 2, y - 9)], WHITE, 4, 0.35)


def _earrings(s: _Scene) -> None:
    svg, p = s.svg, s.id
    ear_height, _, ear_y = s.ears
    y = (p.eye_y + p.nose_y) / 2 - 4 + ear_y + ear_height - 2
    for side in (-1, 1):
        x = side * (max(p.width, p.cheek) + 3)
        gold = svg.linear(x - 10, y, x + 10, y + 30, (0, _rgb("#fff0a0")), (0.5, _rgb("#e8b432")),
                          (1, _rgb("#a8741a")))
        where = f'cx="{x:.1f}" cy="{y + 15:.1f}" r="11"'
        svg.body.append(f'<circle {where} fill="none" stroke="{gold}" stroke-width="5"/>')
        svg.ellipse(x, y + 2, 4, 4, _rgb("#f7d860"))


def _headband(s: _Scene) -> None:
    """Follows the outline of the hair a little behind the forehead."""
    svg, p, style = s.svg, s.id, s.style
    side, top = style.side * p.hair_volume, style.top * p.hair_volume
    y = p.eye_y - 18
    lift = p.hairline - (p.top - top)
    crown = p.hairline - 0.40 * lift
    w = p.width + side
    upper = _mirror([(-w - 1, y - 10), (-w * 0.86, (y + crown) / 2 - 18), (-w * 0.48, crown - 3),
                     (0, crown - 8)])
    lower = _mirror([(-w - 1, y + 2), (-w * 0.80, (y + crown) / 2 - 6), (-w * 0.46, crown + 9),
                     (0, crown + 5)])
    svg.path(_between(upper, lower),
             svg.linear(-w, 0, w, 0, (0, _rgb("#0e7f86")), (0.5 + 0.3 * s.var.light_side, _rgb("#3fe0d8")),
                        (1, _rgb("#0e7f86"))))


def _tiara(s: _Scene) -> None:
    svg, p = s.svg, s.id
    y = p.hairline - 6
    gold = svg.linear(0, y - 36, 0, y + 8, (0, _rgb("#fff3b0")), (0.6, _rgb("#eebc3a")), (1, _rgb("#b07d1c")))
    svg.path(f"M-48 {y + 7}L-50 {y - 10}L-36 {y - 4}L-27 {y - 24}L-15 {y - 9}L0 {y - 36}L15 {y - 9}"
             f"L27 {y - 24}L36 {y - 4}L50 {y - 10}L48 {y + 7}Q0 {y - 7} -48 {y + 7}Z", gold)
    for x, dy, r, colour in ((0, -12, 6, "#e0325a"), (-27, -9, 4, "#3f8be0"), (27, -9, 4, "#3f8be0")):
        svg.ellipse(x, y + dy, r, r, _rgb(colour))
        svg.ellipse(x - 1.5, y + dy - 1.5, r * 0.35, r * 0.35, WHITE, 0.8)


def _helmet(s: _Scene) -> None:
    """An open-face helmet over all hair that stands on the skull; what falls below the ears stays visible."""
    svg, p = s.svg, s.id
    w = p.width + 13
    rim = p.hairline + 12
    shell = [(-w + 3, p.nose_y + 4), (-w, p.eye_y - 10), *_dome(p, 18, 13)[1:-1], (w, p.eye_y - 10),
             (w - 3, p.nose_y + 4)]
    face = [(-w + 17, p.nose_y + 4), (-w + 16, p.eye_y - 6), (-w + 26, rim + 6), (0, rim), (w - 26, rim + 6),
            (w - 16, p.eye_y - 6), (w - 17, p.nose_y + 4)]
    svg.stroke(_mirror([(-w + 12, p.nose_y), (-p.jaw - 2, p.mouth_y + 10), (0, p.chin + 5)]),
               _rgb("#2b2b30"), 7)
    svg.path(_between(shell, face),
             svg.radial(1.4 * s.light, p.top + 8, 130, (0, _rgb("#ffffff")), (0.15, _rgb("#ff9d5c")),
                        (0.5, _rgb("#e8641f")), (1, _rgb("#96350c"))))
    svg.stroke(face, _rgb("#2b2b30"), 6)
    svg.path(f"M-11 {p.top - 19}Q0 {p.top - 22} 11 {p.top - 19}L14 {rim - 3}Q0 {rim - 6} -14 {rim - 3}Z",
             _rgb("#fbf3e6"), 0.9)


# Putting it together ------------------------------------------------------------------------------


def _person(s: _Scene) -> None:
    """From the back to the front. The head turns about the neck; the body only moves with it."""
    svg, v, edit = s.svg, s.var, s.edit
    place = f"translate({128 + v.shift[0]:.2f} {v.shift[1]:.2f}) translate(0 200) scale({v.scale:.3f})"
    body, head = f"{place} translate(0 -200)", f"{place} rotate({v.tilt:.2f}) translate(0 -200)"
    svg.open(head)
    _hair_back(s)
    svg.close()
    svg.open(body)
    _neck(s)
    _clothes(s)
    svg.close()
    svg.open(head)
    _ears(s)
    _head(s)
    for part in (_nose, _marks, _eyes, _beard, _mouth, _brows):
        part(s)
    on_skin = {Edit.TATTOO: _tattoo, Edit.ZOMBIE: _scar, Edit.MUSTACHE: _mustache, Edit.FANGS: _fangs}
    if edit in on_skin:
        on_skin[edit](s)
    _hair_front(s)
    on_top = {
        Edit.ELF_EARS: _elf_ears, Edit.CIGAR: _cigar, Edit.SUNGLASSES: _sunglasses, Edit.EARRINGS: _earrings,
        Edit.HEADBAND: _headband, Edit.TIARA: _tiara, Edit.HELMET: _helmet,
    }  # fmt: skip
    if edit in on_top:
        on_top[edit](s)
    svg.close()
    if edit == Edit.BOWTIE:
        svg.open(body)
        _bowtie(s)
        svg.close()


def _light(v: Variation, pixels: np.ndarray) -> np.ndarray:
    """Tints the finished picture, (size, size, 3), warm or cold towards the light and darker away from it.

    Done on pixels, where it costs a quarter of what resvg takes for a gradient over the whole picture.
    """
    size = len(pixels)
    down, across = np.mgrid[0:size, 0:size].astype(np.float32) / size
    far = 0.75 * (1 - across if v.light_side > 0 else across) + 0.25 * down  # 0 at the light, 1 away from it
    tint = _rgb("#ffb25e") if v.light_warmth > 0 else _rgb("#6ea8ff")
    shares = ((tint, 0.15 * abs(v.light_warmth) * (1 - far)),
              (_rgb("#1a1030"), 0.22 * v.light_strength * far))
    for colour, share in shares:
        pixels = pixels + share[:, :, None] * (np.array(colour, np.float32) - pixels)
    return pixels


def portrait(identity: int, variation: int = 0, prompt: int | None = None, size: int = 128) -> Image.Image:
    """The person as an RGB picture of size x size; with `prompt` (0 to 24), that same picture edited."""
    scene = _Scene(identity, variation, None if prompt is None else Edit(prompt))
    _background(scene)
    _person(scene)
    if scene.edit == Edit.SNOW:
        _snowfall(scene.svg)
    data = resvg_py.svg_to_bytes(svg_string=scene.svg.text(), width=size, height=size, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"), np.float32)
    return Image.fromarray(np.rint(_light(scene.var, pixels)).astype(np.uint8))


def describe(identity: int, variation: int = 0) -> dict[str, str]:
    """The source picture's visible attributes in plain words, for captions."""
    p, v = identity_of(identity), variation_of(identity, variation)
    skin = SKIN_WORDS[min(int(p.skin_tone * len(SKIN_WORDS)), len(SKIN_WORDS) - 1)]
    pattern = "" if v.pattern == "plain" else v.pattern + " "
    words = {
        "hair": STYLES[p.style].words.format(p.hair),
        "eyes": f"{p.eye_colour} eyes",
        "skin": f"{skin} skin",
        "clothes": f"a {pattern}{v.clothes} {NECKLINES[v.neckline]}",
        "background": BACKGROUNDS[v.background].format(v.background_colour),
        "expression": v.expression,
    }
    if p.beard:
        words["beard"] = p.beard if p.beard == "stubble" else f"a {p.beard}"
    if p.freckles:
        words["freckles"] = "freckles"
    return words


def contact_sheet(first: int, count: int = 8, size: int = 128) -> Image.Image:
    """One row per identity: plain, a second variation, then the 25 edits, under a line of prompt numbers."""
    head = 16
    columns = [(0, None), (1, None), *((0, int(edit)) for edit in Edit)]
    sheet = Image.new("RGB", (size * len(columns), head + size * count), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (variation, prompt) in enumerate(columns):
        name = str(prompt) if prompt is not None else ("source", "variation")[variation]
        draw.text((size * column + 4, 2), name, fill="black")
        for row in range(count):
            sheet.paste(portrait(first + row, variation, prompt, size), (size * column, head + size * row))
    return sheet


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of 8 identities here")
    what.add_argument("--write", type=Path, metavar="DIR", help="write portrait_IDENTITY.png files here")
    parser.add_argument("--first", type=int, default=VALIDATION.start, help="first identity")
    parser.add_argument("--count", type=int, default=20, help="how many identities --write writes")
    parser.add_argument("--variation", type=int, default=0, help="which picture of each person to write")
    parser.add_argument("--size", type=int, default=128, help="side of a portrait in pixels")
    args = parser.parse_args(argv)
    if args.sheet:
        contact_sheet(args.first, size=args.size).save(args.sheet)
        print(f"wrote {args.sheet}")
        return 0
    args.write.mkdir(parents=True, exist_ok=True)
    for identity in range(args.first, args.first + args.count):
        portrait(identity, args.variation, size=args.size).save(args.write / f"portrait_{identity}.png")
    print(f"wrote {args.count} portraits to {args.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
