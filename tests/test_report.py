"""evaluation/report.py: a page for an experiment, of a made-up directory, without models."""

import html
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny

from evaluation import report, tables
from evaluation.eval_all import METRICS, VISIBILITY
from evaluation.eval_facial import NO_FACE, metric_of, metric_of_panel
from evaluation.features import Metric
from evaluation.pairing import Row, about_rows
from evaluation.scoring import directories

HOSTILE = "<script>alert(1)</script>"
HEADLINE = "What the panel of judges says, and the other metrics"
MINUS = "in pairs: the same person, instruction and seed"
OF_JUDGE = "By judge: trained here, like the attacked recogniser, and not counted"
PROMPTS = {0: "Turn the person's hair pink", 5: 'Let <b onclick="x()">it</b> be snowy'}
METHODS = ["noise/budget_0.03", "facelock/budget_0.03", "facelock/budget_0.06"]


def make_values(root, names):
    """The values of an experiment as eval_all.py has them; facelock takes person 0 away, but not person 6."""
    rng = np.random.default_rng(0)
    lines = []
    for method in ["clean", *(f"{root}/edits/{method}" for method in METHODS)]:
        strength = 0 if "facelock" not in method else 0.3 if "0.03" in method else 0.6
        for prompt in PROMPTS:
            for place, name in enumerate(names):
                fr = 0.9 - strength * (1 - place / 6) + rng.normal(0, 0.005)
                found = {
                    "clip_s": 0.7 + rng.normal(0, 0.01),
                    "left": fr,
                    "facial": fr - 0.1 * strength,
                    "facial_judge": fr - 0.05,
                    "left_judge": fr,
                }
                found |= {"no_face": 0.0, "odd": rng.normal(), "taken": float(fr > 0.6)}
                if method != "clean":
                    found["psnr"] = np.inf if "noise" in method and place == 0 else 50 - 9 * strength + fr
                lines += [(method, 0, prompt, name, metric, value) for metric, value in found.items()]
    return pd.DataFrame(lines, columns=["method", "seed", "prompt", "name", "metric", "value"])


def write_tables(root, values):
    """Writes what eval_all.py does of such values, over what is there."""
    (root / "all_metric.csv").unlink(missing_ok=True)
    values = values.astype({"method": object, "name": object, "metric": object})
    names = list(dict.fromkeys(values["metric"]))
    rows = list(dict.fromkeys(values["method"]))
    of_faces = [metric_of_panel("left", ["judge"]), NO_FACE, metric_of("similarity", "recognizer", "")]
    of_faces += [metric_of(what, "judge", "judge") for what in ("similarity", "left")]
    known = {metric.name: metric for metric in (*METRICS, *of_faces)}
    metrics = [known.get(name, Metric(name, name, None, ("edits",))) for name in names]
    of_rows = [Row(row, Path(row)) for row in rows]
    about = about_rows(of_rows)
    known = [metric for metric in known.values() if metric.name in names]
    table, _ = tables.all_metrics(tables.means(values), {"": known}, about)
    tables.write_csv(root / "all_metric.csv", table)
    tables.write_csv(root / "per_image.csv", tables.per_image(values, metrics, about))
    tables.write_beside(root / "all_metric.csv", [], {}, directories(of_rows, about), False)


