"""What is behind the person: a room, or the place that an edit takes them to; and the snow in front."""

from drawing.choices import BACKGROUND_COLOURS, Edit
from drawing.colours import BLACK, WHITE, Colour, mix
from drawing.scene import Scene
from drawing.svg import Points, Svg, between, curve


def background(s: Scene) -> None:
    """Draws the place."""
    places = {
        Edit.SNOW: _snow, Edit.BEACH: _beach, Edit.CITY: _city, Edit.FOREST: _forest,
        Edit.DESERT: _desert, Edit.LIBRARY: _library, Edit.MOON: _night,
    }  # fmt: skip
    if s.edit in places:
        places[s.edit](s.svg)
    else:
        _room(s)


def _room(s: Scene) -> None:
    svg, v = s.svg, s.var
    base = BACKGROUND_COLOURS[v.background_colour]
    light, dark = mix(base, WHITE, 0.28), mix(base, "#2c2a33", 0.30)
    side, shift = v.background_side, v.background_shift
    x = 128 + 84 * side + 8 * shift  # where a thing on the wall is seen beside the head
    from_x, to_x = 128 - 128 * v.light_side, 128 + 128 * v.light_side
    svg.cover(svg.linear(from_x, 0, to_x, 256, (0, dark), (0.55, base), (1, light)))
    if v.background == "glow":
        svg.glow(128 + 40 * shift, 110, 170, 150, mix(base, WHITE, 0.7), 0.8)
    elif v.background == "panel":
        svg.rect(0, 168 + 20 * shift, 256, 100, mix(base, BLACK, 0.25), 0.8)
        svg.rect(0, 164 + 20 * shift, 256, 6, light)
    elif v.background == "window":
        svg.rect(x - 42, 22, 84, 128, mix(base, WHITE, 0.75))
        svg.rect(x - 36, 28, 72, 116, svg.linear(0, 28, 0, 144, (0, "#a8cdea"), (1, "#e9f1ee")))
        svg.rect(x - 3, 28, 6, 116, mix(base, WHITE, 0.75))
        svg.rect(x - 36, 82, 72, 6, mix(base, WHITE, 0.75))
    elif v.background == "picture":
        svg.rect(x - 34, 34 + 8 * shift, 68, 80, mix(base, "#4a3524", 0.75))
        svg.rect(x - 27, 41 + 8 * shift, 54, 66, mix(light, WHITE, 0.4))
        svg.ellipse(x, 74 + 8 * shift, 17, 20, mix(base, "#c8674e", 0.5))
    elif v.background == "curtain":
        for k in range(7):
            fold = 20 + 40 * k + 12 * shift
            stops = (0, dark, 0.75), (0.5, light, 0.5), (1, dark, 0.75)
            svg.rect(fold - 20, 0, 40, 256, svg.linear(fold - 20, 0, fold + 20, 0, *stops))
    elif v.background == "lights":
        svg.cover(mix(base, "#1d2230", 0.6), 0.8)
        for k in range(9):
            spot = mix(base, ("#ffd9a0", "#ffb98a", "#cfe3ff")[k % 3], 0.7)
            x, y, r = (37 * k * k + 31 * k + 40 * shift) % 256, (53 * k + 20) % 190, 13 + 3 * (k % 4)
            svg.ellipse(x, y, r, r, spot, 0.38)
    elif v.background == "diagonal":
        edge = 128 + 50 * shift
        svg.path(f"M{edge + 70 * side} 0L{edge - 70 * side} 256H{128 + 128 * side}V0Z", dark, 0.6)


def _sky(svg: Svg, *stops: tuple) -> None:
    svg.cover(svg.linear(0, 0, 0, 256, *stops))


def _ground(svg: Svg, line: Points, fill: Colour, opacity: float = 1.0) -> None:
    """Fills everything below a line from edge to edge."""
    svg.path(f"M{curve(line)}V260H{line[0][0]}Z", fill, opacity)


