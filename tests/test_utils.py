"""utils.py: argparse types, prompts, seeds, device and dtype, whole-file writes, and errors in one line."""

import argparse
import os
import re
from pathlib import Path

import pytest
import torch

import utils
from utils import UserError

ROOT = Path(utils.__file__).resolve().parent


# ---------------------------------------------------------------------------------------------------------
# argparse types and help


def refusal(kind, text) -> str:
    """What a type of argparse says about a text that it refuses."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        *((text, "") for text in ("0.0078", "0", "-0.03", "nan", "inf", "-inf", "0.03x", "", "2.01")),
        ("8", "8 is above 2, the whole range. 8 in [-1, 1] is 1020/255; for 8/255 give 0.0627"),
        ("300", "for 300/255 give 2.35"),
        ("1e308", "1e+308 in [-1, 1] is"),
    ],
)
def test_budget_refused(text, advice):
    """With what to give, where levels seem to be meant."""
    told = refusal(utils.budget_size, text)
    assert text in told and advice in told


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
        (utils.natural_number, {"0": 0, "100": 100}, ["-1", "1.5", "nan", "", "one"]),
        (utils.positive_int, {"1": 1}, ["0", "-1", "1.5", "nan"]),
        (utils.positive_float, {"0.1": 0.1, "1e-9": 1e-9}, ["0", "-1", "nan", "inf", "0.1x", "1e-320"]),
        (utils.non_negative_float, {"0": 0, "7.5": 7.5}, ["-0.1", "nan", "inf"]),
        (utils.at_least_one, {"1": 1, "1.5": 1.5}, ["0.99", "nan", "inf"]),
        (utils.share, {"1": 1, "0.01": 0.01}, ["0", "1.01", "nan"]),
        (utils.seed_number, {"-1": -1, str(2**63 - 1): 2**63 - 1}, ["-2", str(2**63), "1.0"]),
        (utils.known_seed, {"0": 0, str(2**63 - 1): 2**63 - 1}, ["-1", str(2**63)]),
        (utils.number_list, {"0,3, 7": [0, 3, 7]}, ["", "0,", "a", "1.5"]),
    ],
)
def test_number_types(kind, good, bad):
    assert {text: kind(text) for text in good} == good
    for text in bad:
        assert refusal(kind, text).startswith(f"{text!r} is not a ")


# ---------------------------------------------------------------------------------------------------------
# prompts


def test_choose_prompts(tmp_path):
    assert utils.choose_prompts(None, None) == utils.edit_prompts
    assert list(utils.choose_prompts([7, 0, 3, 3], None).items()) == [
        (number, utils.edit_prompts[number]) for number in (0, 3, 7)
    ]
    file = tmp_path / "own.txt"
    for encoding in ("utf-8", "utf-8-sig"):
        file.write_text("  make it blue \n\nLaß es schneien\r\n", encoding=encoding)
        assert utils.choose_prompts(None, file) == {0: "make it blue", 2: "Laß es schneien"}
    assert utils.choose_prompts([2], file) == {2: "Laß es schneien"}
    with pytest.raises(UserError, match="--prompts 1: choose from 0, 2"):
        utils.choose_prompts([1], file)  # the blank line


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"one\ntwo\n", "--prompts 2,5: choose from 0 to 1"),
        (b"", "no instructions"),
        (b" \n\n", "no instructions"),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", "not a readable text file"),
    ],
)
def test_prompts_refused(content, reason, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(UserError, match=reason) as caught:
        utils.choose_prompts([0, 2, 5], tmp_path / "prompts.txt")
    assert "\n" not in str(caught.value)


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
    for name in ("gpu", "cuda:99", "", "meta:x", *(["mps"] if not torch.backends.mps.is_available() else [])):
        with pytest.raises(UserError, match="--device") as caught:
            utils.pick_device(name)
        assert "\n" not in str(caught.value)
    picked = [utils.pick_dtype(name, cpu) for name in utils.DTYPE_NAMES]
    assert picked == [torch.float32, torch.float32, torch.float16, torch.bfloat16]
    assert utils.pick_dtype("auto", torch.device("cuda")) == torch.float16


# ---------------------------------------------------------------------------------------------------------
# whole-file writes


def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    """Neither half a file nor a temporary one; and an older result stays as it was. See test_a_full_disk."""
    out = tmp_path / "out.png"
    out.write_bytes(b"older")

    def interrupt(*_):
        raise KeyboardInterrupt

    for call in ("replace", "fsync"):
        monkeypatch.setattr(os, call, interrupt)
        with pytest.raises(KeyboardInterrupt):
            utils.write_file(out, b"newer")
        assert os.listdir(tmp_path) == ["out.png"] and out.read_bytes() == b"older"


def test_a_link_is_replaced_and_its_target_stays(tmp_path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    utils.write_file(tmp_path / "link", b"data")
    assert (tmp_path / "target").read_text() == "precious"
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_bytes() == b"data"


def test_a_device_is_written_through(tmp_path):
    """As root, a rename would put a file in its place."""
    (tmp_path / "null").symlink_to(os.devnull)
    utils.write_file(tmp_path / "null", b"data")
    assert (tmp_path / "null").is_symlink() and not Path(os.devnull).is_file()
    assert os.listdir(tmp_path) == ["null"]


def test_a_directory_is_not_written_into(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="out: can't be written"):
        utils.write_file(tmp_path / "out", b"data")
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").is_dir()


# ---------------------------------------------------------------------------------------------------------
# scripts


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a.png: no such file"), 1, r"error: a\.png: no such file\n"),
        (ValueError("two\nlines"), 1, r"error: ValueError at test_utils\.py:\d+: two \(--debug .*\n"),
        (PermissionError(13, "not yours", "a"), 1, r"error: a: can't be used \(not yours\)\n"),
        (KeyError(), 1, r"error: KeyError at test_utils\.py:\d+: KeyError \(--debug .*\n"),
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


def test_control_characters_are_shown_as_escapes(capsys):
    """In what a file's or a prompt's name could make of the terminal."""

    def fail(args):
        raise UserError("a\x1b[2Jb\nc\u202e.png: no such file")

    assert utils.run_command(fail, argparse.Namespace(debug=False)) == 1
    assert capsys.readouterr().err == "error: a\\x1b[2Jb\\nc\\u202e.png: no such file\n"
    utils.warn("x\ry")
    assert capsys.readouterr().err == "warning: x\\ry\n"
    assert utils.one_line("Laß ü 人") == "Laß ü 人"
    assert utils.one_line(os.fsdecode(b"\xe9")) == "\\udce9"  # a terminal can't show it
