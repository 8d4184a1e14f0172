"""Image files, seeds, prompts, working size, and the errors a person at the keyboard can cause."""

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms

import utils
from utils import UserError

ROOT = Path(utils.__file__).resolve().parent
ORIENTATION = ExifTags.Base.Orientation


def random_pixels(height=13, width=21, seed=0, channels=(3,)):
    return np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)


def smooth_pixels(height=48, width=40):
    """What JPEG keeps within a few levels."""
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 4, columns * 5, 255 - rows * 2 - columns], axis=2).astype(np.uint8)


def grey(values):
    return np.stack([values] * 3, axis=-1)


# ---------------------------------------------------------------------------------------------------------
# tensors and 8 bits


def test_round_trip_of_all_values():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels[..., 1] = 255 - pixels[..., 1]
    images = utils.to_tensor(pixels)
    assert images.shape == (1, 3, 16, 16) and images.dtype == torch.float32 and images.is_contiguous()
    assert images.min() == -1 and images.max() == 1
    assert images[0, 0, 8, 0] == pytest.approx(128 / 127.5 - 1, abs=1e-7)
    for dtype in (torch.float32, torch.float64):
        assert np.array_equal(utils.to_uint8(images.to(dtype)), pixels)
    assert torch.equal(utils.to_tensor(pixels[0]), images)


def test_to_uint8_rounds_and_clips():
    values = torch.tensor([-7.0, -1.0, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 1.0, 7.0])
    levels = utils.to_uint8(values.reshape(1, 1, 1, 6).repeat(1, 3, 1, 1))
    assert levels.dtype == np.uint8 and levels[0, 0, :, 2].tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("budget", [0.008, 0.02, 0.03])
@pytest.mark.parametrize("reach", [1, 5], ids=["inside", "beyond"])
def test_saved_png_is_within_the_budget(budget, reach, tmp_path):
    source = random_pixels(seed=int(budget * 1000))
    source[0], source[1] = 0, 255
    noise = torch.rand((1, 3, *source.shape[:2]), generator=torch.Generator().manual_seed(1)) * 2 - 1
    images = (utils.to_tensor(source) + reach * budget * noise).clamp(-1, 1)
    pixels = utils.to_uint8_within(images, source[None], budget)
    utils.save_png(tmp_path / "out.png", pixels[0])
    saved = utils.load_image(tmp_path / "out.png").pixels
    moved = np.abs(saved.astype(int) - source)
    assert 0 < moved.max() * 2 / 255 <= budget
    assert moved.max() == int(budget * 127.5)
    assert utils.linf(saved, source) == pytest.approx(moved.max() * 2 / 255)

    nearest = np.floor((images[0].double().permute(1, 2, 0).numpy() + 1) * 127.5 + 0.5)
    fits = np.abs(nearest - source) * 2 / 255 <= budget
    assert np.array_equal(saved[fits], nearest[fits])
    assert (np.sign(saved.astype(int) - source) == np.sign(nearest - source))[~fits].all()


def test_linf():
    a, b = np.full((4, 4, 3), 250, np.uint8), np.full((4, 4, 3), 250, np.uint8)
    b[1, 2, 0] = 5
    assert utils.linf(a, b) == utils.linf(b, a) == pytest.approx(245 * 2 / 255)
    assert utils.linf(a, a) == 0


# ---------------------------------------------------------------------------------------------------------
# argparse types and help


@pytest.mark.parametrize("text", ["0.0078", "0", "-0.03", "nan", "inf", "-inf", "0.03x", ""])
def test_budget_refused(text):
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        utils.budget_size(text)


@pytest.mark.parametrize(
    ("text", "levels"), [("0.008", 1), ("0.0078431372549019607", 1), ("0.03", 3), ("2", 255)]
)
def test_budget_accepted(text, levels):
    assert utils.budget_size(text) == float(text)
    assert utils.allowed_levels(float(text)) == levels