def _snow(svg: Svg) -> None:
    _sky(svg, (0, "#8fa6bd"), (0.6, "#c9d6e2"), (1, "#e6edf3"))
    for x, y, height in ((14, 176, 92), (52, 168, 60), (212, 170, 72), (246, 178, 100)):
        for k in range(3):
            half, low = height * (0.20 + 0.07 * k), y - height * (0.60 - 0.28 * k)
            top, snow = low - height * 0.42, low - height * 0.15
            svg.path(f"M{x} {top}L{x - half} {low}L{x + half} {low}Z", "#5f7d86", 0.75)
            svg.path(f"M{x} {top}L{x - half * 0.6} {snow}L{x + half * 0.6} {snow}Z", "#f2f6fa", 0.9)
    _ground(svg, [(-10, 172), (50, 160), (128, 176), (200, 162), (266, 174)], "#f3f7fb")


def snowfall(svg: Svg) -> None:
    """Draws flakes at fixed places in front of everything, spread evenly by a low-discrepancy sequence; none
    where eyes are."""
    for k in range(1, 49):
        x, y, r = 256 * ((0.7549 * k) % 1), 256 * ((0.5698 * k) % 1), 2.6 + 2.6 * ((0.618 * k) % 1)
        if abs(x - 128) < 52 and 98 < y < 134:
            continue
        svg.glow(x, y, 1.9 * r, 1.9 * r, WHITE, 0.9)
        svg.ellipse(x, y, 0.8 * r, 0.8 * r, WHITE, 0.9)


def _beach(svg: Svg) -> None:
    _sky(svg, (0, "#4ea3dd"), (0.5, "#bfe3f2"), (1, "#e3f2f5"))
    svg.glow(40, 42, 46, 46, "#fff3b5", 0.9)
    svg.ellipse(40, 42, 18, 18, "#fff1a8")
    svg.rect(0, 128, 256, 62, svg.linear(0, 128, 0, 190, (0, "#1f7fb4"), (1, "#5cc3c7")))
    wave = [(-5, 184), (40, 178), (90, 186), (170, 178), (220, 186), (262, 180)]
    _ground(svg, wave, WHITE, 0.8)
    sand = svg.linear(0, 186, 0, 256, (0, "#ecd59c"), (1, "#d3b375"))
    _ground(svg, [(x, y + 8) for x, y in wave], sand)
    svg.stroke([(240, 196), (234, 130), (222, 70)], "#7d5b3c", 9)
    for x, y in ((176, 62), (184, 36), (222, 26), (256, 44), (262, 76)):
        middle, high = (x + 222) / 2, min(y, 68) - 8
        upper, lower = [(222, 68), (middle, high - 6), (x, y)], [(222, 76), (middle, high + 8), (x, y)]
        svg.path(between(upper, lower), "#2f7d49")


def _city(svg: Svg) -> None:
    _sky(svg, (0, "#4c5f95"), (0.45, "#d78f86"), (0.75, "#f4c58d"), (1, "#f6d9a8"))
    far = (0, 40, 96), (34, 26, 62), (70, 40, 110), (150, 36, 104), (196, 26, 70), (226, 34, 88)
    near = (-4, 30, 132), (22, 32, 104), (56, 26, 142), (176, 28, 134), (206, 24, 98), (232, 30, 126)
    for x, width, y in far:
        svg.rect(x, y, width, 200, "#8b7d9b")
    for x, width, y in near:
        svg.rect(x, y, width, 160, svg.linear(0, y, 0, 256, (0, "#3b3f60"), (1, "#5a5270")))
        for row in range(3):
            for column in (0.22, 0.62):
                svg.rect(x + column * width, y + 12 + 24 * row, 7, 10, "#ffdd8a", 0.85)


