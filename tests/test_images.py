"""images.py: image files, 8 bits within the budget, output names, working size."""

import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import ExifTags, Image, ImageCms

import decoding
from decoding import FORMATS, readable_suffixes
from images import (
    choose_output,
    from_working,
    image_size,
    linf,
    load_image,
    save_png,
    to_tensor,
    to_uint8,
    to_uint8_within,
    to_working,
    working_size,
)
from utils import UserError

ORIENTATION = ExifTags.Base.Orientation


def random_pixels(height=13, width=21, seed=0, channels=(3,)):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def smooth_pixels(height=48, width=40):
    """What JPEG keeps within a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4, columns * 5, 255 - rows * 2 - columns], axis=2).astype(np.uint8)


def grey(values):
    return np.stack([values] * 3, axis=-1)


def save(image, path, **options):
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(path, **options)
    return path


def test_round_trip_of_all_values():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels[..., 1] = 255 - pixels[..., 1]
    images = to_tensor(pixels)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() == -1 and images.max() == 1
    assert images[0, 0, 8, 0] == pytest.approx(128 / 127.5 - 1, abs=1e-7)
    for dtype in (torch.float32, torch.float64):
        assert np.array_equal(to_uint8(images.to(dtype)), pixels)
    assert torch.equal(to_tensor(pixels[0]), images)
    between = torch.tensor([-7.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 7.0]).expand(1, 3, 1, 4)
    assert to_uint8(between)[0, 0, :, 2].tolist() == [0, 0, 1, 255]


@pytest.mark.parametrize("budget", [0.008, 0.02, 0.03])
@pytest.mark.parametrize("reach", [1, 5], ids=["inside", "beyond"])
def test_saved_png_is_within_the_budget(budget, reach, tmp_path):
    source = random_pixels(seed=int(budget * 1000))
    source[0], source[1] = 0, 255
    noise = torch.rand((1, 3, *source.shape[:2]), generator=torch.Generator().manual_seed(1)) * 2 - 1
    images = (to_tensor(source) + reach * budget * noise).clamp(-1, 1)
    pixels = to_uint8_within(images, source[None], budget)
    save_png(tmp_path / "out.png", pixels[0])
    saved = load_image(tmp_path / "out.png").pixels
    moved = np.abs(saved.astype(int) - source)
    assert 0 < moved.max() * 2 / 255 <= budget
    assert moved.max() == int(budget * 127.5)
    assert linf(saved, source) == pytest.approx(moved.max() * 2 / 255)
    nearest = np.floor((images[0].double().permute(1, 2, 0).numpy() + 1) * 127.5 + 0.5)
    most = int(budget * 127.5)
    assert np.array_equal(saved, np.clip(nearest, source.astype(int) - most, source.astype(int) + most))


def paletted():
    """An image of four colours, and these: (4, 3)."""
    colours = random_pixels(4, 1, seed=3)[:, 0]
    image = Image.fromarray(random_pixels(channels=()) % 4).convert("P")
    image.putpalette(colours.tobytes())
    return image, colours


def in_a_palette(path):
    image, colours = paletted()
    indices = np.array(image)
    alpha = np.where(indices == 0, 0, 255).astype(np.uint8)
    return save(image, path("png"), transparency=0), colours[indices], alpha


def with_alpha(channels):
    def write(path):
        values = random_pixels(channels=(channels,))
        values[0, :, -1] = 0  # the colours under full transparency count, too
        colours = values[..., :3] if channels == 4 else grey(values[..., 0])
        return save(values, path("png")), colours, values[..., -1]

    return write


def colour_key(path):
    values = random_pixels()
    values[3, 4:9] = key = (10, 20, 30)
    alpha = np.where((values == key).all(axis=2), 0, 255).astype(np.uint8)
    return save(values, path("png"), transparency=key), values, alpha


def in_grey(suffix, of_levels):
    """Writes levels of grey as other numbers: bits, 16 bits, floats."""

    def write(path):
        levels = (np.arange(13 * 21) % 256).reshape(13, 21).astype(np.uint8)
        levels = levels // 128 * np.uint8(255) if of_levels(levels).dtype == bool else levels
        return save(of_levels(levels), path(suffix)), grey(levels), None

    return write


def animated(suffix, **options):
    def write(path):
        first, second = (np.full((13, 21, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))
        more = [Image.fromarray(second)]
        return save(first, path(suffix), save_all=True, append_images=more, **options), first, None

    return write


KINDS = {
    "1-bit": in_grey("png", lambda levels: levels > 127),
    "L": in_grey("png", lambda levels: levels),
    "16-bit-png": in_grey("png", lambda levels: levels * np.uint16(257)),
    "16-bit-tiff": in_grey("tif", lambda levels: levels * np.uint16(257)),
    "32-bit-tiff": in_grey("tif", lambda levels: levels * np.int32(257)),
    "float-tiff": in_grey("tif", lambda levels: (levels / 255).astype(np.float32)),
    "P": in_a_palette,
    "LA": with_alpha(2),
    "RGBA": with_alpha(4),
    "RGB-tRNS": colour_key,
    "animated-gif": animated("gif"),
    "animated-webp": animated("webp", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_load_image(kind, tmp_path):
    """And what is written of it is read back as the same."""
    file, pixels, alpha = KINDS[kind](lambda suffix: tmp_path / f"image.{suffix}")
    portrait = load_image(file)
    assert portrait.path == file and portrait.size == image_size(file) == pixels.shape[:2]
    save_png(tmp_path / "out.png", portrait.pixels, portrait.alpha)
    for one in (portrait, load_image(tmp_path / "out.png")):
        assert one.pixels.dtype == np.uint8 and np.array_equal(one.pixels, pixels)
        assert one.alpha is None if alpha is None else np.array_equal(one.alpha, alpha)


@pytest.mark.parametrize(("mode", "options"), [("CMYK", {}), ("RGB", {"format": "MPO", "save_all": True})])
def test_jpegs_of_printers_and_phones_are_read(mode, options, tmp_path):
    """Of a phone's double picture (MPO) the first."""
    pixels = smooth_pixels()
    more = {"append_images": [Image.new("RGB", (40, 48))]} if options else {}
    file = save(Image.fromarray(pixels).convert(mode), tmp_path / "a.jpg", quality=95, **options, **more)
    assert np.abs(load_image(file).pixels.astype(int) - pixels).mean() < 4


