"""What a person, or a disk, can put before the scripts: files of others, odd texts, numbers and models."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio

import defend
import edit
import experiment
import images
import main_defend
import main_edit
import runs
import utils
from evaluation import figure, purify, report, tables
from methods import METHODS
from models.loading import ROOT, loading
from models.recognizers import load_recognizer
from utils import UserError


def only_error(capsys, *parts: str) -> str:
    """The one line that a script said, with these parts in it and nothing of Python's."""
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: "), out + err
    assert all(part in lines[0] for part in parts), lines[0]
    assert ".py:" not in lines[0] and "Traceback" not in err, err
    return lines[0]


TABLE = b"method,accuracy\nmine,0.9\n"
MARKED = b"\x89PNG\r\n\x1a\n of Matplotlib"  # as a figure of somebody else's begins


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("protected/encoder/budget_0.03/report.csv", b"name,method\na,mine\n"),
        ("protected/encoder/budget_0.03/run.json", b'{"arguments": {"lr": 0.1}}'),
        ("protected/encoder/budget_0.03/manifest.jsonl", b'{"audio": "a.wav"}\n'),
        ("protected/encoder/budget_0.03/manifest.7 on box.jsonl", b'{"audio": "a.wav"}\n'),
        ("edits/clean/seed0/run.json", b'{"arguments": {}, "versions": {"python": "3"}}'),
        ("all_metric.csv", TABLE),
        ("all_metric.md", b"4 images, 1 prompts, seed 0: my notes\n"),
        ("all_metric_protected.csv", TABLE),
        ("per_image.csv", TABLE),
        ("figure.png", MARKED),
        ("report.html", b'<meta name="generator" content="FaceLock report">mine'),
    ],
)
def test_files_of_others_are_refused_before_the_work(tmp_path, defend_flags, capsys, name, content):
    tiny.write_portraits(tmp_path / "in", 1)
    path = tmp_path / "out" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    flags = f"--image_dir {tmp_path}/in --output_dir {tmp_path}/out --methods encoder --prompts 0".split()
    for more in ([], ["--overwrite"]):
        assert experiment.main([*defend_flags, *flags, *more]) == 1
        assert str(path) in only_error(capsys)
    assert path.read_bytes() == content
    assert [one for one in (tmp_path / "out").rglob("*") if one.is_file()] == [path]


@pytest.mark.parametrize("name", ["manifest.train.jsonl", ".lock", "manifest.1.jsonl"])
def test_files_of_others_with_like_names_stay(tmp_path, defend_flags, name):
    tiny.write_portraits(tmp_path / "in", 1)
    path = tmp_path / "out/budget_0.03" / name
    path.parent.mkdir(parents=True)
    path.write_text('{"output": "face0.png", "sha256": "mine"}\n')
    flags = f"--image_dir {tmp_path}/in --output_dir {tmp_path}/out --defend_method noise".split()
    assert main_defend.main([*defend_flags, *flags]) == 0 == main_defend.main([*defend_flags, *flags])
    assert path.read_text() == '{"output": "face0.png", "sha256": "mine"}\n'


def test_a_file_is_ours_as_it_was_written_and_where(tmp_path):
    path = tmp_path / "all_metric.csv"
    for content in (b"method,psnr\n", b"method,ssim\n"):  # an earlier run's is replaced
        utils.check_own(path)
        utils.write_own(path, content)
    assert path.read_bytes() == content and utils.INDEX in {one.name for one in tmp_path.iterdir()}
    other = path.rename(tmp_path / "kept.csv")  # put aside under another name
    with pytest.raises(UserError, match="kept.csv: exists and was not made by this script"):
        utils.check_own(other)
    path.write_bytes(content + b"a,note\n")  # worked on by hand
    with pytest.raises(UserError, match="all_metric.csv: exists and was not made by this script"):
        utils.check_own(path)


def test_an_index_that_is_a_link_is_not_followed(tmp_path):
    (tmp_path / "precious").write_text("precious")
    (tmp_path / utils.INDEX).symlink_to(tmp_path / "precious")
    with pytest.raises(UserError, match="is not a plain file"):
        utils.write_own(tmp_path / "a.csv", b"a")
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "a.csv").exists()


