"""The pen: splines through points, and a canvas that collects shapes and gradients as SVG text."""

from collections.abc import Iterator
from contextlib import contextmanager

from drawing.colours import Colour

CANVAS = 256  # the drawing's own units; on a person x is measured from the middle line, y from the top

REGIONS = {"skin": "#f00", "hair": "#0f0", "cloth": "#00f", "thing": "#000"}  # in the flat copy

Points = list[tuple[float, float]]


def curve(points: Points, closed: bool = False) -> str:
    """Writes a Catmull-Rom spline through the points as SVG path data."""
    p = [points[-1], *points, points[0], points[1]] if closed else [points[0], *points, points[-1]]
    data = f"{p[1][0]:.1f} {p[1][1]:.1f}"
    for (x0, y0), (x1, y1), (x2, y2), (x3, y3) in zip(p, p[1:], p[2:], p[3:]):
        data += (
            f"C{x1 + (x2 - x0) / 6:.1f} {y1 + (y2 - y0) / 6:.1f}"
            f" {x2 - (x3 - x1) / 6:.1f} {y2 - (y3 - y1) / 6:.1f} {x2:.1f} {y2:.1f}"
        )
    return f"M{data}Z" if closed else data


def between(first: Points, second: Points) -> str:
    """Writes the area between two splines that run from left to right; its corners stay sharp."""
    return f"M{curve(first)}L{curve(second[::-1])}Z"


def mirror(points: Points) -> Points:
    """Continues points, which run from the left to the middle line, on to the right as their mirror image."""
    tail = points[:-1] if points[-1][0] == 0 else points
    return points + [(-x, y) for x, y in tail[::-1]]


def placed(points: Points, side: float, x: float = 0, y: float = 0) -> Points:
    """Moves points to (x, y), as they are on the right side (side 1) or mirrored for the left one (-1)."""
    return [(x + side * a, y + b) for a, b in points]


def _paint(colour: Colour) -> str:
    """Names a colour as SVG does; the url of a gradient stays."""
    if isinstance(colour, str):
        return colour
    return "#" + "".join(f"{round(min(max(c, 0), 255)):02x}" for c in colour)


def _stops(stops: tuple) -> str:
    text = ""
    for offset, colour, *rest in stops:
        opacity = rest[0] if rest else 1
        text += f'<stop offset="{offset}" stop-color="{_paint(colour)}" stop-opacity="{opacity:.3f}"/>'
    return text


class Svg:
    """Collects the picture's elements and the gradients that they use, which are filled in as colours are."""

    def __init__(self):
        self.defs: list[str] = []
        self.body: list[str] = []
        self.outlines: list[str] = []  # the flat copy's elements
        self.region = ""  # the colour there of what is drawn next; empty for what isn't in it

    def _define(self, element: str, attributes: str, content: str) -> str:
        name = f"d{len(self.defs)}"
        self.defs.append(f'<{element} id="{name}" {attributes}>{content}</{element}>')
        return f"url(#{name})"

    def linear(self, x1: float, y1: float, x2: float, y2: float, *stops: tuple) -> str:
        """Makes a gradient in canvas units; a stop is (offset, colour) or (offset, colour, opacity)."""
        where = f'gradientUnits="userSpaceOnUse" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        return self._define("linearGradient", where, _stops(stops))

    def radial(self, cx: float, cy: float, r: float, *stops: tuple) -> str:
        """Makes a round gradient, from the centre outwards."""
        where = f'gradientUnits="userSpaceOnUse" cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}"'
        return self._define("radialGradient", where, _stops(stops))

    def _fill(self, shape: str, fill: Colour, opacity: float) -> None:
        self.body.append(f'<{shape} fill="{_paint(fill)}" fill-opacity="{opacity:.2f}"/>')
        if self.region and opacity > 0.7:
            self.outlines.append(f'<{shape} fill="{self.region}"/>')

    def path(self, data: str, fill: Colour, opacity: float = 1.0) -> None:
        """Fills the area that path data encloses."""
        self._fill(f'path d="{data}"', fill, opacity)

    def stroke(self, points: Points, colour: Colour, width: float, opacity: float = 1.0) -> None:
        """Draws a line through the points."""
        self.body.append(
            f'<path d="M{curve(points)}" fill="none" stroke="{_paint(colour)}" stroke-width="{width:.1f}" '
            f'stroke-opacity="{opacity:.2f}" stroke-linecap="round"/>'
        )

    def ellipse(self, cx: float, cy: float, rx: float, ry: float, fill: Colour, opacity: float = 1.0) -> None:
        """Fills an ellipse."""
        self._fill(f'ellipse cx="{cx:.1f}" cy="{cy:.1f}" rx="{rx:.1f}" ry="{ry:.1f}"', fill, opacity)

    def rect(
        self, x: float, y: float, width: float, height: float, fill: Colour, opacity: float = 1.0
    ) -> None:
        """Fills a rectangle."""
        where = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self._fill(f"rect {where}", fill, opacity)

    def cover(self, fill: Colour, opacity: float = 1.0) -> None:
        """Fills the whole canvas."""
        self.rect(0, 0, CANVAS, CANVAS, fill, opacity)

    def glow(self, cx: float, cy: float, rx: float, ry: float, colour: Colour, opacity: float) -> None:
        """Draws a soft spot, clear at the rim: what a blur would do, at a gradient's price."""
        fill = self._define("radialGradient", "", _stops(((0, colour, opacity), (1, colour, 0))))
        region, self.region = self.region, ""
        self.ellipse(cx, cy, rx, ry, fill)
        self.region = region

    @contextmanager
    def group(self, transform: str = "", inside: str = "") -> Iterator[None]:
        """Moves what is drawn in this context, and clips it to the path data `inside`."""
        attributes = f'transform="{transform}"'
        if inside:
            clip = self._define("clipPath", "", f'<path d="{inside}"/>')
            attributes += f' clip-path="{clip}"'
        self.body.append(f"<g {attributes}>")
        self.outlines.append(f'<g transform="{transform}">')
        region, self.region = self.region, "" if inside else self.region
        yield
        self.region = region
        self.body.append("</g>")
        self.outlines.append("</g>")

    @contextmanager
    def of(self, region: str) -> Iterator[None]:
        """Counts what is drawn in this context to a region, in the flat copy: one of REGIONS, or ""."""
        before, self.region = self.region, REGIONS.get(region, "")
        yield
        self.region = before

    def flat(self) -> str:
        """Writes the flat copy: opaque shapes in their regions' colours, clear where the background is."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CANVAS} {CANVAS}">'
            f"{''.join(self.outlines)}</svg>"
        )

    def text(self) -> str:
        """Writes the picture as an SVG file."""
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {CANVAS} {CANVAS}">'
            f"<defs>{''.join(self.defs)}</defs>{''.join(self.body)}</svg>"
        )
