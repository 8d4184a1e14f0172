"""The face: nose, eyes, brows, mouth and beard."""

from drawing.choices import EYE_COLOURS, Edit
from drawing.colours import BLACK, WHITE, brighten, mix
from drawing.scene import Scene
from drawing.svg import Points, between, curve, mirror, placed


def nose(s: Scene) -> None:
    """Draws the nose: the shade of its side, the ball, nostrils, and the light on its back."""
    svg, p = s.svg, s.id
    w, y, bridge = p.nose_width, p.nose_y, p.nose_bridge
    top = p.brow_y + 8
    away = -1 if s.var.light_side > 0 else 1
    outer = [(bridge, top), (bridge - 1, p.eye_y + 6), (w * 0.75, y - 9), (w, y - 2)]
    inner = [(0, top), (1.5, p.eye_y + 6), (2, y - 10), (w * 0.4, y)]
    amount = 0.30 + 0.30 * s.var.light_strength
    stops = (0, s.skin_dark, 0), (0.45, s.skin_dark, 0.6 * amount), (1, s.skin_dark, amount)
    svg.path(between(placed(inner, away), placed(outer, away)), svg.linear(0, top, 0, y, *stops))
    svg.glow(0, y + 2, w + 8, 9, s.skin_dark, 0.8)
    above = mirror([(-w, y - 4), (-w * 0.55, y - 11), (0, y - 13)])
    ball = [*above, (w * 0.6, y + 1), (0, y + 4), (-w * 0.6, y + 1)]
    stops = (0, s.skin_light), (0.55, s.skin), (1, s.skin_dark)
    svg.path(curve(ball, closed=True), svg.radial(0.15 * s.light, y - 8, w * 1.15, *stops), 0.75)
    deep = mix(s.skin_dark, "#3a1512", 0.55)
    for side in (-1, 1):
        svg.ellipse(side * w * 0.48, y, w * 0.24, 2.1, deep, 0.6)
    svg.glow(0.1 * s.light, (top + y) / 2 + 2, bridge * 0.9, (y - top) * 0.42, s.skin_light, 0.75)
    tip, shine = p.nose_tip, mix(s.skin_light, WHITE, 0.5)
    svg.glow(0.12 * s.light, y - 7, 5 + 3 * tip, 4 + 3 * tip, shine, 0.35 + 0.4 * tip)


def eyes(s: Scene) -> None:
    """Draws the eyes: socket, white, iris, lashes and the lid's crease."""
    svg, p, v = s.svg, s.id, s.var
    opened = {"smiling": 0.92, "smiling broadly": 0.80, "surprised": 1.22, "serious": 0.90}
    h, w = p.eye_height * opened.get(v.expression, 1.0), p.eye_width
    upper = [(-w, 1.5), (-w * 0.45, -h * 0.85), (w * 0.3, -h), (w, -1.5)]
    lower = [(-w, 1.5), (-w * 0.35, h * 0.72), (w * 0.4, h * 0.75), (w, -1.5)]
    almond = between(upper, lower)
    lash = mix("#22150f", s.brow, 0.2)
    for side in (-1, 1):
        place = f"translate({side * p.eye_gap:.1f} {p.eye_y:.1f}) scale({side} 1) rotate({-p.eye_tilt:.1f})"
        with svg.group(place):
            _socket(s, w, h)
            svg.path(almond, svg.linear(0, -h, 0, h, (0, "#b9b2b0"), (0.45, "#f4f1ee"), (1, "#e6dcd8")))
            _iris(s, almond, h, side)
            thick = 1.8 + 1.8 * p.lashes + (2.0 if s.edit == Edit.GOTH else 0)
            wing = (w + 0.5 + 4.5 * p.lashes**2, -2 - 4 * p.lashes**2)
            raised = [(-w - 0.5, 1), (-w * 0.45, -h * 0.85 - thick * 0.8), (w * 0.35, -h - thick), wing]
            svg.path(between(raised, [*upper[:-1], (w, -0.5)]), lash, 0.95)
            svg.stroke(lower[1:], lash if s.edit == Edit.GOTH else s.skin_dark, 1.8, 0.75)
            lid = -h - p.lid
            crease = [(-w * 0.9, -h * 0.5 - p.lid), (-w * 0.3, lid), (w * 0.4, lid - 1), (w, -h * 0.6)]
            svg.stroke(crease, s.skin_dark, 2.2, 0.7)