UPRIGHT = {  # EXIF orientation -> what makes the stored pixels upright
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, 2),
    6: lambda stored: stored[::-1].transpose(1, 0, 2),  # a quarter turn clockwise
    7: lambda stored: stored[::-1, ::-1].transpose(1, 0, 2),
    8: lambda stored: stored[:, ::-1].transpose(1, 0, 2),
    9: lambda stored: stored,  # there is no such orientation
}


@pytest.mark.parametrize("suffix", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_exif_orientation(orientation, suffix, tmp_path):
    stored, exif = random_pixels(), Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    file = save(stored, tmp_path / f"turned.{suffix}", exif=exif, **options)
    if suffix == "jpg":
        stored = np.array(Image.open(file))
    portrait = load_image(file)
    assert np.array_equal(portrait.pixels, UPRIGHT[orientation](stored))
    assert image_size(file) == portrait.size


def icc_profile(swapped, name="sRGB"):
    """littlecms' sRGB; or one whose red is sRGB's green and the other way round. `name` has four letters."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:
        for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
            assert old in data
            data = data.replace(old, new)
    return data.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))


@pytest.mark.parametrize(
    ("mode", "name"), [("RGB", "wild"), ("P", "wild"), ("RGBA", "wild"), ("RGB", "sRGB")]
)
def test_icc_profile_is_converted(mode, name, tmp_path):
    """Also one that is only called sRGB, as linear sRGB is, whose pixels would come out much too dark."""
    image, colours = paletted()
    expected = colours[np.array(image)][..., [1, 0, 2]]
    file = save(image.convert(mode), tmp_path / "a.png", icc_profile=icc_profile(True, name))
    assert np.abs(load_image(file).pixels.astype(int) - expected).max() <= 2


def almost_srgb():
    """Another maker's sRGB: a green that is a two-thousandth off, which moves pixels by a level."""
    data = bytearray(icc_profile(False))
    entry = data.index(b"gXYZ") + 4
    place = int.from_bytes(data[entry : entry + 4], "big") + 12  # of Y, after type, reserved and X
    value = int.from_bytes(data[place : place + 4], "big")
    data[place : place + 4] = (value - value // 2000).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("profile", [almost_srgb(), b"not a profile", icc_profile(True, "wild")[:200]])
def test_srgb_or_broken_icc_profile_changes_nothing(profile, tmp_path):
    pixels = random_pixels()
    file = save(pixels, tmp_path / "a.png", icc_profile=profile)
    assert np.array_equal(load_image(file).pixels, pixels)


def cut_off(path, data):
    path.write_bytes(data)
    return path


UNREADABLE = {
    "empty.png": lambda path: cut_off(path, b""),
    "cut.jpg": lambda path: cut_off(path, save(random_pixels(64, 64), path).read_bytes()[:1500]),
    "cut.png": lambda path: cut_off(path, save(random_pixels(64, 64), path).read_bytes()[:1000]),
    "bright.tif": lambda path: save(np.full((8, 8), 300.0, np.float32), path),
    "nan.tif": lambda path: save(np.full((8, 8), np.nan, np.float32), path),
    "deep.tif": lambda path: save(np.full((8, 8), 70000, np.int32), path),
}


@pytest.mark.parametrize("name", UNREADABLE, ids=lambda name: name[-10:])
def test_an_unreadable_file_is_one_line(name, tmp_path):
    file = UNREADABLE[name](tmp_path / name)
    with pytest.raises(UserError) as caught:
        load_image(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)
    assert image_size(file) is None or file.suffix in (".jpg", ".tif")


def write_png16(path, values, transparent=None):
    """A 16-bit PNG of (H, W, channels), which Pillow doesn't write; `transparent`: a tRNS value."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour, 0, 0, 0))
        + (b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent)))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    return path


def deep(channels, seed=0):
    return np.random.default_rng(seed).integers(0, 65536, (13, 21, channels), dtype=np.uint16)


def deep_tiff(photometric, **options):
    def write(path):
        values = deep({"rgb": 3, "separated": 4}.get(photometric, 1)).squeeze()
        if options.get("planarconfig") == "separate":
            values = values.transpose(2, 0, 1)
        tifffile.imwrite(path.with_suffix(".tif"), values, photometric=photometric, **options)
        return path.with_suffix(".tif")

    return write


CUT = {  # what Pillow would cut to its high byte, or misread
    "rgb": lambda path: write_png16(path, deep(3)),
    "rgba": lambda path: write_png16(path, deep(4)),
    "grey-alpha": lambda path: write_png16(path, deep(2)),
    "grey-with-a-transparent-colour": lambda path: write_png16(path, deep(1), transparent=300),
    "tiff": deep_tiff("rgb"),
    "tiff-big-endian": deep_tiff("rgb", byteorder=">"),
    "tiff-compressed": deep_tiff("rgb", compression="zlib"),
    "tiff-planes": deep_tiff("rgb", planarconfig="separate"),
    "tiff-cmyk": deep_tiff("separated"),
    "tiff-white-is-zero": deep_tiff("miniswhite"),
}


@pytest.mark.parametrize("kind", CUT)
def test_sixteen_bits_that_would_be_cut_are_refused(kind, tmp_path):
    file = CUT[kind](tmp_path / "deep.png")
    with pytest.raises(UserError, match="16 bits per channel are read in plain greyscale only") as caught:
        load_image(file)
    assert str(caught.value).startswith(f"{file}: ")


def test_sixteen_bit_grey_of_any_writer_is_scaled(tmp_path):
    values = deep(1)
    expected = np.round(values / 257).astype(np.uint8)
    tifffile.imwrite(tmp_path / "a.tif", values[..., 0], photometric="minisblack", compression="zlib")
    (tmp_path / "a.pgm").write_bytes(b"P5 21 13 65535\n" + values.astype(">u2").tobytes())
    for file in (write_png16(tmp_path / "a.png", values), tmp_path / "a.tif", tmp_path / "a.pgm"):
        assert np.array_equal(load_image(file).pixels, expected.repeat(3, axis=2)), file
    colour = deep(3)  # Pillow cuts PNG and TIFF, but scales PPM
    (tmp_path / "a.ppm").write_bytes(b"P6 21 13 65535\n" + colour.astype(">u2").tobytes())
    assert np.abs(load_image(tmp_path / "a.ppm").pixels - colour / 257).max() <= 0.5


def test_a_postscript_file_starts_nothing(tmp_path, monkeypatch):
    """Pillow would hand it to Ghostscript, whatever its suffix."""
    (tmp_path / "a.png").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n%%EOF\n"
    )
    with Image.open(tmp_path / "a.png") as image:
        assert image.format == "EPS"  # the bait works
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("a process was started"))
    with pytest.raises(UserError, match="not a readable image"):
        load_image(tmp_path / "a.png")
    assert image_size(tmp_path / "a.png") is None


def test_a_file_is_read_whatever_its_suffix(tmp_path):
    pixels = random_pixels()
    for suffix in (".jpg", ".tif", ".xyz"):
        file = shutil.copy(save(pixels, tmp_path / "a.png"), tmp_path / f"b{suffix}")
        assert np.array_equal(load_image(file).pixels, pixels)


def test_heic_is_read_with_its_plugin_and_named_without(tmp_path, monkeypatch):
    """The plugin itself is not installed here: one that registers an opener stands in."""

    class plugin:
        @staticmethod
        def register_heif_opener():
            Image.register_open("HEIF", Image.OPEN["PNG"][0], lambda prefix: prefix.startswith(b"\x89PNG"))

    pixels = random_pixels()
    file = shutil.move(save(pixels, tmp_path / "a.png"), tmp_path / "a.heic")
    monkeypatch.setattr(decoding.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="a.heic: HEIC is read once pillow-heif is installed"):
        load_image(file)
    assert ".heic" not in readable_suffixes() and set(FORMATS) == set(readable_suffixes())
    monkeypatch.setattr(decoding.util, "find_spec", lambda name: name == "pillow_heif")
    monkeypatch.setitem(sys.modules, "pillow_heif", plugin)
    assert np.array_equal(load_image(file).pixels, pixels)
    assert {".heic", ".heif"} < set(readable_suffixes())
    Image.OPEN.pop("HEIF")
    Image.ID.remove("HEIF")


def test_metadata_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SecretCamera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    profile = icc_profile(swapped=False)
    source = save(smooth_pixels(), tmp_path / "a.jpg", exif=exif, icc_profile=profile, comment=b"SecretNote")
    with Image.open(source) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo) and b"SecretNote" in source.read_bytes()
    out = tmp_path / "a.png"
    save_png(out, load_image(source).pixels)
    with Image.open(out) as image:
        image.load()
        assert image.info == {} and not image.getexif()
    assert b"Secret" not in out.read_bytes()


def choose(source):
    return choose_output(None, source, "protected", "would destroy the perturbation")


def test_choose_output_takes_the_next_free_name_and_says_it(tmp_path, capsys):
    """Of a.png and a.jpg, and again; a broken link has its name, too."""
    assert choose(tmp_path / "a.png") == tmp_path / "protected_a.png"
    assert capsys.readouterr().out == ""
    (tmp_path / "protected_a.png").touch()
    (tmp_path / "protected_a_2.png").symlink_to(tmp_path / "nowhere")
    assert choose(tmp_path / "a.jpg") == tmp_path / "protected_a_3.png"
    assert "protected_a_3.png: the next free name" in capsys.readouterr().out
    for name in (tmp_path / ("x" * 251 + ".png"), Path(".")):
        with pytest.raises(UserError, match="can't be an output's name"):
            choose(name)


@pytest.mark.parametrize(
    ("size", "resolution", "expected"),
    [
        ((128, 128), 128, (128, 128)),
        ((1000, 500), 512, (512, 256)),
        ((500, 1000), 512, (256, 512)),
        ((200, 131), 128, (128, 84)),
        ((37, 53), 128, (37, 53)),
        ((32, 32), 512, (32, 32)),
    ],
)
def test_working_size(size, resolution, expected):
    assert working_size(size, resolution) == expected
    padded = tuple(-(-side // 8) * 8 for side in expected)
    images = torch.zeros(2, 3, *size)
    assert to_working(images, resolution).shape == (2, 3, *padded)
    assert from_working(torch.zeros(2, 3, *padded), size, resolution).shape == images.shape


@pytest.mark.parametrize(("size", "resolution"), [((31, 100), 128), ((100, 31), 512), ((2000, 100), 512)])
def test_a_small_image_is_named(size, resolution, tmp_path):
    file = save(random_pixels(*size), tmp_path / "a.png")
    with pytest.raises(UserError, match=f"a.png: a {size[1]}x{size[0]} image .* under 32 px is too small"):
        load_image(file, resolution)
    with pytest.raises(UserError):
        to_working(torch.zeros(1, 3, *size), resolution)


def test_padding_is_a_reflection_at_the_end():
    images = to_tensor(random_pixels(37, 53))
    working = to_working(images, 128)
    assert torch.equal(working[..., :37, :53], images)
    assert torch.equal(working[..., 37:, :53], images[..., 33:36, :].flip(-2))
    assert torch.equal(working[..., :37, 53:], images[..., 49:52].flip(-1))
    assert torch.equal(from_working(working, (37, 53), 128), images)


def test_resize_has_no_aliases():
    stripes = torch.ones(1, 3, 400, 400)
    stripes[..., ::3] = -1  # mean 1/3, finer than the working size can show
    inner = to_working(stripes, 96)[..., 8:-8, 8:-8]
    assert (inner - 1 / 3).abs().max() < 0.15


@pytest.mark.parametrize(("size", "resolution"), [((600, 512), 512), ((800, 533), 512), ((700, 700), 512)])
def test_working_images_stay_in_range(size, resolution):
    """The antialiased resize overshoots by a last bit, from which diffusers would guess another range."""
    images = torch.full((1, 3, *size), -1.0)
    images[..., size[0] // 2 :, :] = 1
    working = to_working(images, resolution)
    assert working.min() >= -1 and working.max() <= 1
    back = from_working(working, size, resolution)
    assert back.min() >= -1 and back.max() <= 1
