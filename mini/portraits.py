"""Synthetic portraits: the world that every embedded mini model is trained on and tested in.

A portrait is an SVG picture built from parameters and rendered by resvg. `identity` fixes the person
(geometry, skin, eyes, hair, beard); `variation` fixes what a person can change between two photos
(expression, clothes, background, light, pose); `prompt` applies one of the 25 edits to exactly that
picture. An edit depends only on what the source picture shows, so that an editor network can learn it
from pairs. The parts of a portrait are in `drawing/`, one file per part.

Look at eight people, plain, in a second variation and under all 25 edits:

    python mini/portraits.py --sheet portraits.png

Write source pictures into a folder:

    python mini/portraits.py --write data/mini --first 1000000 --count 20

It is a stand-in: nothing measured on it says how well a real photo is protected.
"""

import argparse
import io
import sys
from pathlib import Path

import numpy as np
import resvg_py
from drawing import body, camera, extras, face, hair, head, places
from drawing.choices import BACKGROUNDS, NECKLINES, SKIN_WORDS, STYLES, Edit
from drawing.people import identity_of, variation_of
from drawing.scene import Scene
from drawing.texture import Texture
from PIL import Image, ImageDraw

# Raise it with every change of any pixel of a portrait, source or edit: rendered pictures and latents are
# cached under this number (world.py). The bundled portraits and models then have to be made again.
VERSION = 2

# Who may use which identities. The judge's half is kept apart from everything that it judges.
TRAIN = range(100_000)  # the judge trains on JUDGE, everything else on range(50_000)
JUDGE = range(50_000, 100_000)
VALIDATION = range(100_000, 200_000)
TEST_FROM = 1_000_000  # this identity and all above it: tests, demos and final figures only

ON_SKIN = {
    Edit.TATTOO: extras.tattoo,
    Edit.ZOMBIE: extras.scar,
    Edit.MUSTACHE: extras.mustache,
    Edit.FANGS: extras.fangs,
}
ON_TOP = {
    Edit.ELF_EARS: head.elf_ears,
    Edit.CIGAR: extras.cigar,
    Edit.SUNGLASSES: extras.sunglasses,
    Edit.EARRINGS: extras.earrings,
    Edit.HEADBAND: extras.headband,
    Edit.TIARA: extras.tiara,
    Edit.HELMET: extras.helmet,
}


def draw(identity: int, variation: int = 0, prompt: int | None = None) -> Scene:
    """Draws one picture, from back to front, into the scene's `svg`."""
    edit = None if prompt is None else Edit(prompt)
    s = Scene(identity_of(identity), variation_of(identity, variation), edit)
    svg, v = s.svg, s.var
    place = f"translate({128 + v.shift[0]:.2f} {v.shift[1]:.2f}) translate(0 200) scale({v.scale:.3f})"
    body_place = f"{place} translate(0 -200)"
    head_place = f"{place} rotate({v.tilt:.2f}) translate(0 -200)"  # the head turns about the neck
    places.background(s)
    with svg.group(head_place), svg.of("hair"):
        hair.back(s)
    with svg.group(body_place):
        with svg.of("skin"):
            body.neck(s)
        with svg.of("cloth"):
            body.clothes(s)
    with svg.group(head_place):
        with svg.of("skin"):
            head.ears(s)
            head.head(s)
        face.nose(s)
        head.marks(s)
        with svg.of("thing"):
            face.eyes(s)
        with svg.of("hair" if s.id.beard in ("chin beard", "full beard") else ""):
            face.beard(s)
        with svg.of("thing"):
            face.mouth(s)
        face.brows(s)
        if edit in ON_SKIN:
            with svg.of({Edit.MUSTACHE: "hair", Edit.FANGS: "thing"}.get(edit, "")):
                ON_SKIN[edit](s)
        with svg.of("hair"):
            hair.front(s)
        if edit in ON_TOP:
            with svg.of("skin" if edit == Edit.ELF_EARS else "thing"):
                ON_TOP[edit](s)
    if edit == Edit.BOWTIE:
        with svg.group(body_place), svg.of("cloth"):
            body.bowtie(s)
    if edit == Edit.SNOW:
        places.snowfall(svg)
    return s


