"""The head: its outline and skin, the ears, and the marks of the skin."""

import math

from drawing.choices import Edit
from drawing.colours import luminance, mix
from drawing.people import Identity
from drawing.scene import Scene
from drawing.svg import Points, curve, placed


def dome(p: Identity, top: float, side: float, count: int = 9) -> Points:
    """Outlines the skull from the left temple over the top to the right one, pushed out by top and side.

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
    return curve([*dome(p, 0, 0), *right, (0, p.chin), *placed(right[::-1], -1)], closed=True)


def head(s: Scene) -> None:
    """Draws the skin of the face: base, shade by the light, warm cheeks, bright forehead and chin."""
    svg, p, v = s.svg, s.id, s.var
    outline = _head_outline(p)
    base = svg.radial(s.light, p.eye_y + 8, 104, (0, s.skin_light), (0.5, s.skin), (1, s.skin_dark))
    svg.path(outline, base)
    away = -p.width if v.light_side > 0 else p.width
    amount = (0.35 + 0.40 * abs(v.light_side)) * v.light_strength
    stops = (0, s.skin_dark, 0), (1, s.skin_dark, 0.25 + amount)
    svg.path(outline, svg.linear(-0.2 * away, p.eye_y - 20, 0.9 * away, p.chin + 4, *stops))
    blush = mix(s.skin, "#d2483f", 0.20 + 0.40 * luminance(s.skin))
    if s.edit in (Edit.ZOMBIE, Edit.GOTH, Edit.BLUE_SKIN):
        blush = s.skin_dark
    cheek_y = (p.eye_y + p.nose_y) / 2 + 12
    for side in (-1, 1):
        svg.glow(side * p.cheek * 0.62, cheek_y, 22, 17, blush, 0.20 + 0.35 * p.blush)
        if s.edit == Edit.PURPLE_MAKEUP:
            svg.glow(side * p.cheek * 0.66, cheek_y - 2, 26, 17, "#b14fd0", 0.6)
    svg.glow(0.6 * s.light, (p.hairline + p.brow_y) / 2 + 4, 34, 20, s.skin_light, 0.45 * v.light_strength)
    svg.glow(0.2 * s.light, p.chin - 10, 13, 8, s.skin_light, 0.5 * v.light_strength)


def ears(s: Scene) -> None:
    """Draws the ears, which the head then covers in part."""
    svg, p = s.svg, s.id
    h, out, y = s.ears
    y += (p.eye_y + p.nose_y) / 2 - 4
    shape = [
        (0, -h * 0.7), (out * 0.7, -h), (out * 1.15, -h * 0.45), (out * 0.9, h * 0.3), (out * 0.5, h * 0.9),
        (0, h),
    ]  # fmt: skip
    inner = [(0, -h * 0.4), (out * 0.6, -h * 0.55), (out * 0.6, 0), (0, h * 0.5)]
    for side in (-1, 1):
        x = side * (max(p.width, p.cheek) - 2)
        shade = svg.linear(x, 0, x + side * out, 0, (0, s.skin_dark), (0.8, s.skin))
        svg.path(curve(placed(shape, side, x, y), closed=True), shade)
        svg.path(curve(placed(inner, side, x, y), closed=True), s.skin_dark, 0.55)


def elf_ears(s: Scene) -> None:
    """Draws pointed ears in front of the hair, so that everybody's can be seen."""
    svg, p = s.svg, s.id
    x, y = p.width - 5, (p.eye_y + p.nose_y) / 2
    shape = [(0, -16), (14, -28), (44, -64), (36, -26), (18, 8), (0, 18)]
    inner = [(2, -8), (16, -20), (34, -46), (26, -20), (12, 2)]
    stops = (0, s.skin_dark), (0.4, s.skin), (1, s.skin_light)
    for side in (-1, 1):
        shade = svg.linear(side * x, 0, side * (x + 44), 0, *stops)
        svg.path(curve(placed(shape, side, side * x, y), closed=True), shade)
        svg.path(curve(placed(inner, side, side * x, y), closed=True), s.skin_dark, 0.5)


def marks(s: Scene) -> None:
    """Draws freckles, a mole, and the lines of age."""
    svg, p = s.svg, s.id
    brown = mix(s.skin_dark, "#6a3a1c", 0.35)
    if p.freckles:
        for k in range(16):  # a fixed scatter over nose and cheeks
            x, y = p.cheek * 0.75 * (2 * ((0.618 * k) % 1) - 1), p.nose_y - 22 + 1.4 * k
            svg.ellipse(x, y, 1.9, 1.7, brown, 0.22 + 0.33 * p.freckles)
    if p.mole:
        svg.ellipse(p.cheek * p.mole[0], p.nose_y - 16 + 24 * p.mole[1], 2.9, 2.7, brown, 0.9)
    if p.age:
        w = p.nose_width
        fold = [(w + 3, p.nose_y - 4), (w + 11, p.nose_y + 8), (p.mouth_width + 4, p.mouth_y)]
        bag = [(-11, 12), (0, 16), (11, 12)]
        for side in (-1, 1):
            svg.stroke(placed(fold, side), s.skin_dark, 3.2, 0.45 * p.age)
            svg.stroke(placed(bag, side, side * p.eye_gap, p.eye_y), s.skin_dark, 2.6, 0.5 * p.age)
        for k in range(2):
            y = p.brow_y - 13 - 11 * k
            svg.stroke([(-26, y + 2), (0, y), (26, y + 2)], s.skin_dark, 2.4, 0.45 * p.age)