def test_whole_levels_are_allowed():
    levels = range(1, 256)
    assert [utils.allowed_levels(n * 2 / 255) for n in levels] == list(levels)
    assert [utils.allowed_levels(n / 127.5) for n in levels] == list(levels)
    assert [utils.allowed_levels(n / 255 * 2 - 1e-6) for n in levels] == [n - 1 for n in levels]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (utils.positive_int, ["1", "100"], ["0", "-1", "1.5", "nan"]),
        (utils.positive_float, ["0.1", "1e-9"], ["0", "-1", "nan", "inf"]),
        (utils.non_negative_float, ["0", "7.5"], ["-0.1", "nan", "inf"]),
    ],
)
def test_number_types(kind, good, bad):
    assert [kind(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises((argparse.ArgumentTypeError, ValueError)):
            kind(text)


def test_help_shows_defaults_but_no_none():
    parser = argparse.ArgumentParser(description="one\n    two", formatter_class=utils.HelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="how many")
    parser.add_argument("--resolution", type=int, help="long side (default: full: 512)")
    text = parser.format_help()
    assert "how many (default: 3)" in text and "(default: full: 512)" in text
    assert "None" not in text
    assert "one\n    two" in text


# ---------------------------------------------------------------------------------------------------------
# reading image files


def save(image, path, **options):
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    image.save(path, **options)
    return path


def binary(path):
    values = random_pixels(channels=()) > 127
    return save(Image.fromarray(values), path("png")), grey(values * np.uint8(255)), None


def luminance(path):
    values = random_pixels(channels=())
    return save(values, path("png")), grey(values), None


def palette(path):
    image, colours = _paletted()
    return save(image, path("png")), colours[np.array(image)], None


def palette_with_transparency(path):
    image, colours = _paletted()
    indices = np.array(image)
    alpha = np.where(indices == 0, 0, 255).astype(np.uint8)
    return save(image, path("png"), transparency=0), colours[indices], alpha


def _paletted():
    """An image of four colours, and these: (4, 3)."""
    colours = random_pixels(4, 1, seed=3)[:, 0]
    image = Image.fromarray(random_pixels(channels=()) % 4).convert("P")
    image.putpalette(colours.tobytes())
    return image, colours


def luminance_alpha(path):
    values = random_pixels(channels=(2,))
    return save(Image.fromarray(values), path("png")), grey(values[..., 0]), values[..., 1]


def rgba(path):
    values = random_pixels(channels=(4,))
    values[0, :, 3] = 0  # the colours under full transparency count, too
    return save(values, path("png")), values[..., :3], values[..., 3]


def rgb_colour_key(path):
    values = random_pixels()
    values[3, 4:9] = key = (10, 20, 30)
    alpha = np.where((values == key).all(axis=2), 0, 255).astype(np.uint8)
    return save(values, path("png"), transparency=key), values, alpha


def cmyk_jpeg(path):
    values = smooth_pixels()
    return save(Image.fromarray(values).convert("CMYK"), path("jpg"), quality=95), values, None


def sixteen_bit(suffix):
    def write(path):
        values = np.linspace(0, 65535, 13 * 21).round().astype(np.uint16).reshape(13, 21)
        values[0, :4] = 0, 65535, 32768, 257
        return save(values, path(suffix)), grey(np.floor(values / 257 + 0.5).astype(np.uint8)), None

    return write


def integer_tiff(path):
    values = np.linspace(0, 65535, 13 * 21).astype(np.int32).reshape(13, 21)
    return save(values, path("tif")), grey(np.floor(values / 257 + 0.5).astype(np.uint8)), None


def float_tiff(path):
    levels = (np.arange(13 * 21) % 256).reshape(13, 21).astype(np.uint8)
    return save((levels / 255).astype(np.float32), path("tif")), grey(levels), None


def animated(suffix, **options):
    def write(path):
        first, second = (np.full((13, 21, 3), colour, np.uint8) for colour in ([255, 0, 0], [0, 0, 255]))
        more = [Image.fromarray(second)]
        return save(first, path(suffix), save_all=True, append_images=more, **options), first, None

    return write


KINDS = {
    "1-bit": binary,
    "L": luminance,
    "P": palette,
    "P-transparency": palette_with_transparency,
    "LA": luminance_alpha,
    "RGBA": rgba,
    "RGB-tRNS": rgb_colour_key,
    "CMYK-jpeg": cmyk_jpeg,
    "16-bit-png": sixteen_bit("png"),
    "16-bit-tiff": sixteen_bit("tif"),
    "32-bit-tiff": integer_tiff,
    "float-tiff": float_tiff,
    "animated-gif": animated("gif"),
    "animated-webp": animated("webp", lossless=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_load_image(kind, tmp_path):
    file, pixels, alpha = KINDS[kind](lambda suffix: tmp_path / f"image.{suffix}")
    portrait = utils.load_image(file)
    assert portrait.path == file and portrait.pixels.dtype == np.uint8
    assert portrait.size == utils.image_size(file) == pixels.shape[:2]
    if kind == "CMYK-jpeg":
        assert np.abs(portrait.pixels.astype(int) - pixels).mean() < 4
    else:
        assert np.array_equal(portrait.pixels, pixels)
    assert (portrait.alpha is None) == (alpha is None)

    utils.save_png(tmp_path / "out.png", portrait.pixels, portrait.alpha)
    again = utils.load_image(tmp_path / "out.png")
    assert np.array_equal(again.pixels, portrait.pixels)
    assert alpha is None or np.array_equal(again.alpha, alpha)
    assert (again.alpha is None) == (alpha is None)


def test_sixteen_bits_are_scaled(tmp_path):
    file, _, _ = sixteen_bit("png")(lambda suffix: tmp_path / f"image.{suffix}")
    assert utils.load_image(file).pixels[0, :4, 0].tolist() == [0, 255, 128, 1]


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
    portrait = utils.load_image(file)
    assert np.array_equal(portrait.pixels, UPRIGHT[orientation](stored))
    assert utils.image_size(file) == portrait.size


def icc_profile(swapped, name="sRGB"):
    """littlecms' sRGB; or one whose red is sRGB's green and the other way round. `name` has four letters."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    if swapped:
        for old, new in ((b"rXYZ", b"????"), (b"gXYZ", b"rXYZ"), (b"????", b"gXYZ")):
            assert old in data
            data = data.replace(old, new)
    return data.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_icc_profile_is_converted(mode, tmp_path):
    image, colours = _paletted()
    expected = colours[np.array(image)][..., [1, 0, 2]]
    file = save(image.convert(mode), tmp_path / "a.png", icc_profile=icc_profile(True, "wild"))
    assert np.abs(utils.load_image(file).pixels.astype(int) - expected).max() <= 2


def test_a_profile_that_is_only_called_srgb_is_converted(tmp_path):
    """As linear sRGB is, whose pixels would come out much too dark."""
    pixels = random_pixels()
    file = save(pixels, tmp_path / "a.png", icc_profile=icc_profile(True))
    assert np.abs(utils.load_image(file).pixels.astype(int) - pixels[..., [1, 0, 2]]).max() <= 2


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
    assert np.array_equal(utils.load_image(file).pixels, pixels)


def write_missing(path):
    return path / "missing.png"


def write_directory(path):
    (path / "folder.png").mkdir()
    return path / "folder.png"


def write_text(path):
    (path / "text.png").write_text("This is\nno image.\n")
    return path / "text.png"


def write_empty(path):
    (path / "empty.png").touch()
    return path / "empty.png"


def write_truncated_jpeg(path):
    file = save(random_pixels(64, 64), path / "cut.jpg")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return file


def write_truncated_png(path):
    file = save(random_pixels(64, 64), path / "cut.png")
    file.write_bytes(file.read_bytes()[:1000])
    return file


def write_bright_float(path):
    return save(np.full((8, 8), 300.0, np.float32), path / "bright.tif")


def write_nan_float(path):
    return save(np.full((8, 8), np.nan, np.float32), path / "nan.tif")


def write_deep(path):
    return save(np.full((8, 8), 70000, np.int32), path / "deep.tif")


@pytest.mark.parametrize(
    "write",
    [
        write_missing,
        write_directory,
        write_text,
        write_empty,
        write_truncated_jpeg,
        write_truncated_png,
        write_bright_float,
        write_nan_float,
        write_deep,
    ],
)
def test_unreadable_file(write, tmp_path):
    file = write(tmp_path)
    with pytest.raises(UserError) as caught:
        utils.load_image(file)
    assert str(caught.value).startswith(f"{file}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("write", [write_missing, write_directory, write_text, write_empty])
def test_size_of_an_unreadable_file(write, tmp_path):
    assert utils.image_size(write(tmp_path)) is None


# ---------------------------------------------------------------------------------------------------------
# writing image files


def test_metadata_is_dropped(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Make] = "SecretCamera"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitude] = (48.0, 8.0, 0.0)
    profile = icc_profile(swapped=False)
    source = save(smooth_pixels(), tmp_path / "a.jpg", exif=exif, icc_profile=profile, comment=b"SecretNote")
    with Image.open(source) as image:
        assert image.getexif().get_ifd(ExifTags.IFD.GPSInfo) and b"SecretNote" in source.read_bytes()
    out = tmp_path / "a.png"
    utils.save_png(out, utils.load_image(source).pixels)
    with Image.open(out) as image:
        image.load()
        assert image.info == {} and not image.getexif()
    assert b"Secret" not in out.read_bytes()


def test_save_png_makes_directories(tmp_path):
    pixels = random_pixels()
    utils.save_png(tmp_path / "a" / "b" / "out.png", pixels)
    assert np.array_equal(utils.load_image(tmp_path / "a" / "b" / "out.png").pixels, pixels)
    assert os.listdir(tmp_path / "a" / "b") == ["out.png"]


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize(
    ("error", "shown"),
    [(OSError(28, "No space left on device"), UserError), (KeyboardInterrupt(), KeyboardInterrupt)],
)
def test_failed_write_leaves_nothing(call, error, shown, tmp_path, monkeypatch):
    """Neither half a file nor a temporary one; and an older result stays as it was."""
    out = tmp_path / "out.png"
    out.write_bytes(b"older")

    def fail(*_):
        raise error

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(shown) as caught:
        utils.save_png(out, random_pixels())
    assert os.listdir(tmp_path) == ["out.png"] and out.read_bytes() == b"older"
    assert shown is not UserError or str(caught.value) == f"{out}: can't be written (No space left on device)"


def test_write_is_aside_and_then_renamed(tmp_path, monkeypatch):
    """At the rename the data is whole in another file of the same directory."""
    seen = []
    replace = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((Path(a), Path(a).read_bytes(), Path(b))), replace(a, b))
    )
    out = tmp_path / "out.png"
    utils.write_file(out, b"data")
    ((aside, data, target),) = seen
    assert aside.parent == tmp_path and aside != out and data == b"data" and target == out
    assert os.listdir(tmp_path) == ["out.png"]


def test_write_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="can't be written"):
        utils.save_png(tmp_path / "file" / "out.png", random_pixels())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_write_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't be written"):
        utils.save_png(tmp_path / "out.png", random_pixels())
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("out.jpg", "JPEG compression would destroy"),
        ("out.JPEG", "JPEG compression would destroy"),
        ("out.webp", "written as PNG"),
        ("out", "written as PNG"),
        ("source.png", "overwrite the input"),
        ("link.png", "overwrite the input"),
        ("folder.png", "is a directory"),
        ("source.png/out.png", "is not a directory"),
    ],
)
def test_check_output_refuses(name, reason, tmp_path):
    source = save(random_pixels(), tmp_path / "source.png")
    (tmp_path / "link.png").symlink_to(source)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=reason) as caught:
        utils.check_output(tmp_path / name, source)
    assert str(caught.value).startswith(f"{tmp_path / name.removesuffix('/out.png')}: ")


def test_check_output_asks_for_permission(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(os, "access", lambda path, mode: asked.append((Path(path), mode)))
    with pytest.raises(UserError, match="no permission"):
        utils.check_output(tmp_path / "new" / "deep" / "out.png", tmp_path / "a.png")
    assert asked == [(tmp_path, os.W_OK)]


@pytest.mark.parametrize("name", ["out.png", "out.PNG", "new/out.png", "older.png"])
def test_check_output_accepts(name, tmp_path):
    (tmp_path / "older.png").touch()
    utils.check_output(tmp_path / name, tmp_path / "source.png")
    assert os.listdir(tmp_path) == ["older.png"]


# ---------------------------------------------------------------------------------------------------------
# working size


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
    assert utils.working_size(size, resolution) == expected
    padded = tuple(-(-side // 8) * 8 for side in expected)
    images = torch.zeros(2, 3, *size)
    assert utils.to_working(images, resolution).shape == (2, 3, *padded)
    assert utils.from_working(torch.zeros(2, 3, *padded), size, resolution).shape == images.shape


@pytest.mark.parametrize(("size", "resolution"), [((31, 100), 128), ((100, 31), 512), ((2000, 100), 512)])
def test_too_small(size, resolution):
    with pytest.raises(UserError, match=f"a {size[1]}x{size[0]} image .* under 32 px is too small"):
        utils.working_size(size, resolution)
    with pytest.raises(UserError):
        utils.to_working(torch.zeros(1, 3, *size), resolution)


def test_nothing_happens_to_what_fits():
    images = utils.to_tensor(random_pixels(64, 40))
    assert torch.equal(utils.to_working(images, 64), images)
    assert torch.equal(utils.from_working(images, (64, 40), 64), images)


def test_padding_is_a_reflection_at_the_end():
    images = utils.to_tensor(random_pixels(37, 53))
    working = utils.to_working(images, 128)
    assert torch.equal(working[..., :37, :53], images)
    assert torch.equal(working[..., 37:, :53], images[..., 33:36, :].flip(-2))
    assert torch.equal(working[..., :37, 53:], images[..., 49:52].flip(-1))
    assert torch.equal(utils.from_working(working, (37, 53), 128), images)


def test_resize_has_no_aliases():
    stripes = torch.ones(1, 3, 400, 400)
    stripes[..., ::3] = -1  # mean 1/3, finer than the working size can show
    inner = utils.to_working(stripes, 96)[..., 8:-8, 8:-8]
    assert (inner - 1 / 3).abs().max() < 0.15


def test_round_trip_of_a_smooth_image():
    images = utils.to_tensor(smooth_pixels(60, 40)).repeat_interleave(3, dim=2).repeat_interleave(3, dim=3)
    images = images[..., :131, :101]
    restored = utils.from_working(utils.to_working(images, 96), (131, 101), 96)
    assert restored.shape == images.shape
    assert (restored - images)[..., 4:-4, 4:-4].abs().max() < 0.05


@pytest.mark.parametrize("size", [(37, 53), (200, 131), (300, 300)])
def test_to_working_is_differentiable(size):
    """It is linear: its gradient along any weights reproduces the value; and every pixel has one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand((1, 3, *size), generator=generator, dtype=torch.float64, requires_grad=True)
    working = utils.to_working(images, 128)
    weights = torch.rand(working.shape, generator=generator, dtype=torch.float64)
    value = (weights * working).sum()
    (gradient,) = torch.autograd.grad(value, images)
    assert (gradient > 0).all()
    assert (gradient * images).sum().item() == pytest.approx(value.item(), rel=1e-10)


# ---------------------------------------------------------------------------------------------------------
# seeds, device, dtype


START_SEED = 5880981426054086687  # of (0, "astronaut"); if it changes, no run can be repeated


def test_start_seed():
    assert utils.start_seed(0, "astronaut") == START_SEED
    others = [utils.start_seed(*key) for key in ((1, "astronaut"), (0, "astronaut2"), (0, "hopper"))]
    assert len({START_SEED, *others}) == 4
    assert all(0 <= seed < 2**63 for seed in others)
    torch.Generator().manual_seed(START_SEED)


def test_draw_seed(capsys):
    assert utils.draw_seed(0) == 0 and utils.draw_seed(7) == 7
    assert capsys.readouterr().out == ""
    drawn = [utils.draw_seed(-1) for _ in range(3)]
    assert capsys.readouterr().out == "".join(f"seed: {seed}\n" for seed in drawn)
    assert len(set(drawn)) == 3 and min(drawn) >= 0


def test_device_and_dtype():
    cpu = utils.pick_device("cpu")
    assert cpu.type == "cpu" and utils.pick_device("auto").type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cuda:99", "", "meta:x"):
        with pytest.raises(UserError, match="--device") as caught:
            utils.pick_device(name)
        assert "\n" not in str(caught.value)
    picked = [utils.pick_dtype(name, cpu) for name in utils.DTYPE_NAMES]
    assert picked == [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    assert utils.pick_dtype("auto", torch.device("cuda")) == torch.float16


# ---------------------------------------------------------------------------------------------------------
# prompts


def test_edit_prompts():
    assert list(utils.edit_prompts) == list(range(25))
    assert utils.edit_prompts[0] == "Turn the person's hair pink"
    assert utils.edit_prompts[12] == "Let the person wear a helmet"
    assert utils.edit_prompts[24] == "Let the person stand under the moon"


def test_choose_prompts(tmp_path):
    assert utils.choose_prompts(None, None) == utils.edit_prompts
    assert list(utils.choose_prompts([7, 0, 3, 3], None).items()) == [
        (number, utils.edit_prompts[number]) for number in (0, 3, 7)
    ]
    file = tmp_path / "own.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("  make it blue \n\nLaß es schneien\r\n", encoding=encoding)
        assert utils.choose_prompts(None, file) == {0: "make it blue", 1: "Laß es schneien"}
    assert utils.choose_prompts([1], file) == {1: "Laß es schneien"}


@pytest.mark.parametrize(
    ("content", "numbers", "reason"),
    [
        (b"one\ntwo\n", [0, 2, 5], "--prompts 2,5: only 0 to 1"),
        (b"", None, "no instructions"),
        (b" \n\n", None, "no instructions"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", None, "not a readable text file"),
        (None, None, "not a readable text file"),
    ],
)
def test_prompts_refused(content, numbers, reason, tmp_path):
    file = tmp_path / "prompts.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        utils.choose_prompts(numbers, file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("numbers", [[25], [-1]])
def test_unknown_prompt_number(numbers):
    with pytest.raises(UserError, match=f"--prompts {numbers[0]}: only 0 to 24"):
        utils.choose_prompts(numbers, None)


# ---------------------------------------------------------------------------------------------------------
# scripts


def test_utils_imports_nothing_heavy():
    code = "import sys, utils; print(sorted({'torch', 'numpy', 'PIL', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.png: no such file"), 1, r"error: a\.png: no such file\n"),
        (
            ValueError("two\nlines"),
            1,
            r"error: ValueError at test_utils\.py:\d+: two \(--debug shows all\)\n",
        ),
        (KeyError(), 1, r"error: KeyError at test_utils\.py:\d+: KeyError \(--debug shows all\)\n"),
        (KeyboardInterrupt(), 130, r"stopped\n"),
    ],
)
def test_run_command(error, status, line, capsys):
    def fail(args):
        raise error

    assert utils.run_command(fail, argparse.Namespace(debug=False)) == status
    shown = capsys.readouterr()
    assert shown.out == "" and re.fullmatch(line, shown.err)
    with pytest.raises(type(error)):
        utils.run_command(fail, argparse.Namespace(debug=True))


def test_run_command_passes_the_status_on():
    assert utils.run_command(lambda args: args.status, argparse.Namespace(debug=False, status=0)) == 0


@pytest.mark.parametrize(("size", "resolution"), [((600, 512), 512), ((800, 533), 512), ((700, 700), 512)])
def test_working_images_stay_in_range(size, resolution):
    """The antialiased resize overshoots by a last bit, from which diffusers would guess another range."""
    images = torch.full((1, 3, *size), -1.0)
    images[..., size[0] // 2 :, :] = 1
    working = utils.to_working(images, resolution)
    assert working.min() >= -1 and working.max() <= 1
    back = utils.from_working(working, size, resolution)
    assert back.min() >= -1 and back.max() <= 1