def test_run_json_of_an_earlier_version_is_still_ours(tmp_path):
    record = {"arguments": {}, "versions": {"python": "3.11", "diffusers": "0.30", "facenet-pytorch": "2.6"}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    runs.check_ours(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps(record | {"versions": {"python": "3.11"}}))
    with pytest.raises(UserError, match="run.json: exists and was not made by this script"):
        runs.check_ours(tmp_path)


def test_a_figure_or_report_that_fails_never_costs_the_tables(tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise ValueError("no font\nhas this")

    monkeypatch.setattr(experiment.report, "make_report", fail)
    assert experiment.beside(lambda: experiment.report.make_report(1)) == 1
    assert only_error(capsys) == "error: not drawn: ValueError: no font"
    assert experiment.beside(lambda: None) == 0


def test_names_survive_a_table(tmp_path):
    """Of what a spreadsheet would take for formulas, of what looks like their escapes, and without a text."""
    names = ["=x", "'=x", "''=x", "'x", "-", "'-", "x", "'", os.fsdecode(b"n\xe9"), "@", "a\tb"]
    assert len({*map(utils.csv_name, names)}) == len(names)
    assert [utils.name_of_csv(utils.csv_name(name)) for name in names] == names
    table = pd.DataFrame({"method": names, "name": names, "psnr": 1.0})
    tables.write_csv(tmp_path / "t.csv", table)
    read = tables.read_csv(tmp_path / "t.csv")
    assert read["method"].tolist() == names == read["name"].tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every file name is a text")
def test_a_folder_whose_name_is_no_text_takes_its_own_tables(tmp_path, edit_flags, defend_flags, capsys):
    """The whole experiment, and again; with a picture of such a name."""
    tiny.write_portraits(tmp_path / "in", 1)
    (tmp_path / "in/face0.png").rename(tmp_path / os.fsdecode(b"in/face\xe9.png"))
    flags = f"--image_dir {tmp_path}/in --methods noise --prompts 0 --num_inference_steps 1".split()
    flags += ["--output_dir", os.fsdecode(bytes(tmp_path) + b"/out\xff"), "--check"]
    for _ in range(2):
        assert experiment.main([*defend_flags, *flags]) in (0, 1)  # no face is found in it
    out, err = capsys.readouterr()
    assert out.count(": 1 written, 0 there") == out.count(": 0 written, 1 there") == 3, out
    place = tmp_path / os.fsdecode(b"out\xff")
    assert "error" not in err and (place / "report.html").exists() and (place / "figure.png").exists(), err


# ---------------------------------------------------------------------------------------------------------
# records, numbers, places


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"arguments": ' + "{" * 100_000,
        '{"arguments": []}',
        '{"arguments": {}, "prompts": {"0": null}}',
        '{"arguments": {}, "prompts": {"' + "9" * 5000 + '": "x"}}',
        '{"arguments": {}, "seed": ' + "9" * 5000 + "}",
        '{"arguments": {}, "versions": {"torch": []}}',
        '{"arguments": {}, "later_versions": {}}',
        '{"arguments": {}, "later_versions": [3]}',
        '{"arguments": {}, "sources": 3}',
        "3",
        "\udcff",
    ],
)
def test_a_damaged_record_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"run\.json: not a record of a run \(.{3,100}\)$"):
        runs.read_record(tmp_path)


def test_a_damaged_line_of_a_manifest_counts_as_absent(tmp_path):
    good = {"output": "a.png", "source": "1", "sha256": "2", "bytes": 3}
    bad = [good | {key: value} for key in [*good][1:] for value in (None, [], {}, 2.5)]
    bad += [{key: value for key, value in good.items() if key != lacking} for lacking in ("source", "bytes")]
    lines = [json.dumps(line | {"output": "b.png"}) for line in bad]
    lines += [json.dumps(good | {"output": value}) for value in (None, [], {}, 2.5)]
    lines += ["[" * 100_000, "[]", "3", "null", '{"output": ' + "9" * 5000 + "}", '"output"']
    (tmp_path / "manifest.jsonl").write_text("\n".join([*lines, json.dumps(good), ""]))
    assert runs.read_manifest(tmp_path) == {"a.png": good}