def write_picture(path, seed):
    tiny.write(path, np.random.default_rng(seed).integers(0, 256, (24, 20, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Makes a whole experiment: two methods, two budgets, a purification, a person with a hostile name."""
    tmp_path = tmp_path_factory.mktemp("whole")
    root = tmp_path / "experiment"
    root.mkdir()
    names = [*(f"person{number}" for number in range(6)), HOSTILE.replace("/", "")]
    values = make_values(root, names)
    write_tables(root, values)
    visible = values[(values["method"] != "clean") & (values["metric"] == "psnr")]
    visible = visible.assign(method=visible["method"].str.replace("/edits/", "/protected/"))
    rows = list(dict.fromkeys(visible["method"]))
    about = about_rows([Row(row, Path(row)) for row in rows])
    frame, _ = tables.all_metrics(tables.means(visible), {"": VISIBILITY[:1]}, about)
    frame.to_csv(root / "all_metric_protected.csv", index=False)
    purified = root / "purified/jpeg-75"
    purified.mkdir(parents=True)
    write_tables(purified, values.assign(method=values["method"].str.replace("/edits/", "/purified/edits/")))
    for number, name in enumerate(names):
        write_picture(tmp_path / f"portraits/{name}.png", number)
        for method in METHODS:
            write_picture(root / f"protected/{method}/{name}.png", number + 1)
        for row in ("clean", *METHODS):
            for prompt in PROMPTS:
                write_picture(root / f"edits/{row}/seed0/prompt{prompt}/{name}.png", number + prompt)
    record = {
        "seed": 0,
        "arguments": {"model_id": "assets/mini/editor", "num_iters": 30},
        "prompts": {str(number): text for number, text in PROMPTS.items()},
        "sources": str(tmp_path / "portraits"),
        "command": ["experiment.py", "--models", "mini", "--image_dir", "a folder"],
        "versions": {"python": "3.11.7", "torch": "2.14.1"},
    }
    for row in ("clean", *METHODS):
        (root / f"edits/{row}/seed0/run.json").write_text(json.dumps(record))
    return root


@pytest.fixture(scope="module")
def page(whole):
    """Makes the report on the whole of it."""
    return make(whole)


@pytest.fixture
def experiment(whole, tmp_path):
    """Copies the whole, for tests that take something away."""
    return shutil.copytree(whole, tmp_path / "experiment")


def make(root, output=None, status=0):
    output = output or root.parent / "report.html"
    assert report.main(["--experiment_dir", str(root), "--output", str(output)]) == status
    return output.read_text() if output.is_file() else ""


def words_of(page):
    """What a person reads of it."""
    page = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", page)).split())


def table_of(page, caption):
    """Heading and cells of a table of the page, by row and column; the texts without their intervals."""
    (found,) = re.findall(rf"<caption [^>]*>{caption}</caption>.*?</table>", page, re.DOTALL)
    heads = [html.unescape(text) for text in re.findall(r"<button>(.*?)</button>", found)]
    rows = re.findall(r"<tr class=.*?</tr>", found, re.DOTALL)
    cells = [re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL) for row in rows]
    return [dict(zip(heads, row, strict=True)) for row in cells]


def test_the_values_are_those_of_the_tables(whole, page):
    expected = pd.read_csv(whole / "all_metric.csv")
    lines, of_judge = table_of(page, HEADLINE), table_of(page, OF_JUDGE)
    assert len(lines) == len(of_judge) == len(expected) == 4
    for line, own, (_, row) in zip(lines, of_judge, expected.iterrows(), strict=True):
        line = own | line
        for title, name, digits in (("FR, judge ↓", "facial_judge", 3), ("CLIP-S ↓", "clip_s", 3)):
            ends = [tables.shown(row[f"{name}_{end}"], digits) for end in ("low", "high")]
            assert words_of(line[title]) == f"{tables.shown(row[name], digits)} [{ends[0]}, {ends[1]}]"
            assert f'data-value="{row[name]:.6g}"' in line[title]
    assert [words_of(line["n"]) for line in lines] == ["7", "6 to 7", "7", "7"]
    assert words_of(lines[0]["PSNR ↓"]) == "-" and "(2 inf)" in lines[1]["PSNR ↓"]


def test_paired_differences_are_those_of_tables(whole, page):
    # of the unprotected edits there is no PSNR
    lines = table_of(page, f"{OF_JUDGE}, {MINUS}, minus unprotected")
    values = report.read_values(whole / "per_image.csv")
    found = tables.differences(values, "clean").loc[METHODS[2], "facial_judge"]
    assert words_of(lines[2]["FR, judge ↓"]) == f"{found['mean']:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    assert "PSNR ↓" not in table_of(page, f"Minus unprotected, {MINUS}")[0]


def test_an_unknown_metric_is_shown_and_zeros_and_ones_are_a_share(whole, page):
    values = pd.read_csv(whole / "per_image.csv")
    lines = table_of(page, HEADLINE)
    own = values[(values["method"] == "facelock") & (values["budget"] == 0.06)]
    odd, taken = (own.loc[own["metric"] == name, "value"].mean() for name in ("odd", "taken"))
    assert words_of(lines[3]["odd"]).startswith(tables.shown(odd))
    assert words_of(lines[3]["taken"]).startswith(f"{taken:.0%}".replace("%", " %"))
    assert words_of(lines[0]["no face (FDFR)"]) == "0 %"
    assert "Not a metric of FaceLock" in words_of(page)


def test_the_best_is_marked_only_where_its_interval_is_apart(page):
    lines = table_of(page, HEADLINE)
    marked = [[title for title, cell in line.items() if "<b>" in cell] for line in lines]
    assert marked[2] == ["left, hardest judge ↓", "PSNR ↓"]
    assert "<b>" in table_of(page, "By the attacked recogniser, no evidence of protection")[2]["FR ↓"]
    assert marked[0] == marked[1] == marked[3] == []  # 0.06 has one method: nothing to be better than


def test_three_sentences_say_what_came_out(page):
    (lead,) = re.findall(r'<section class="lead".*?</section>', page, re.DOTALL)
    sentences = [words_of(text) for text in re.findall(r"<p>.*?</p>", lead, re.DOTALL)]
    assert len(sentences) == 3
    assert "facelock 0.06 does best of 3 protections" in sentences[0]
    assert "which is more than chance" in sentences[0] and "Second is facelock 0.03: +0." in sentences[0]
    assert "(person0)" in sentences[1] and "(<script>alert(1)<script>)" in sentences[1]
    assert all(words in sentences[2] for words in ("after jpeg-75", "to a knowing attacker", "PSNR"))


def test_nothing_is_called_more_than_chance_that_is_not(experiment):
    values = report.read_values(experiment / "per_image.csv")
    noise = values["method"].str.contains("clean|noise")
    write_tables(experiment, values[noise])
    assert "which may be chance" in words_of(make(experiment))


def test_a_table_of_another_run_is_refused(experiment, capsys):
    table = pd.read_csv(experiment / "all_metric.csv")
    table.assign(facial=table["facial"] + 0.1).to_csv(experiment / "all_metric.csv", index=False)
    make(experiment, status=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "not of the same run as per_image.csv" in error


def test_names_are_escaped_and_nothing_is_loaded_from_elsewhere(page):
    assert "&lt;script&gt;alert(1)&lt;script&gt;" in page
    assert page.count("<script") == 1 and "<b onclick" not in page and "&lt;b onclick=" in page
    assert not re.findall(r"https?:|url\(|@import|<link|<iframe|srcset", page)
    sources = re.findall(r'\b(?:src|href)="([^"]*)"', page)
    assert len(sources) > 50
    assert all(re.match("data:image/(jpeg|png);base64,|#", source) for source in sources)


def test_same_input_same_bytes(whole, page):
    assert make(whole) == page  # over its own earlier file


def test_a_stand_in_is_called_so(experiment, page):
    assert "A stand-in." in page
    for record in experiment.rglob("run.json"):
        record.write_text(record.read_text().replace("assets/mini/editor", "x").replace("mini", "full"))
    assert "A stand-in." not in make(experiment)


def test_commands_settings_versions_and_hashes_are_told(whole, page):
    from runs import digest

    text = words_of(page)
    assert text.count("python experiment.py --models mini --image_dir 'a folder'") == 1
    assert "python: 3.11.7, torch: 2.14.1" in text
    assert "num_iters: 30" in text and "edits/facelock/budget_0.06/seed0" in text
    assert digest(whole / "per_image.csv") in text


@pytest.mark.parametrize("missing", ["all_metric.csv", "per_image.csv"])
def test_what_is_missing_is_said(experiment, missing):
    gone = ["all_metric_protected.csv", "edits", "protected", "purified", "run.json"]
    for path in [path for name in (missing, *gone) for path in experiment.rglob(name)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    words = words_of(make(experiment))
    assert "all_metric_protected.csv is not there" in words and "no purified/ is there" in words
    assert "No run.json is there" in words
    assert ("per_image.csv isn’t there" in words) == (missing == "per_image.csv")
    assert "facelock 0.06 does best of 3" in words


@pytest.mark.parametrize(
    "lines, said",
    [
        (["x/mist,0,0,a,1.5", "x/mist,0,0,b,2.5"], "nothing is called best"),  # which way is not known
        (["clean,0,0,a,1.5"], "nothing is called best|No protected row"),
    ],
)
def test_little_is_enough(tmp_path, lines, said):
    text = "\n".join(["method,seed,prompt,name,odd", *lines])
    (tmp_path / "per_image.csv").write_text(text)
    assert re.search(said, words_of(make(tmp_path, tmp_path / "out.html")))


def test_a_table_with_a_column_per_metric_is_read_too(experiment, page):
    values = report.read_values(experiment / "per_image.csv").astype(dict.fromkeys(tables.EDIT, object))
    wide = values.pivot(index=tables.EDIT, columns="metric", values="value").reset_index()
    wide.to_csv(experiment / "per_image.csv", index=False)
    caption = f"Minus unprotected, {MINUS}"
    assert table_of(make(experiment), caption) == table_of(page, caption)


@pytest.mark.parametrize(
    "what, said",
    [("empty", "no values in"), ("columns", "no column prompt"), ("twice", "an edit has two values")],
)
def test_what_is_no_experiment_is_an_error_of_one_line(experiment, capsys, what, said):
    frame = pd.read_csv(experiment / "per_image.csv")
    (experiment / "all_metric.csv").unlink()
    (experiment / "per_image.csv").unlink()
    if what == "columns":
        frame.drop(columns="prompt").to_csv(experiment / "per_image.csv", index=False)
    if what == "twice":
        pd.concat([frame, frame]).to_csv(experiment / "per_image.csv", index=False)
    make(experiment, status=1)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error


def test_no_file_of_another_kind_is_overwritten(experiment, capsys):
    other = experiment.parent / "other.html"
    other.write_text("<p>mine</p>")
    make(experiment, other, status=1)
    assert other.read_text() == "<p>mine</p>" and "was not made by this script" in capsys.readouterr().err
    make(experiment, experiment.parent / "report.txt", status=1)
    assert "must end in .html" in capsys.readouterr().err


@pytest.mark.browser
def test_it_opens_from_the_disk_and_sorts(whole, page, browser):
    errors, loaded = [], []
    tab = browser.new_page(viewport={"width": 390, "height": 800})
    tab.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("request", lambda request: loaded.append(request.url[:5]))
    tab.goto((whole.parent / "report.html").as_uri())
    table = tab.locator("table.sortable").first
    button = table.get_by_role("button", name="left, hardest judge")
    orders = []
    for _ in range(2):
        button.press("Enter")
        cells = table.locator("tbody tr").evaluate_all(
            "rows => rows.map(row => +row.cells[2].dataset.value)"
        )
        orders.append(cells)
    sorted_by = table.locator("th[aria-sort]").all_inner_texts()
    wide = tab.evaluate("document.documentElement.scrollWidth")
    broken = tab.evaluate("[...document.images].filter(image => !image.naturalWidth).length")
    tab.emulate_media(media="print")  # without the event that a print dialog sends
    printed = [code.is_visible() for code in tab.locator("details code").all()]
    tab.close()
    assert errors == [] and broken == 0
    assert printed and all(printed)
    assert {*loaded} <= {"file:", "data:"} and loaded.count("file:") == 1
    assert orders[0] == sorted(orders[0]) and orders[1] == orders[0][::-1]
    assert len(sorted_by) == 1 and wide == 390
