"""What edits put on a person: tattoo, scar, moustache, fangs, cigar, glasses, jewels, helmet."""

from drawing.colours import BLACK, WHITE, mix
from drawing.face import mouth_lines
from drawing.head import dome
from drawing.scene import Scene
from drawing.svg import between, curve, mirror, placed


def tattoo(s: Scene) -> None:
    """Draws a flame-like swirl on the cheek at the viewer's right, always the same."""
    svg, p = s.svg, s.id
    ink = "#173c94"
    x, y = 0.58 * p.width, (p.eye_y + p.nose_y) / 2 + 8
    with svg.group(f"translate({x:.1f} {y:.1f}) scale({p.width / 60:.3f})"):
        svg.stroke([(-16, 12), (-4, 4), (9, 7), (11, 17), (2, 20)], ink, 5.5, 0.88)
        svg.stroke([(-9, -1), (4, -5), (15, 1), (17, 12)], ink, 5.0, 0.88)
        svg.stroke([(15, -7), (21, -19), (19, -34)], ink, 5.0, 0.88)
        svg.ellipse(6, -15, 3.4, 3.4, ink, 0.88)


def scar(s: Scene) -> None:
    """Draws a stitched scar on one cheek and a bruise on the forehead."""
    svg, p = s.svg, s.id
    line = [(-p.eye_gap - 14, p.nose_y - 14), (-p.eye_gap, p.nose_y), (-p.mouth_width + 2, p.mouth_y - 2)]
    svg.stroke(line, "#5d1f26", 5, 0.9)
    for share in (0.2, 0.5, 0.8):
        x, y = (a + share * (b - a) for a, b in zip(line[0], line[2], strict=True))
        svg.stroke([(x - 7, y + 5), (x + 6, y - 5)], "#3a1519", 3, 0.9)
    svg.glow(p.cheek * 0.55, p.brow_y - 10, 20, 13, "#46503a", 0.8)


def mustache(s: Scene) -> None:
    """Draws a moustache in the colour of the brows."""
    svg, p = s.svg, s.id
    y = (p.nose_y + p.mouth_y) / 2 + 1
    w = 34
    upper = mirror([(-w - 5, y - 8), (-w * 0.8, y + 3), (-w * 0.45, y - 5), (-6, y - 6), (0, y - 3)])
    lower = mirror([(-w - 5, y - 8), (-w * 0.85, y + 11), (-w * 0.45, y + 10), (-8, y + 5), (0, y + 3)])
    stops = (0, mix(s.brow, WHITE, 0.12)), (1, mix(s.brow, BLACK, 0.30))
    svg.path(between(upper, lower), svg.linear(0, y - 8, 0, y + 11, *stops))