@pytest.mark.parametrize("number", ["inf", "-inf", "1e308", "9" * 5000, "0.5"])  # outside of its interval
def test_numbers_that_no_axis_shows_are_refused(tmp_path, capsys, number):
    path = tmp_path / "all_metric.csv"
    path.write_text(f"method,psnr,psnr_low,psnr_high,psnr_n\nclean,{number},1,2,5\na/budget_0.1,1,1,2,5\n")
    if len(number) < 9 and number != "0.5":  # else it is a text, which counts as absent
        assert report.main(["--experiment_dir", str(tmp_path), "--output", str(tmp_path / "r.html")]) == 1
        only_error(capsys, str(path))
    flags = ["--tables", str(path), "--metric", "psnr", "--output", str(tmp_path / "p.png")]
    assert figure.main(["plot", *flags]) == 1
    only_error(capsys, str(path))
    assert [one.name for one in tmp_path.iterdir()] == ["all_metric.csv"]


def test_values_that_belong_to_no_edit_are_one_line(tmp_path):
    path = tmp_path / "per_image.csv"
    path.write_text("method,seed,prompt,name,psnr\na,O,0,x,20\n")  # a letter for a seed
    with pytest.raises(UserError, match="a seed, a prompt or a value is not a number"):
        tables.read_values(path)
    path.write_text("method,seed,prompt,name,psnr\na,0,0,x,20\nb,0,1,y,20\n")
    with pytest.raises(UserError, match="a and b have no edit in common"):
        tables.best_two(tables.read_values(path), "psnr", ["a", "b"])


@pytest.mark.parametrize(
    ("said", "why"),
    [({"size": {"height": value}}, "its size is no height from 16 to") for value in (None, {}, 5000)]
    + [({"strangers_mean": value}, "strangers_mean is .*, not a number from -1 to 1") for value in ("x", 2)]
    + [({"verification_threshold": {}}, "verification_threshold is .*, not a number from -1 to 1")],
)
def test_a_recognisers_numbers_are_checked(tmp_path, said, why):
    shutil.copytree(ROOT / "assets/mini/judge", folder := tmp_path / "judge")
    config = folder / "preprocessor_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | said))
    with pytest.raises(UserError, match=why):
        load_recognizer(str(folder), torch.device("cpu"), torch.float32)