def _forest(svg: Svg) -> None:
    _sky(svg, (0, "#a9cf9a"), (0.5, "#6f9f68"), (1, "#3c6440"))
    svg.glow(128, 40, 130, 100, "#f2f5c8", 0.7)
    trunks = (12, 15), (52, 10), (84, 8), (176, 8), (206, 11), (244, 16)
    crowns = (4, 18, 44), (58, 6, 38), (112, -8, 40), (170, 0, 40), (222, 10, 44), (262, 34, 36), (-6, 70, 26)
    bushes = (8, 218, 40), (66, 230, 36), (196, 228, 38), (250, 214, 42)
    for x, width in trunks:
        bark = svg.linear(x - width / 2, 0, x + width / 2, 0, (0, "#6a4f38"), (1, "#3f2e23"))
        svg.rect(x - width / 2, 20, width, 236, bark)
    for x, y, r in crowns:
        svg.glow(x, y, 1.25 * r, 1.1 * r, "#2f6a3a", 1)
        svg.ellipse(x, y, r, 0.8 * r, "#3d7d45", 0.85)
    for x, y, r in bushes:
        leaves = svg.radial(x, y - r / 2, 1.4 * r, (0, "#4f9150"), (1, "#234a2c"))
        svg.ellipse(x, y, r, 0.8 * r, leaves)


def _desert(svg: Svg) -> None:
    _sky(svg, (0, "#5fa7cf"), (0.4, "#f5d9a4"), (0.7, "#f2b46c"), (1, "#e09a4e"))
    svg.ellipse(208, 46, 22, 22, "#fff2c4")
    far = [(-10, 150), (40, 128), (100, 150), (180, 124), (266, 148)]
    near = [(-10, 176), (50, 190), (128, 168), (210, 184), (266, 164)]
    _ground(svg, far, svg.linear(0, 120, 0, 220, (0, "#dd9a55"), (1, "#c47a3e")))
    _ground(svg, near, svg.linear(0, 165, 0, 256, (0, "#f0bd75"), (1, "#cf8d49")))
    cactus = svg.linear(18, 0, 48, 0, (0, "#5e9a5a"), (1, "#2f6a3f"))
    arms = (24, 84, 18, 116), (2, 112, 12, 38), (8, 138, 24, 12), (48, 98, 12, 40), (36, 126, 22, 12)
    for x, y, width, height in arms:
        svg.body.append(f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{cactus}"/>')


def _library(svg: Svg) -> None:
    svg.cover("#4a3020")
    books = ("#8c3b34", "#3f5f7d", "#b08a45", "#4f6b4a", "#6d4a6b", "#a5623c", "#36505a")
    for row in range(4):
        low = 58 + 62 * row
        svg.rect(0, low - 54, 256, 54, "#33211a")
        for k in range(14):
            x, height = 19 * k - 6 + 7 * (row % 2), 36 + 4 * ((3 * k + 5 * row) % 4)
            colour = books[(2 * k + 3 * row) % len(books)]
            back = svg.linear(x, 0, x + 17, 0, (0, mix(colour, WHITE, 0.18)), (1, mix(colour, BLACK, 0.25)))
            svg.rect(x, low - height, 17, height, back)
        svg.rect(0, low, 256, 8, svg.linear(0, low, 0, low + 8, (0, "#a2754a"), (1, "#6d4a2c")))


def _night(svg: Svg) -> None:
    _sky(svg, (0, "#0e1638"), (0.6, "#27356b"), (1, "#46508a"))
    stars = (20, 30), (48, 84), (30, 140), (76, 20), (14, 190), (240, 120), (226, 168), (150, 10), (110, 8)
    for x, y in stars:
        svg.glow(x, y, 6, 6, "#f2f2ff", 1)
    svg.glow(212, 50, 66, 66, "#dfe6ff", 0.55)
    svg.ellipse(212, 50, 34, 34, svg.radial(204, 42, 44, (0, "#fffdf0"), (1, "#dcd9c0")))
    for x, y, r in ((202, 42, 7), (222, 60, 9), (224, 38, 4)):
        svg.ellipse(x, y, r, r, "#c4c1ab", 0.6)