def _socket(s: Scene, w: float, h: float) -> None:
    """Draws the shade around one eye; make-up and the undead colour it."""
    svg = s.svg
    svg.glow(-2, -4, w + 8, h + 12, s.skin_dark, 0.55)
    paint = {
        Edit.PURPLE_MAKEUP: ("#8a2bc0", 0.95), Edit.GOTH: ("#120c16", 1.0), Edit.ZOMBIE: ("#2a2a22", 1.0)
    }  # fmt: skip
    if s.edit in paint:
        colour, opacity = paint[s.edit]
        low = 0 if s.edit == Edit.PURPLE_MAKEUP else 6
        svg.glow(1, -5 + 0.6 * low, w + 10, h + 9 + low, colour, opacity)
        svg.glow(1, -6, w + 6, h + 4, colour, opacity * 0.8)


def _iris(s: Scene, almond: str, h: float, side: int) -> None:
    """Draws one iris, clipped to the almond. Left eyes are mirrored: gaze and highlight are turned back."""
    svg, v = s.svg, s.var
    colour, _ = EYE_COLOURS[s.id.eye_colour]
    if s.edit == Edit.ZOMBIE:
        colour = mix(colour, "#e8e4b0", 0.7)
    r = 6.2 + 0.28 * s.id.eye_height
    x, y = side * 2.6 * v.gaze[0], -1.2 + 1.2 * v.gaze[1]
    with svg.group(inside=almond):
        stops = (0, mix(colour, WHITE, 0.40)), (0.55, colour), (1, mix(colour, BLACK, 0.65))
        svg.ellipse(x, y, r, r, svg.radial(x, y + 3, r + 2, *stops))
        svg.ellipse(x, y, r * 0.45, r * 0.45, "#120d0c")
        svg.ellipse(0, -h - 1, s.id.eye_width, 5.5, "#2a1a1a", 0.35)
    svg.ellipse(x - side * 2.6, y - 2.6, 2.1, 2.1, WHITE, 0.95)


def brows(s: Scene) -> None:
    """Draws the eyebrows, which surprise lifts and a serious look lowers."""
    svg, p, v = s.svg, s.id, s.var
    lift = {"surprised": 6.0, "serious": -2.0, "open-mouthed": 2.0}.get(v.expression, 0.0) * v.amount
    frown = 3.0 * v.amount if v.expression == "serious" else 0.0
    w, t = p.brow_width, p.brow_thick
    inner, arch, outer = frown + p.brow_tilt * 0.5, p.brow_arch, -p.brow_tilt
    upper = [
        (-w, inner - t * 0.3), (-w * 0.2, -t * 0.6 - arch * 0.6), (w * 0.4, -t * 0.55 - arch), (w, outer)
    ]  # fmt: skip
    lower = [
        (-w, inner + t * 0.6), (-w * 0.2, t * 0.45 - arch * 0.6), (w * 0.4, t * 0.3 - arch), (w, outer + 1)
    ]  # fmt: skip
    stops = (0, s.brow, 0.75), (0.3, s.brow, 0.95), (1, s.brow, 0.85)
    for side in (-1, 1):
        x, y = side * (p.eye_gap + 1), p.brow_y - lift
        shade = svg.linear(x - side * w, 0, x + side * w, 0, *stops)
        svg.path(curve(placed(upper + lower[::-1], side, x, y), closed=True), shade)


def mouth_lines(s: Scene) -> tuple[Points, Points, Points, Points]:
    """Computes the upper lip's two edges and the lower lip's two, from above; each from left to right."""
    p, v = s.id, s.var
    smile = {"smiling": 0.6, "smiling broadly": 1.0, "serious": -0.35}.get(v.expression, 0.0) * v.amount
    gap = {"smiling broadly": 8.0, "open-mouthed": 10.0, "surprised": 9.0}.get(v.expression, 0.0) * v.amount
    w = p.mouth_width + 4 * max(smile, 0) - (4 * v.amount if v.expression == "surprised" else 0)
    up, low, y = p.lip_upper, p.lip_lower, p.mouth_y - 0.25 * gap
    corner = (-w, y - 5.5 * smile - p.mouth_curve)
    middle = y + 2.5 * max(smile, 0)
    half = 0.35 * corner[1] + 0.65 * middle  # y between the corner and the middle
    high_half = (corner[1] + middle) / 2 - up * 0.72
    low_half = 0.3 * corner[1] + 0.7 * middle + gap * 0.85 + low * 0.6
    return (
        mirror([corner, (-w * 0.55, high_half), (-w * 0.2, middle - up), (0, middle - up + p.lip_bow)]),
        mirror([corner, (-w * 0.5, half), (0, middle + 1)]),
        mirror([corner, (-w * 0.5, half + gap * 0.8), (0, middle + 1 + gap)]),
        mirror([corner, (-w * 0.55, low_half), (0, middle + gap + low)]),
    )