@pytest.mark.skipif(sys.platform != "linux", reason="devices and pipes of Linux")
def test_devices_and_pipes_are_refused(tmp_path, capsys):
    """Not read for ever, and not waited for."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for file in (pipe, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a readable text file .a device or a pipe"):
            utils.choose_prompts(None, file)
        with pytest.raises(UserError, match="not a readable table .a device or a pipe"):
            tables.read_csv(file)
    with pytest.raises(UserError, match="pipe: is a named pipe"):
        tables.check_outputs([pipe])
    with pytest.raises(UserError, match="pipe: can't be written"):
        utils.write_file(pipe, b"x")
    for name in ("run.json", "manifest.jsonl"):
        os.mkfifo(tmp_path / name)
    assert runs.read_manifest(tmp_path) == {}
    with pytest.raises(UserError, match="not a record of a run .a device or a pipe"):
        runs.read_record(tmp_path)


def test_a_text_that_is_too_long_is_not_read(tmp_path):
    with open(tmp_path / "p.txt", "wb") as file:
        file.truncate(1 << 40)  # takes no room
    with pytest.raises(UserError, match=r"p\.txt: not a readable text file \(over 10 MB\)"):
        utils.choose_prompts(None, tmp_path / "p.txt")


@pytest.mark.parametrize("name", ["loop", "loop/x", "x" * 300, "file/x"], ids=lambda name: name[:9])
def test_a_place_that_cannot_be_used_is_one_line(tmp_path, defend_flags, edit_flags, capsys, name):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").write_text("x")
    place = tmp_path / name
    tiny.write_portraits(tmp_path / "in", 1)
    image = str(tmp_path / "in/face0.png")
    before = sorted(tmp_path.rglob("*"))
    noise, prompt = ["--defend_method", "noise"], "--prompt=x"
    for script, flags in (
        (defend, [*defend_flags, *noise, "--input_path", image, "--output_path", f"{place}.png"]),
        (defend, [*defend_flags, *noise, "--input_path", str(place)]),
        (edit, [*edit_flags, prompt, "--input_path", f"{place}/a.png", "--output_path", f"{tmp_path}/a.png"]),
        (main_defend, [*defend_flags, *noise, "--image_dir", f"{tmp_path}/in", "--output_dir", str(place)]),
        (main_defend, [*defend_flags, *noise, "--image_dir", str(place), "--output_dir", f"{tmp_path}/out"]),
        (main_edit, [*edit_flags, "--seed=0", "--src_dir", f"{tmp_path}/in", "--edit_dir", str(place)]),
        (main_edit, [*edit_flags, "--prompt_file", str(place), "--src_dir", "a", "--edit_dir", "b"]),
        (report, ["--experiment_dir", str(place), "--output", f"{tmp_path}/r.html"]),
        (report, ["--experiment_dir", f"{tmp_path}/in", "--output", f"{place}/r.html"]),
        (purify, ["--method=jpeg:75", "--input_dir", f"{tmp_path}/in", "--output_dir", str(place)]),
        (experiment, [*defend_flags, "--image_dir", f"{tmp_path}/in", "--output_dir", str(place)]),
    ):
        if f"{tmp_path}/loop.png" not in flags:  # a name like any other
            assert script.main(flags) == 1, (script, flags)
            only_error(capsys)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="becomes another user")
def test_directories_without_rights_are_one_line(tmp_path):
    """As a user who is not root: into whose folders others can't look or write."""
    tiny.write_portraits(tmp_path / "shut/in", 1)
    tiny.write_portraits(tmp_path / "in", 1)
    (tmp_path / "deaf").mkdir()
    os.chmod(tmp_path / "shut", 0o700)
    os.chmod(tmp_path / "deaf", 0o755)
    for folder in [tmp_path, *tmp_path.parents]:
        if folder.stat().st_uid == os.geteuid() and folder.stat().st_mode & 0o005 != 0o005:
            os.chmod(folder, 0o755)
    places = [("in", "1"), ("shut/in", "2"), ("shut", "3"), ("in", "shut"), ("in", "deaf"), ("in", "deaf/5")]
    lines = [f"--image_dir {tmp_path}/{place} --output_dir {tmp_path}/{out}" for place, out in places]
    code = "import sys, os, main_defend\nmain_defend.main(sys.argv[1].split())\n"  # all is imported
    code += "os.setuid(65534)\nprint([main_defend.main(line.split()) for line in sys.argv[2:]])"
    lines = [f"--models=mini --device=cpu --defend_method=noise {line}" for line in lines]
    command = [sys.executable, "-c", code, *lines]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.stdout.endswith("\n[1, 1, 1, 1, 1]\n") and len(errors) == 5, done.stdout + done.stderr
    assert all(line.startswith("error: /") and ".py:" not in line for line in errors), errors


# ---------------------------------------------------------------------------------------------------------
# memory and time

@pytest.mark.parametrize(
    ("method", "size", "most"),
    [
        ("noise", (9000, 9000), "24.5"),
        ("cw", (4096, 3072), "12.2"),
        ("dctshield", (4096, 3072), "12.2"),
        ("editshield", (2560, 1920), "4.9"),
    ],
)
def test_an_image_of_too_many_pixels_is_refused_by_its_header(
    tmp_path, defend_flags, capsys, monkeypatch, method, size, most
):
    path = tmp_path / "large.png"
    Image.new("1", size).save(path)
    assert path.stat().st_size < 20_000
    Image.init()  # Pillow imports its plugins once, and one of them loads an image as it is imported
    monkeypatch.setattr(Image.Image, "load", None)
    flags = ["--input_path", str(path), "--output_path", str(tmp_path / "o.png"), "--defend_method", method]
    assert defend.main([*defend_flags, *flags]) == 1
    only_error(capsys, f"large.png: {size[0]}x{size[1]} is more than the {most} megapixels that are read")
    assert images.image_size(path) == size[::-1] or size[0] < 9000
    assert not (tmp_path / "o.png").exists()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="measures a process's memory")
