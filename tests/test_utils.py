"""utils.py: argparse types, prompts, seeds, device and dtype, whole-file writes, and errors in one line."""

import argparse
import os
import re

import pytest

import utils
from utils import UserError


def refusal(kind, text) -> str:
    """What a type of argparse says about a text that it refuses."""
    with pytest.raises(argparse.ArgumentTypeError) as caught:
        kind(text)
    return str(caught.value)


def test_whole_levels_are_allowed():
    levels = range(1, 256)
    assert [utils.allowed_levels(n * 2 / 255) for n in levels] == list(levels)
    assert [utils.allowed_levels(n / 127.5) for n in levels] == list(levels)
    assert [utils.allowed_levels(n / 255 * 2 - 1e-6) for n in levels] == [n - 1 for n in levels]


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (utils.budget_size, {"0.008": 0.008, f"{2 / 255}": 2 / 255, "2": 2}, ["0", "nan", "inf", "", "1x"]),
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


@pytest.mark.parametrize(
    ("text", "advice"),
    [("0.0078", "below 2/255"), ("300", "for 300/255 give 2.35"), ("1e308", "1e+308 in [-1, 1] is")],
)
def test_a_budget_beyond_the_range_is_refused_with_what_to_give(text, advice):
    assert advice in refusal(utils.budget_size, text)


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
