"""Colours and how they are mixed."""

Rgb = tuple[float, float, float]  # red, green and blue in [0, 255]
Colour = str | Rgb  # a code, "#rrggbb", does as well

BLACK, WHITE = "#000000", "#ffffff"


def rgb(colour: Colour) -> Rgb:
    """Returns red, green and blue of a colour in either form."""
    if isinstance(colour, str):
        return tuple(float(int(colour[i : i + 2], 16)) for i in (1, 3, 5))
    return colour


def mix(a: Colour, b: Colour, t: float) -> Rgb:
    """Mixes two colours, a share of t of the second one."""
    return tuple((1 - t) * x + t * y for x, y in zip(rgb(a), rgb(b), strict=True))


def luminance(colour: Colour) -> float:
    """Returns how light a colour is, in [0, 1]."""
    red, green, blue = rgb(colour)
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255


def brighten(colour: Colour, t: float) -> Rgb:
    """Brightens a colour in its own hue, where mixing with white would grey it."""
    t *= 1.1 - luminance(colour)  # light colours have no room left: they would clip
    return tuple(min(255, c * (1 + t) + 26 * t) for c in rgb(colour))