@pytest.mark.parametrize("mask", ["none", "face+texture"])
@pytest.mark.parametrize("method", METHODS)
def test_the_largest_image_takes_at_most_2_5_gb(tmp_path, method, mask):
    """That a method reads, on the bundled models, two iterations."""
    height = int((METHODS[method].most_pixels * 3 / 4) ** 0.5)
    portrait = Image.open(ROOT / "assets/portraits/mini/portrait_1000000.png").convert("RGB")
    portrait.resize((height * 4 // 3, height)).save(tmp_path / "large.jpg")
    flags = ["--models=mini", "--device=cpu", f"--defend_method={method}", f"--budget_mask={mask}"]
    flags += [f"--input_path={tmp_path}/large.jpg", f"--output_path={tmp_path}/o.png"]
    flags += [] if method == "noise" else ["--num_iters=2"]
    flags += ["--model=flux-kontext"] if "attention" in METHODS[method].parameters else []
    flags += ["--face_box=900,600,1900,1700"] if mask != "none" or "facelock" in method else []
    process = subprocess.Popen([sys.executable, "defend.py", *flags], cwd=ROOT)
    _, status, used = os.wait4(process.pid, 0)
    assert status == 0 and used.ru_maxrss * (1 if sys.platform == "darwin" else 1024) <= 2.5e9


def test_strips_are_the_whole(monkeypatch):
    x = torch.rand((2, 3, 50, 20), generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    source, mask = images.to_uint8(x * 0.9), torch.rand((2, 1, 50, 20))

    def converted():
        saved = images.to_uint8_within(x, source, 0.03, mask)
        return images.to_uint8(x), saved, images.psnr(source[0], saved[0])

    whole = converted()
    monkeypatch.setattr(images, "STRIP", 7)
    assert all(np.array_equal(one, other) for one, other in zip(whole, converted(), strict=True))
    assert whole[2] == pytest.approx(peak_signal_noise_ratio(source[0], whole[1][0]), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "key", "value"),
    [
        ("unet/config.json", "layers_per_block", 1_000_000),
        ("unet/config.json", "downsample_padding", 10**18),
        ("unet/config.json", "block_out_channels", [32, 0]),
        ("unet/config.json", "cross_attention_dim", "x"),
        ("unet/config.json", "block_out_channels", []),
        ("vae/config.json", "layers_per_block", 10**9),
        ("text_encoder/config.json", "num_hidden_layers", 1_000_000),
        ("unet/config.json", "norm_eps", []),
        ("unet/config.json", "mid_block_scale_factor", "x"),
        ("scheduler/scheduler_config.json", "prediction_type", "$"),
        ("scheduler/scheduler_config.json", "timestep_spacing", 7),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 10**9),
        ("scheduler/scheduler_config.json", "num_train_timesteps", 0),
        ("scheduler/scheduler_config.json", "num_train_timesteps", "x"),
    ],
)
def test_a_config_that_its_weights_cannot_have_is_refused(tmp_path, capsys, config, key, value):
    shutil.copytree(ROOT / "assets/mini/editor", tmp_path / "editor")
    path = tmp_path / "editor" / config
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    image = str(ROOT / "assets/portraits/mini/portrait_1000000.png")
    flags = ["--models=mini", "--device=cpu", f"--model_id={tmp_path}/editor", "--num_inference_steps=2"]
    flags += ["--prompt=x", "--input_path", image, "--output_path", str(tmp_path / "o.png")]
    assert edit.main(flags) == 1
    only_error(capsys, config, key)
    assert not (tmp_path / "o.png").exists()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"num_layers": ' + "9" * 5000 + "}", "{", "\x00"])
def test_a_damaged_config_is_one_line(tmp_path, text):
    shutil.copytree(ROOT / "assets/mini/editor/vae", tmp_path / "vae")
    (tmp_path / "vae/config.json").write_text(text)
    why = r"can't be loaded .vae/config\.json: .{3,100}\)"
    with pytest.raises(UserError, match=why), loading("x", str(tmp_path)):
        pass