def _rendered(svg: str, size: int, mode: str) -> Image.Image:
    data = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return Image.open(io.BytesIO(data)).convert(mode)


def portrait(identity: int, variation: int = 0, prompt: int | None = None, size: int = 128) -> Image.Image:
    """Renders the person as an RGB picture of size x size; with `prompt` (0 to 24), the edited picture."""
    scene = draw(identity, variation, prompt)
    pixels = np.asarray(_rendered(scene.svg.text(), size, "RGB"), np.float32)
    flat = _rendered(scene.svg.flat(), size // 2, "RGBA")  # a quarter of the time, equally soft edges
    regions = np.asarray(flat.convert("RGBa").resize((size, size), Image.Resampling.BILINEAR), np.float32)
    pixels = Texture(scene, identity, variation, size).laid_on(pixels, regions / 255)
    pixels = camera.noise(identity, variation, camera.light(scene.var, pixels))
    return Image.fromarray(camera.jpeg(identity, variation, pixels))


def describe(identity: int, variation: int = 0) -> dict[str, str]:
    """Describes the source picture's visible attributes in plain words, for captions."""
    p, v = identity_of(identity), variation_of(identity, variation)
    skin = SKIN_WORDS[min(int(p.skin_tone * len(SKIN_WORDS)), len(SKIN_WORDS) - 1)]
    pattern = "" if v.pattern == "plain" else v.pattern + " "
    words = {
        "hair": STYLES[p.style].words.format(p.hair),
        "eyes": f"{p.eye_colour} eyes",
        "skin": f"{skin} skin",
        "clothes": f"a {pattern}{v.clothes} {NECKLINES[v.neckline]}",
        "background": BACKGROUNDS[v.background].format(v.background_colour),
        "expression": v.expression,
    }
    if p.beard:
        words["beard"] = p.beard if p.beard == "stubble" else f"a {p.beard}"
    if p.freckles:
        words["freckles"] = "freckles"
    return words


def contact_sheet(first: int, count: int = 8, size: int = 128) -> Image.Image:
    """Draws one row per identity: plain, a second variation, the 25 edits; prompt numbers on top."""
    title = 16  # px, the height of the line of prompt numbers
    columns = [(0, None), (1, None), *((0, int(edit)) for edit in Edit)]
    sheet = Image.new("RGB", (size * len(columns), title + size * count), "white")
    draw = ImageDraw.Draw(sheet)
    for column, (variation, prompt) in enumerate(columns):
        name = str(prompt) if prompt is not None else ("source", "variation")[variation]
        draw.text((size * column + 4, 2), name, fill="black")
        for row in range(count):
            sheet.paste(portrait(first + row, variation, prompt, size), (size * column, title + size * row))
    return sheet


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def main(argv: list[str] | None = None) -> int:
    """Writes a contact sheet or source pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=_HelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--sheet", type=Path, metavar="PNG", help="write a contact sheet of 8 identities here")
    what.add_argument("--write", type=Path, metavar="DIR", help="write portrait_IDENTITY.png files here")
    parser.add_argument("--first", type=int, default=VALIDATION.start, help="first identity")
    parser.add_argument("--count", type=int, default=20, help="how many identities --write writes")
    parser.add_argument("--variation", type=int, default=0, help="which picture of each person to write")
    parser.add_argument("--size", type=int, default=128, help="side of a portrait in pixels")
    args = parser.parse_args(argv)
    if args.sheet:
        contact_sheet(args.first, size=args.size).save(args.sheet)
        print(f"wrote {args.sheet}")
        return 0
    args.write.mkdir(parents=True, exist_ok=True)
    for identity in range(args.first, args.first + args.count):
        portrait(identity, args.variation, size=args.size).save(args.write / f"portrait_{identity}.png")
    print(f"wrote {args.count} portraits to {args.write}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
