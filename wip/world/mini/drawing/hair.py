"""The hair, in front of the head and behind it."""

import numpy as np

from drawing.choices import STYLES
from drawing.colours import BLACK, WHITE, brighten, mix
from drawing.head import dome
from drawing.scene import Scene
from drawing.svg import Points, between, curve, mirror, placed


def _paint(s: Scene) -> str:
    """Makes the gradient of all hair on the head: bright at the crown, dark towards the neck."""
    base, top = s.hair, s.id.top
    bright = (0, brighten(base, 0.15)), (0.10, brighten(base, 0.42))
    stops = *bright, (0.30, base), (1, mix(base, BLACK, 0.48))
    return s.svg.linear(2 * s.light, top - 14, -0.5 * s.light, 250, *stops)


def _edges(s: Scene) -> tuple[Points, Points]:
    """Computes the outer and the inner edge of the hair in front, from the left tip to the right one."""
    p, style = s.id, s.style
    w, top, side = p.width, style.top * p.hair_volume, style.side * p.hair_volume
    skull = dome(p, top, side)
    if style.extra == "quiff":
        crest = (4, 4 + p.part)  # the points of the skull where it stands up
        skull = [(x + p.part * (p.eye_y - y) / 15, y - 9 * (k in crest)) for k, (x, y) in enumerate(skull)]
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
        line = [
            (-temple, brow + 6), (-w * 0.74, forehead + 8), (-w * 0.44, p.top + 13), (w * 0.05, forehead + 6),
            (w * 0.52, brow - 14), (w * 0.80, brow - 4), (temple, brow + 10),
        ]  # fmt: skip
        line = line if p.part < 0 else placed(line[::-1], -1)
    else:
        line = mirror(inner[style.hairline])
    out, back = falls[style.fall]
    return [*out, *skull, *placed(out[::-1], -1)], [*back, *line, *placed(back[::-1], -1)]


def _resample(points: Points, count: int) -> np.ndarray:
    """Takes `count` points at even distances along the polyline."""
    line = np.array(points)
    at = np.concatenate([[0.0], np.cumsum(np.hypot(*np.diff(line, axis=0).T))])
    even = np.linspace(0, at[-1], count)
    return np.stack([np.interp(even, at, line[:, 0]), np.interp(even, at, line[:, 1])], axis=1)


def front(s: Scene) -> None:
    """Draws the hair on the head and around the face."""
    if s.style == STYLES["bald"]:
        return
    svg, p, style = s.svg, s.id, s.style
    outer, inner = _edges(s)
    edge = [(x, y) for x, y in inner if y < p.brow_y + 16]
    shadow = [(0.97 * x, y + 8) for x, y in edge]  # on the forehead
    svg.path(between(edge, shadow), s.skin_dark, 0.42)
    paint = _paint(s)
    svg.path(between(outer, inner), paint, 0.72 if style.extra == "buzz" else 1.0)
    if style.extra == "curls":
        _curls(s, outer, inner, paint)
    elif style.extra != "buzz":
        _strands(s, outer, inner)


def _curls(s: Scene, outer: Points, inner: Points, paint: str) -> None:
    """Draws balls along the outline, which melt into it by its gradient, and fainter ones inside as curls."""
    svg = s.svg
    count = 26 if s.style.fall == "long" else 18
    edge, middle = _resample(outer, count), _resample(inner, count)
    for k, (x, y) in enumerate(edge[1:-1]):
        svg.ellipse(x, y, 11 + 3 * (k % 3), 11 + 3 * (k % 3), paint)
    for k, (x, y) in enumerate(middle):
        if y < s.id.brow_y:  # not over the eyes and cheeks
            svg.ellipse(x, y - 3, 8 + 2 * (k % 2), 6, paint)
    light, dark = brighten(s.hair, 0.7), mix(s.hair, BLACK, 0.55)
    for row, share in enumerate((0.0, 0.38, 0.72)):
        for k in range(1, count - 1):
            x, y = edge[k] + (share + 0.14 * (k % 2)) * (middle[k] - edge[k])
            size = 7 + 1.5 * ((k + row) % 3)
            svg.ellipse(x, y, size, size, light if (k + row) % 2 else dark, 0.07)


