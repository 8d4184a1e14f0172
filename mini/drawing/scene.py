"""One picture: its parameters, the colours that follow from them, and the drawing so far."""

from dataclasses import replace

from drawing.choices import HAIR_COLOURS, SKIN_SCALE, STYLES, Edit
from drawing.colours import BLACK, WHITE, Colour, Rgb, luminance, mix
from drawing.people import Identity, Variation
from drawing.svg import Svg

USUAL_EARS = (18, 9.5, 1)  # height, how far out, how far down, as in Identity


class Scene:
    """Holds what every part of one picture is drawn from."""

    def __init__(self, identity: Identity, variation: Variation, edit: Edit | None):
        self.svg = Svg()
        self.id = p = identity
        self.var = variation
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
        hair, _ = HAIR_COLOURS[p.hair]
        self.hair = mix(hair, WHITE if p.hair_shift > 0 else BLACK, 0.14 * abs(p.hair_shift))
        self.brow = mix(mix(self.hair, "#3a2a20", 0.35), BLACK, 0.25 * p.brow_shade)
        self.beard = mix(mix(self.hair, "#3a2a20", 0.30), BLACK, 0.10)
        if edit == Edit.PINK_HAIR:
            self.hair = mix("#d6307f", "#ff9ecb", luminance(self.hair))
        self.skin = _edited_skin(_skin(p), edit)
        self.skin_dark = mix(mix(self.skin, "#5a1c1c", 0.30), BLACK, 0.20)
        self.skin_light = mix(self.skin, "#fff0dd", 0.30)
        if edit == Edit.BLUE_SKIN:  # painted skin is shaded as skin is, and shines
            self.skin_dark = mix(self.skin, "#101a48", 0.50)
            self.skin_light = mix(self.skin, "#e6f4ff", 0.50)
            self.brow = mix(self.brow, "#10152e", 0.65)
        elif edit == Edit.ZOMBIE:
            self.skin_dark = mix(self.skin, "#231c16", 0.48)
            self.skin_light = mix(self.skin, "#eef2d6", 0.45)
            self.brow = mix(self.brow, "#1a1712", 0.5)
        self.lips = _lip_colour(p, self.skin, edit)
        self.light = 24 * self.var.light_side  # x of the face's brightest place


def _skin(p: Identity) -> Rgb:
    place = p.skin_tone * (len(SKIN_SCALE) - 1)
    low = min(int(place), len(SKIN_SCALE) - 2)
    skin = mix(SKIN_SCALE[low], SKIN_SCALE[low + 1], place - low)
    return tuple(c + p.skin_warmth * w for c, w in zip(skin, (5, -1, -8), strict=True))


def _edited_skin(skin: Rgb, edit: Edit | None) -> Rgb:
    """Recolours the skin; some of its lightness stays, so that the person can be recognised."""
    light = luminance(skin)
    if edit == Edit.ZOMBIE:
        return mix("#5c7050", "#b3c49c", light)
    if edit == Edit.BLUE_SKIN:
        return mix("#2a5fa8", "#84c0f0", light)
    if edit == Edit.GOTH:
        return mix(skin, "#ece9ee", 0.62)
    return skin


def _lip_colour(p: Identity, skin: Colour, edit: Edit | None) -> Colour:
    fixed = {
        Edit.GOTH: "#1d1220", Edit.PURPLE_MAKEUP: "#8a24a8", Edit.ZOMBIE: "#5a3f4a", Edit.BLUE_SKIN: "#33306e"
    }  # fmt: skip
    if edit in fixed:
        return fixed[edit]
    return mix(mix(skin, "#a83a42", 0.40 + 0.38 * p.lip_red), BLACK, 0.06)
