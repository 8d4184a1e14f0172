"""What is below the head: neck, clothes, and the bow tie."""

from drawing.choices import CLOTHES_COLOURS, Edit
from drawing.colours import BLACK, WHITE, Colour, mix
from drawing.scene import Scene
from drawing.svg import Svg, between, curve, mirror, placed


def neck(s: Scene) -> None:
    """Draws the neck, the chin's shadow on it, and the collar bones."""
    svg, p = s.svg, s.id
    n, low = p.neck, 226
    left = [(-n, 150), (-n, 196), (-n - 6, low - 6), (-n - 30, low + 8), (-n - 34, 286), (0, 286)]
    shape = curve(mirror(left), closed=True)
    lit = 0.5 + 0.3 * s.var.light_side
    svg.path(shape, svg.linear(-n, 0, n, 0, (0, s.skin_dark), (lit, s.skin), (1, s.skin_dark)))
    svg.path(shape, svg.linear(0, p.chin - 6, 0, p.chin + 26, (0, s.skin_dark, 0.95), (1, s.skin_dark, 0)))
    for side in (-1, 1):  # collar bones
        svg.stroke(placed([(6, low + 12), (24, low + 7), (50, low + 8)], side), s.skin_dark, 3, 0.35)


def clothes(s: Scene) -> None:
    """Draws the shirt: outline with the neckline cut out, pattern, folds, what belongs to the neckline."""
    svg, v = s.svg, s.var
    police = s.edit == Edit.POLICE
    colour = "#25355c" if police else CLOTHES_COLOURS[v.clothes]
    second = CLOTHES_COLOURS[v.second]
    neckline = "collar" if police else v.neckline
    n = s.id.neck + 3
    dip = {"crew": 234, "v": 258, "collar": 240, "turtleneck": 226, "hoodie": 236, "jacket": 280}[neckline]
    shoulder = [(-114, 286), (-106, 244), (-84, 232), (-n - 16, 223), (-n, 215)]
    sharp = [(-n * 0.5, (215 + dip) / 2 + 2), (0, dip)]
    round_ = [(-n * 0.72, dip - 6), (0, dip)]
    outline = mirror(shoulder + (sharp if neckline in ("v", "collar", "jacket") else round_))
    body = f"M{curve(outline)}Z"
    if neckline == "jacket":
        beneath = mirror([(-60, 286), (-n, 218), (-n * 0.7, 228), (0, 234)])
        svg.path(f"M{curve(beneath)}Z", mix(second, WHITE, 0.25))
    light, dark = mix(colour, WHITE, 0.18), mix(colour, BLACK, 0.38)
    lit = 0.5 + 0.3 * v.light_side
    svg.path(body, svg.linear(-110, 0, 110, 0, (0, dark), (lit, light), (1, dark)))
    if not police and v.pattern != "plain":
        _pattern(s, body, mix(colour, second if second != colour else WHITE, 0.55))
    for side in (-1, 1):  # folds, and the shadow of the head
        svg.stroke(placed([(73, 270), (67, 252), (54, 240)], side), dark, 7, 0.22)
    svg.glow(0, 216, s.id.neck + 8, 22, BLACK, 0.35)
    _neckline(s, neckline, colour, second, n, dip)
    if police:
        _police_details(svg)


def _pattern(s: Scene, body: str, colour: Colour) -> None:
    svg = s.svg
    with svg.group(inside=body):
        if s.var.pattern == "striped":
            for y in (226, 243, 260):
                svg.rect(-120, y, 240, 7, colour, 0.7)
        elif s.var.pattern == "dotted":
            for k in range(36):
                row, column = divmod(k, 9)
                svg.ellipse(-104 + 26 * column + 13 * (row % 2), 226 + 13 * row, 4.2, 4.2, colour, 0.75)
        else:
            svg.rect(-120, 244, 240, 44, colour, 0.9)


def _neckline(s: Scene, neckline: str, colour: Colour, second: Colour, n: float, dip: float) -> None:
    svg = s.svg
    light, dark = mix(colour, WHITE, 0.22), mix(colour, BLACK, 0.30)
    if neckline in ("crew", "v"):
        middle = [(-n * 0.5, (215 + dip) / 2 + 2)] if neckline == "v" else [(-n * 0.72, dip - 6)]
        svg.stroke(mirror([(-n, 215), *middle, (0, dip)]), dark, 5, 0.85)
    elif neckline == "turtleneck":
        top = mirror([(-n + 1, 206), (-n * 0.5, 212), (0, 214)])
        low = mirror([(-n - 5, 226), (-n * 0.5, 234), (0, 236)])
        svg.path(between(top, low), svg.linear(-n, 0, n, 0, (0, dark), (0.5, light), (1, dark)))
        svg.stroke(low, dark, 3, 0.6)
    elif neckline == "hoodie":
        hood = mirror([(-n - 3, 208), (-n * 0.75, 226), (0, 237)])
        low = mirror([(-n - 26, 226), (-n * 0.7, 246), (0, 254)])
        svg.path(between(hood, low), svg.linear(0, 208, 0, 256, (0, dark), (1, light)))
        for side in (-1, 1):
            svg.stroke(placed([(13, 248), (14, 276)], side), mix(light, WHITE, 0.6), 4)
    else:
        if neckline == "collar":
            wing = [(-n - 2, 208), (-n * 0.45, 228), (0, dip)]
            out = [(-n - 14, 222), (-n * 0.7, 248), (0, dip)]
        else:  # a jacket's lapels
            wing, out = [(-n - 2, 210), (-12, 286)], [(-n - 26, 226), (-25, 286)]
        for side in (-1, 1):
            inner, outer = placed(wing, -side), placed(out, -side)
            svg.path(between(inner, outer), light if side * s.var.light_side > 0 else mix(light, dark, 0.45))
            svg.stroke(outer, dark, 2.5, 0.6)


def _police_details(svg: Svg) -> None:
    gold, dark = "#f0c548", "#10182c"
    svg.path("M-9 233L9 233L6 243L13 286L-13 286L-6 243Z", dark)
    for side in (-1, 1):
        svg.path(f"M{62 * side} 224L{100 * side} 233L{97 * side} 243L{60 * side} 234Z", gold)
        svg.path(f"M{67 * side} 227.5L{96 * side} 235L{95 * side} 240L{66 * side} 233Z", dark)
    badge = svg.linear(34, 230, 66, 260, (0, "#fff0a8"), (1, "#c8922a"))
    svg.path("M50 229L57 234L65 232L66 244Q63 254 50 260Q37 254 34 244L35 232L43 234Z", badge)
    svg.ellipse(50, 243, 6, 6, "#7d5a14")


def bowtie(s: Scene) -> None:
    """Draws a red bow tie."""
    svg = s.svg
    red, dark = "#d42a3c", "#8c1322"
    wing = [(4, 222), (20, 213), (40, 209), (43, 227), (40, 245), (20, 240), (4, 232)]
    for side in (-1, 1):
        shade = svg.linear(0, 0, 44 * side, 0, (0, dark), (0.6, red), (1, red))
        svg.path(curve(placed(wing, side), closed=True), shade)
        svg.stroke(placed([(9, 226), (26, 222)], side), dark, 3, 0.6)
    svg.ellipse(0, 227, 9, 11, svg.radial(-2, 223, 14, (0, "#f0596a"), (1, dark)))