def _strands(s: Scene, outer: Points, inner: Points) -> None:
    """Draws soft strokes that run along the hair, between its two edges."""
    svg = s.svg
    a, b = _resample(outer, 9), _resample(inner, 9)
    light, dark = brighten(s.hair, 0.9), mix(s.hair, BLACK, 0.60)
    strands = (0.18, light, 3.4), (0.40, dark, 3.0), (0.62, light, 3.6), (0.84, dark, 3.0)
    for share, colour, width in strands:
        svg.stroke([tuple(xy) for xy in a + share * (b - a)], colour, width, 0.18)


def _tail_paint(s: Scene, sign: float) -> str:
    """Makes the gradient of hair that hangs beside the head: bright along its middle."""
    w = s.id.width
    stops = (0, mix(s.hair, BLACK, 0.45)), (0.55, mix(s.hair, WHITE, 0.08)), (1, mix(s.hair, BLACK, 0.30))
    return s.svg.linear(sign * (w - 4), 0, sign * (w + 36), 0, *stops)


def back(s: Scene) -> None:
    """Draws what is seen of the hair behind neck and head."""
    svg, p, style = s.svg, s.id, s.style
    if style == STYLES["bald"]:
        return
    w, side, top = p.width, style.side * p.hair_volume, style.top * p.hair_volume
    if style.fall != "short":
        low = p.chin + 2 if style.fall == "bob" else 286
        right = [(w + side, p.mouth_y), (w + side, low)]
        shape = [*dome(p, top - 2, side - 2), *right, (0, low + 4), *placed(right[::-1], -1)]
        svg.path(curve(shape, closed=True), mix(s.hair, BLACK, 0.5))
    if style.extra == "curls" and style.fall == "long":
        for k in range(7):
            for sign in (-1, 1):
                svg.ellipse(sign * (w + side + 1), p.eye_y + 22 * k, 15, 15, mix(s.hair, BLACK, 0.42))
    if style.extra == "ponytail":
        tail = [
            (20, p.top + 6), (w + 6, p.top - 2), (w + 34, p.top + 40), (w + 36, p.eye_y + 30),
            (w + 20, p.mouth_y + 22), (w + 14, p.eye_y + 30), (w, p.eye_y - 30),
        ]  # fmt: skip
        svg.path(curve(placed(tail, p.part), closed=True), _tail_paint(s, p.part))
        for k in (0, 8):
            lock = [(w + 4 + k, p.top + 8), (w + 22 + k, p.top + 46), (w + 22 + k / 2, p.eye_y + 34)]
            svg.stroke(placed(lock, p.part), mix(s.hair, WHITE, 0.5), 3, 0.22)
    elif style.extra == "bun":
        stops = (0, brighten(s.hair, 0.4)), (0.5, s.hair), (1, mix(s.hair, BLACK, 0.5))
        svg.ellipse(0, p.top - 3, 29, 23, svg.radial(0.5 * s.light, p.top - 14, 40, *stops))
        svg.stroke([(-18, p.top - 8), (0, p.top - 17), (18, p.top - 8)], brighten(s.hair, 0.9), 4, 0.2)
    elif style.extra == "pigtails":
        tail = [
            (w - 4, p.eye_y - 16), (w + 22, p.eye_y - 14), (w + 34, p.nose_y), (w + 26, p.chin),
            (w + 16, p.chin + 14), (w + 8, p.mouth_y), (w, p.eye_y + 14),
        ]  # fmt: skip
        lock = [(w + 14, p.eye_y), (w + 22, p.nose_y), (w + 18, p.chin)]
        for side in (-1, 1):
            svg.path(curve(placed(tail, side), closed=True), _tail_paint(s, side))
            svg.stroke(placed(lock, side), mix(s.hair, WHITE, 0.5), 5, 0.16)