def mouth(s: Scene) -> None:
    """Draws the mouth: lips, and teeth and tongue where it is open."""
    svg = s.svg
    a, b, c, d = mouth_lines(s)
    y, bottom, w = b[len(b) // 2][1], d[len(d) // 2][1], -a[0][0]
    deep = mix(mix(s.lips, "#3a0d10", 0.6), BLACK, 0.35)
    svg.glow(0, bottom + 3, w * 0.6, 6, s.skin_dark, 0.65)
    svg.path(between(b, c), deep)
    gap = c[len(c) // 2][1] - y
    if gap > 1.5:
        teeth = [(x * 0.86, by + 0.45 * (cy - by)) for (x, by), (_, cy) in zip(b, c)]
        svg.path(between([(x * 0.86, by) for x, by in b], teeth), "#f3efe8")
        svg.glow(0, y + gap, w * 0.45, gap * 0.42, "#b5525a", 0.9)
    top = a[len(a) // 2][1]
    svg.path(between(a, b), svg.linear(0, top, 0, y, (0, s.lips), (1, mix(s.lips, BLACK, 0.22))))
    stops = (0, mix(s.lips, BLACK, 0.05)), (0.45, mix(s.lips, WHITE, 0.16)), (1, mix(s.lips, BLACK, 0.12))
    svg.path(between(c, d), svg.linear(0, y + gap, 0, bottom, *stops))
    if gap <= 1.5:
        svg.stroke(b, deep, 2.2, 0.85)
    svg.glow(0.2 * s.light, bottom - 0.5 * s.id.lip_lower, w * 0.28, 2.4, WHITE, 0.45)
    for side in (0, -1):
        svg.glow(*b[side], 4, 4, s.skin_dark, 0.6)


def beard(s: Scene) -> None:
    """Draws stubble, a chin beard or a full beard; nothing on most people."""
    svg, p = s.svg, s.id
    if not p.beard:
        return
    if p.beard == "chin beard":
        corner = (-p.chin_width - 3, p.chin - 12)
        upper = mirror([corner, (-p.mouth_width * 0.75, p.mouth_y + 9), (0, p.mouth_y + 14)])
        lower = mirror([corner, (-p.chin_width * 0.8, p.chin + 4), (0, p.chin + 12)])
        stops = (0, s.beard, 0.85), (1, mix(s.beard, BLACK, 0.3))
        svg.path(between(upper, lower), svg.linear(0, p.mouth_y + 8, 0, p.chin + 12, *stops))
        return
    grow = 9 if p.beard == "full beard" else 0
    opacity = 0.95 if p.beard == "full beard" else 0.36
    outer = mirror([
        (-p.width - 0.1 * grow, p.eye_y + 14), (-p.cheek - 0.3 * grow, p.nose_y - 4),
        (-p.jaw - 0.6 * grow, p.mouth_y + 5), (-p.chin_width - 0.7 * grow, p.chin - 2 + 0.7 * grow),
        (0, p.chin + grow),
    ])  # fmt: skip
    inner = mirror([
        (-p.width + 5, p.eye_y + 14), (-p.cheek + 10, p.nose_y + 2), (-p.mouth_width - 9, p.mouth_y - 3),
        (-p.mouth_width * 0.7, p.mouth_y + 15), (0, p.mouth_y + p.lip_lower + 9),
    ])  # fmt: skip
    dark = mix(s.beard, BLACK, 0.28)
    stops = (0, s.beard, 0.6 * opacity), (0.4, s.beard, opacity), (1, dark, opacity)
    svg.path(between(inner, outer), svg.linear(0, p.nose_y - 10, 0, p.chin + grow, *stops))
    for k in range(1, 4) if grow else ():
        line = [(a + (b - a) * k / 4, c + (e - c) * k / 4) for (a, c), (b, e) in zip(inner, outer)]
        svg.stroke(line, brighten(s.beard, 0.8), 2.6, 0.14)