def fangs(s: Scene) -> None:
    """Draws an open mouth with two fangs."""
    svg = s.svg
    _, b, _, _ = mouth_lines(s)
    y = b[len(b) // 2][1] - 1
    opening = [(-21, y), (0, y - 3), (21, y), (12, y + 9), (0, y + 11), (-12, y + 9)]
    svg.path(curve(opening, closed=True), "#3a0b12")
    for x in (-11, 11):
        ivory = svg.linear(0, y, 0, y + 28, (0, "#e9e2d2"), (0.4, WHITE), (1, "#f4f1ea"))
        svg.path(f"M{x - 7} {y - 1}Q{x - 6} {y + 15} {x} {y + 30}Q{x + 6} {y + 15} {x + 7} {y - 1}Z", ivory)


def cigar(s: Scene) -> None:
    """Draws a burning cigar in the corner of the mouth, and its smoke."""
    svg, p = s.svg, s.id
    x, y = p.mouth_width * 0.45, p.mouth_y + 1
    with svg.group(f"translate({x:.1f} {y:.1f}) rotate(16)"):
        leaf = svg.linear(0, -6.5, 0, 6.5, (0, "#a56a3c"), (0.4, "#8a5229"), (1, "#4f2c14"))
        svg.rect(0, -6.5, 54, 13, leaf)
        svg.rect(14, -6.5, 8, 13, "#d9a93a")
        svg.rect(54, -6, 7, 12, "#c9c4be")
        svg.ellipse(62, 0, 4, 6, "#ff6a1f")
    for dx, dy, r in ((64, 6, 9), (70, -12, 13), (64, -34, 16), (74, -58, 19)):
        svg.glow(x + dx, y + dy, r, r, "#e9e9ec", 0.62)


def sunglasses(s: Scene) -> None:
    """Draws dark glasses."""
    svg, p = s.svg, s.id
    y, gap, w, h = p.eye_y + 1, p.eye_gap, p.eye_width + 7, 17
    dark = svg.linear(0, y - h, 0, y + h, (0, "#0e0f14"), (1, "#3a3f4d"))
    svg.stroke([(-gap, y - 8), (0, y - 10), (gap, y - 8)], "#15161b", 5)
    lens = [
        (-w, -h * 0.75), (0, -h), (w + 2, -h * 0.8), (w, h * 0.2), (w * 0.35, h), (-w * 0.5, h * 0.9), (-w, 0)
    ]  # fmt: skip
    for side in (-1, 1):
        svg.stroke(placed([(gap + w - 4, y - 8), (p.width + 2, y - 6)], side), "#15161b", 5)
        svg.path(curve(placed(lens, side, side * gap, y), closed=True), dark)
        svg.stroke([(side * gap - 10, y - 1), (side * gap - 2, y - 9)], WHITE, 4, 0.35)


def earrings(s: Scene) -> None:
    """Draws golden hoops below the ears."""
    svg, p = s.svg, s.id
    ear_height, _, ear_y = s.ears
    y = (p.eye_y + p.nose_y) / 2 - 4 + ear_y + ear_height - 2
    for side in (-1, 1):
        x = side * (max(p.width, p.cheek) + 3)
        gold = svg.linear(x - 10, y, x + 10, y + 30, (0, "#fff0a0"), (0.5, "#e8b432"), (1, "#a8741a"))
        where = f'cx="{x:.1f}" cy="{y + 15:.1f}" r="11"'
        svg.body.append(f'<circle {where} fill="none" stroke="{gold}" stroke-width="5"/>')
        svg.ellipse(x, y + 2, 4, 4, "#f7d860")


def headband(s: Scene) -> None:
    """Draws a headband along the outline of the hair, a little behind the forehead."""
    svg, p, style = s.svg, s.id, s.style
    side, top = style.side * p.hair_volume, style.top * p.hair_volume
    y = p.eye_y - 18
    lift = p.hairline - (p.top - top)
    crown = p.hairline - 0.40 * lift
    w = p.width + side
    half = (y + crown) / 2
    upper = mirror([(-w - 1, y - 10), (-w * 0.86, half - 18), (-w * 0.48, crown - 3), (0, crown - 8)])
    lower = mirror([(-w - 1, y + 2), (-w * 0.80, half - 6), (-w * 0.46, crown + 9), (0, crown + 5)])
    stops = (0, "#0e7f86"), (0.5 + 0.3 * s.var.light_side, "#3fe0d8"), (1, "#0e7f86")
    svg.path(between(upper, lower), svg.linear(-w, 0, w, 0, *stops))


def tiara(s: Scene) -> None:
    """Draws a golden tiara with three stones."""
    svg, p = s.svg, s.id
    y = p.hairline - 6
    gold = svg.linear(0, y - 36, 0, y + 8, (0, "#fff3b0"), (0.6, "#eebc3a"), (1, "#b07d1c"))
    left = f"M-48 {y + 7}L-50 {y - 10}L-36 {y - 4}L-27 {y - 24}L-15 {y - 9}L0 {y - 36}"
    right = f"L15 {y - 9}L27 {y - 24}L36 {y - 4}L50 {y - 10}L48 {y + 7}Q0 {y - 7} -48 {y + 7}Z"
    svg.path(left + right, gold)
    stones = (0, -12, 6, "#e0325a"), (-27, -9, 4, "#3f8be0"), (27, -9, 4, "#3f8be0")
    for x, dy, r, colour in stones:
        svg.ellipse(x, y + dy, r, r, colour)
        svg.ellipse(x - 1.5, y + dy - 1.5, r * 0.35, r * 0.35, WHITE, 0.8)


def helmet(s: Scene) -> None:
    """Draws an open-face helmet over all hair on the skull; what falls below the ears stays visible."""
    svg, p = s.svg, s.id
    w = p.width + 13
    rim = p.hairline + 12
    side = [(-w + 3, p.nose_y + 4), (-w, p.eye_y - 10)]
    shell = [*side, *dome(p, 18, 13)[1:-1], *placed(side[::-1], -1)]
    face = mirror([(-w + 17, p.nose_y + 4), (-w + 16, p.eye_y - 6), (-w + 26, rim + 6), (0, rim)])
    strap = mirror([(-w + 12, p.nose_y), (-p.jaw - 2, p.mouth_y + 10), (0, p.chin + 5)])
    svg.stroke(strap, "#2b2b30", 7)
    stops = (0, WHITE), (0.15, "#ff9d5c"), (0.5, "#e8641f"), (1, "#96350c")
    svg.path(between(shell, face), svg.radial(1.4 * s.light, p.top + 8, 130, *stops))
    svg.stroke(face, "#2b2b30", 6)
    stripe = f"M-11 {p.top - 19}Q0 {p.top - 22} 11 {p.top - 19}L14 {rim - 3}Q0 {rim - 6} -14 {rim - 3}Z"
    svg.path(stripe, "#fbf3e6", 0.9)
