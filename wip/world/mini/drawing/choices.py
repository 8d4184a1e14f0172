"""What there is to choose from: the 25 edits; skin, hair and eyes; clothes, backgrounds and expressions."""

from dataclasses import dataclass
from enum import IntEnum


class Edit(IntEnum):
    """Names the 25 edits; the value is the prompt's number."""

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


# From dark to light
SKIN_SCALE = ("#5c3928", "#78492f", "#925d3a", "#b57f54", "#d39f74", "#e6b992", "#f3cfb3", "#f9e0d0")
SKIN_WORDS = ("dark brown", "brown", "tan", "olive", "light", "fair", "pale")

# The colour and its weight in the draw
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
    """Describes a cut. `top`, `side`: how far the hair stands off the skull. `hairline`: its inner edge.
    `fall`: where it ends."""

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
    "peach": "#e2bfa4", "lavender": "#b9b1d0", "teal": "#7ea9ab", "brown": "#a58d78", "slate": "#74808f",
    "mustard": "#cdb277", "rose": "#cfa5a8", "cream": "#e8e0cf",
}  # fmt: skip
BACKGROUNDS = {
    "plain": "a plain {} wall", "glow": "a softly lit {} backdrop", "panel": "a {} wall with a panel",
    "window": "a {} room with a window", "picture": "a {} room with a picture", "curtain": "a {} curtain",
    "lights": "blurred lights on {}", "diagonal": "a two-tone {} backdrop",
}  # fmt: skip
EXPRESSIONS = ("neutral", "smiling", "smiling broadly", "open-mouthed", "surprised", "serious")
