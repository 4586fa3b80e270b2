import csv
import io
import json
import random
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from PIL import Image

import ponder
from ponder import cli
from ponder.inference.curves import Curves
from ponder.inference.drawing import cost_axis, finish, legend
from ponder.inference.evaluation import evaluate, frontier
from ponder.inference.figures import draw_compute, png
from ponder.inference.page import WORDS, duration, human, points, visible
from ponder.inference.report import COLUMNS, csv_text, write_report
from ponder.inference.store import Key, Record, Store, StoredProblem
from ponder.inference.strategies import STRATEGIES

from ..models.test_flops import SMALL
from .test_strategies import make_store as store_of_answers

HOSTILE = [
    "<script>alert(1)</script>",
    "</textarea></pre></main><img src=x onerror=alert(1)>",
    '" onmouseover="alert(1)" x=\'',
    "&lt;b&gt; {{ 7 * 7 }} {% raw %}",
    "a\x00b\x1b[31m",
    "abc\u202egpj.exe\u2066",
    "]]><!-- --> $x_{$ \\",
]


def make_store(
    path,
    *,
    problems=12,
    budgets=(0, 4, None),
    samples=4,
    texts=("thought",),
    task="t",
    seconds=0.0,
):
    """Half of all samples are right; problem 0's first is wrong and its vote right. With no
    seconds, and no model's shape, tokens are the only unit, which saves figures."""
    rng = random.Random(0)
    store = Store(path, identity={"model": "m", "task": task})
    store.add_problems(
        StoredProblem(f"prompt {texts[i % len(texts)]}", f"yes{i % 3}", i) for i in range(problems)
    )

    def record(i, budget, temperature, s):
        right = rng.random() < 0.5 if i else s > 0
        text = texts[(i + s) % len(texts)]
        return Record(
            key=Key(i, budget, f"temperature={temperature}", 0, s),
            text=f"<think>{text}</think>{'yes' if right else text}",
            answer=f"yes{i % 3}" if right else text,
            correct=right,
            prompt_tokens=9,
            sampled_tokens=3 + (20 if budget is None else budget),
            forced_tokens=int(budget is not None),
            think_tokens=1,
            logprob=-1.0,
            finish="stop",
            seconds=seconds,
        )

    for budget in budgets:
        store.add(record(i, budget, 0.0, 0) for i in range(problems))
        store.add(record(i, budget, 1.0, s) for i in range(problems) for s in range(samples))
    return store


class Page(HTMLParser):
    """Tags, attributes and the text outside of <style> of a page; checks that tags balance."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.attributes, self.open, self.text = [], [], [], ""
        self.feed(source)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br", "img", "link", "input"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def page_of(store, folder):
    path = write_report(folder, evaluate(store), store)
    return Page(path.read_text(encoding="utf-8"))


RUN = {
    "command": "ponder sweep --task t",
    "configuration": {"samples": [1, 4], "resume": None},
    "versions": {"torch": "2.13.0"},
    "commit": "abc123",
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Results, and the folder of their report, with everything that a page may show."""
    folder = tmp_path_factory.mktemp("written")
    with make_store(folder / "s", task='a "quoted", task', seconds=0.25) as store:
        results = evaluate(store, shape=SMALL)
        write_report(folder / "report", results, store, run=RUN)
    return results, folder / "report"


def test_every_column_of_results_csv_is_explained():
    told = (Path(ponder.__file__).parent / "docs" / "report.md").read_text()
    assert not [name for name in COLUMNS if not re.search(rf"^\|.*\b{name}\b.*\|", told, re.M)]


def test_results_csv(written):
    results, folder = written
    with open(folder / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert (
        tuple(rows[0])
        == COLUMNS
        == tuple(
            "task,model,strategy,samples,think_budget,temperature,problems,accuracy,ci_low,ci_high,"
            "prompt_tokens,sampled_tokens,forced_tokens,flops_per_problem,seconds_per_problem,"
            "guess_accuracy,pareto,pruned_tokens,judge_flops_per_problem,setting".split(",")
        )
    )
    # Greedy and sampling once a budget; the rest with 2 and 4 samples, which is too
    # few for stopping by votes. No verifier scored these samples.
    without = [s for s in STRATEGIES.values() if not getattr(s, "verified", False)]
    assert len(rows) == len(results) == 3 * (2 + 2 * (len(without) - 4))
    for row, result in zip(rows, results, strict=True):
        assert row["task"] == 'a "quoted", task'
        assert float(row["accuracy"]) == pytest.approx(result.accuracy, rel=1e-5)
        assert float(row["flops_per_problem"]) == pytest.approx(result.flops_per_problem, rel=1e-5)
        assert row["pareto"] == str(result.pareto).lower()
        budget = float("inf") if result.think_budget is None else result.think_budget
        assert float(row["think_budget"]) == budget
    assert "true" in {row["pareto"] for row in rows}


def test_findings_json(written):
    results, folder = written
    found = json.loads((folder / "findings.json").read_text())
    rows = {(r.strategy, r.samples, r.think_budget): r for r in results}
    vote = found["choosing"][2]
    assert (vote["strategy"], vote["samples"], vote["difference"]) == ("self-consistency", 4, None)
    for row in found["choosing"]:
        result = rows[row["strategy"], row["samples"], row["think_budget"]]
        assert row["accuracy"] == result.accuracy
        if row is not vote:
            better = row["difference"]["mean"]
            assert better == pytest.approx(row["accuracy"] - vote["accuracy"], abs=1e-9)
    for row in found["against_greedy"]:
        ours = rows[row["strategy"], row["samples"], row["think_budget"]].accuracy
        above = ours - rows["greedy", 1, row["think_budget"]].accuracy
        assert row["difference"]["mean"] == pytest.approx(above, abs=1e-9)
    assert len(found["against_greedy"]) == sum(not r.oracle for r in results) - 3
    for row in found["coverage"]:
        assert row["k"] == [1, 2, 4]
        right = [rows["sampling", 1, row["budget"]]]
        right += [rows["pass@k", k, row["budget"]] for k in (2, 4)]
        assert row["coverage"] == pytest.approx([r.accuracy for r in right])
        assert row["fit"]["a"]["mean"] < 0
    assert [row["think_budget"] for row in found["outcomes"]] == [0, 4, None]
    assert found["control"][0]["measures"].keys() == {"control", "scaling", "performance"}
    assert found["searches"] == []
    policy = found["policy"]
    assert (policy["unit"], policy["bins"]) == ("FLOPs", ["0–2", "3–5", "6–8", "9–11"])
    assert len(policy["overall"]) == len(policy["split"]) == 10
    for p, kinds in [(p, 1) for p in policy["overall"]] + [(p, 4) for p in policy["split"]]:
        assert p["accuracy"]["low"] <= p["accuracy"]["mean"] <= p["accuracy"]["high"]
        assert len(p["choice"]) == kinds
        for way in p["choice"]:
            result = rows[way["strategy"], way["samples"], way["think_budget"]]
            assert (way["model"], way["accuracy"]) == ("m", result.accuracy)
    for table in found["difficulty"]:
        assert [line["level"] for line in table["lines"]] == "0–1 2–3 4–5 6–7 8 9 10 11".split()
        for place, budget in enumerate(table["budgets"]):
            parts = [line["problems"] * line["cells"][place] for line in table["lines"]]
            result = rows[table["strategy"], table["samples"], budget]
            assert sum(parts) / result.problems == pytest.approx(result.accuracy)


def test_unknown_flops_are_empty_in_the_csv(tmp_path):
    rows = csv.DictReader(io.StringIO(csv_text(evaluate(make_store(tmp_path / "s")))))
    assert {row["flops_per_problem"] for row in rows} == {""}


def test_the_page_holds_what_it_shows(written):
    source = (written[1] / "index.html").read_text(encoding="utf-8")
    page = Page(source)
    # Compute wide and narrow in three units, budgets, samples, outcomes, coverage, policy.
    assert page.tags.count("svg") == 6 + 5
    assert page.tags.count("input") == 3  # the choice of the unit
    for tag in ("script", "link", "iframe", "img", "object", "form"):
        assert tag not in page.tags
    addresses = [v for k, v in page.attributes if k in ("src", "href", "xlink:href")]
    beside = [address for address in addresses if not address.startswith("#")]
    files = {path.name for path in written[1].iterdir()}
    assert {*beside, "index.html"} == files and len(beside) == len(files) - 1
    assert "url(http" not in source and "@import" not in source
    ids = [v for k, v in page.attributes if k == "id"]
    assert len(ids) == len(set(ids))
    for reference in addresses:
        assert reference in beside or reference[1:] in ids
    for text in ("ponder sweep --task t", "torch 2.13.0", "abc123", "samples 1 4, resume none"):
        assert text in page.text
    assert ("name", "viewport") in page.attributes
    assert "prefers-color-scheme: dark" in source


def test_every_figure_is_a_vector_file_of_its_own(written):
    names = "accuracy_vs_compute budgets samples coverage outcomes policy".split()
    assert {path.stem for path in written[1].glob("*.svg")} == {*names}
    for name in names:
        text = (written[1] / f"{name}.svg").read_text(encoding="utf-8")
        figure = ElementTree.fromstring(text)
        width, height = figure.attrib["viewBox"].split()[2:]
        assert (figure.attrib["width"], figure.attrib["height"]) == (f"{width}pt", f"{height}pt")
        assert "var(" not in text  # a page's colours, which no other file has
        assert "best guess" in text or name in ("coverage", "outcomes")


def test_rows_of_few_problems_are_not_on_the_frontier(tmp_path):
    store = store_of_answers(tmp_path / "s", ["aaaa"] * 20, greedy="a" * 20, budget=2)
    results = evaluate(store, shape=SMALL)
    easy = replace(results[0], problems=15, accuracy=1.0, flops_per_problem=1.0)
    assert easy not in frontier([*results, easy], lambda r: r.flops_per_problem)
    nearly = replace(easy, problems=18)
    assert nearly in frontier([*results, nearly], lambda r: r.flops_per_problem)


def test_the_frontier_names_strategies_that_have_no_line(tmp_path):
    """Votes that stop when decided cost less than those drawn."""
    texts = ["aaab" * 4 if i % 2 else "abab" * 4 for i in range(8)]
    store_of_answers(tmp_path / "s", texts, greedy="ab" * 4, budget=2).close()
    store = store_of_answers(tmp_path / "s", texts, greedy="ab" * 4, budget=8)
    results = evaluate(store, shape=SMALL)
    curves = Curves.of(results)
    others = {r.strategy for r in frontier(curves.rows, lambda r: r.flops_per_problem)}
    others -= {"greedy", "sampling", "self-consistency"}
    assert others
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    draw_compute(axes, curves)
    (drawn,) = axes.figure.legends
    labels = [text.get_text() for text in drawn.get_texts()]
    assert {WORDS[name] for name in others} <= {*labels}
    assert "Pareto frontier" in labels and "another strategy" not in labels


@pytest.mark.parametrize("top", [0.07, 0.16, 0.37, 0.55, 0.97])
def test_accuracy_is_ticked_at_what_the_labels_say(top):
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    axes.plot([1, 2], [0, top])
    finish(axes, 0.05, 3)
    ticks = [tick for tick in axes.get_yticks() if tick <= axes.get_ylim()[1]]
    assert 4 <= len(ticks) <= 8
    for tick in ticks:
        label = axes.yaxis.get_major_formatter()(tick)
        assert float(label.removesuffix(" %")) == pytest.approx(100 * tick)


@pytest.mark.parametrize("most", [1.3, 3.0, 20.0, 100.0, 1e5])
def test_a_logarithmic_axis_has_ticks_to_read(most):
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    costs = [7.25e5, 7.25e5 * most]
    axes.plot(costs, [0, 1])
    cost_axis(axes.xaxis, costs, "FLOPs", human)
    low, high = axes.get_xlim()
    assert 3 <= sum(low <= tick <= high for tick in axes.get_xticks()) <= 9


def test_the_policy_names_strategies_as_the_rest_of_the_page_does(written):
    text = Page((written[1] / "index.html").read_text(encoding="utf-8")).text
    section = text.split("The compute-optimal policy")[1].split("Budget control")[0]
    assert "vote" in section
    assert not {*re.findall(r"[\w@-]+", section)} & (WORDS.keys() - WORDS.values())


def test_the_page_tells_the_numbers_and_the_corrected_problem(tmp_path):
    store = make_store(tmp_path / "s", problems=1, texts=("first thought", "second thought"))
    page = page_of(store, tmp_path / "report")
    # Greedy is wrong; of the four samples all but the first are right.
    assert "Where the vote corrects a single sample" in page.text
    assert "Sample 1: wrong" in page.text and "Sample 2: right" in page.text
    assert "first thought</think>first thought" in page.text
    assert "Right in no sample" not in page.text and "1 problems, 100.0 %; 1 shown" in page.text
    assert "75.0 %" in page.text and "100.0 %" in page.text
    assert "+25.0 points over one sample" in page.text and "+100.0 points over greedy" in page.text


def test_hostile_texts_are_escaped(tmp_path):
    task = " ".join(HOSTILE)
    store = make_store(tmp_path / "s", texts=HOSTILE, task=task, problems=14, samples=8)
    results = evaluate(store, model=HOSTILE[1])
    run = {"command": HOSTILE[0], HOSTILE[1]: {HOSTILE[2]: HOSTILE}}
    path = write_report(tmp_path / "report", results, store, run=run, examples=10)
    source = path.read_text(encoding="utf-8")
    page = Page(source)
    assert "script" not in page.tags and "img" not in page.tags
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    shown = page.text
    for text in HOSTILE:
        assert visible(text) in shown  # whole, and as text
    assert "⟨U+0000⟩" in shown and "⟨U+202E⟩" in shown
    assert not {"\x00", "\x1b", "\u202e", "\u2066"} & set(source)
    assert "49" not in shown.split("How this was made")[1]  # no template ran inside a text


@pytest.mark.parametrize(
    "options, figures",
    [
        (dict(budgets=(None,), samples=4), 2 + 4),
        (dict(budgets=(0, 8), samples=1), 2 + 2),
        (dict(budgets=(8,), samples=1, problems=1), 2),
        (dict(budgets=tuple(range(0, 60, 2)), samples=2), 2 + 5),
    ],
    ids=["no budgets", "one sample", "one of everything", "many budgets"],
)
def test_small_and_large_sweeps(tmp_path, options, figures):
    page = page_of(make_store(tmp_path / "s", **options), tmp_path / "report")
    assert page.tags.count("svg") == figures


@pytest.mark.parametrize("only", ["greedy", "self-consistency", "pass@k", "best-of-n"])
def test_reports_of_one_strategy(tmp_path, only):
    store = make_store(tmp_path / "s")
    results = evaluate(store, strategies=[only])
    path = write_report(tmp_path / "report", results, store)
    assert "The numbers" in Page(path.read_text(encoding="utf-8")).text


def test_the_picture(tmp_path):
    image = Image.open(io.BytesIO(png(evaluate(make_store(tmp_path / "s"), shape=SMALL))))
    assert image.width >= 1200
    colours = {c for _, c in image.convert("RGB").getcolors(maxcolors=1 << 24) or []}
    assert {(0xC2, 0x56, 0x2D), (0x16, 0x4A, 0x7F)} <= colours  # greedy and the largest vote


def test_the_same_results_give_the_same_files(tmp_path):
    store = make_store(tmp_path / "s", budgets=(None,))
    results = evaluate(store)

    def files():
        write_report(tmp_path / "report", results, store)  # the second time over old ones
        return {p.name: p.read_bytes() for p in (tmp_path / "report").iterdir()}

    first = files()
    tables, figures = {"results.csv", "findings.json"}, {"accuracy_vs_compute.png", "coverage.png"}
    vectors = {path.name for path in (tmp_path / "report").glob("*.svg")}
    assert set(first) == tables | figures | vectors | {"index.html"} and len(vectors) == 5
    assert files() == first


def test_nothing_to_report(tmp_path):
    store = make_store(tmp_path / "s")
    with pytest.raises(ValueError, match="no results to report"):
        write_report(tmp_path / "report", [], store)


@pytest.mark.parametrize(
    "number, text",
    [
        *((0, "0"), (999, "999"), (1234567, "1.23 M"), (5e9, "5 G"), (float("nan"), "unknown")),
        *((999.6, "1 k"), (-999.6, "-1 k"), (999_999, "1 M"), (1.2345e18, "1230 P")),
    ],
)
def test_human(number, text):
    assert human(number) == text


@pytest.mark.parametrize(
    "seconds, text",
    [(2.5, "2.5 s"), (0.00032, "320 µs"), (0, "0 s"), (0.9999, "1 s"), (1234.5, "1230 s")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    "share, text",
    [(0.0213, "+2.1"), (-0.1, "−10.0"), (0.0004, "0.0"), (-0.0004, "0.0"), (0.1, "+10.0")],
)
def test_points(share, text):
    assert points(share) == text


@pytest.mark.parametrize("columns", [1, 4, 20])
def test_a_legend_stays_within_its_figure(columns):
    axes = Figure(figsize=(8, 5), layout="constrained").add_subplot()
    for i in range(11):
        axes.plot([0, 1], label=f"vote of {4**i}")
    legend(axes, columns)
    (drawn,) = axes.figure.legends
    width = drawn.get_window_extent().width
    assert width < axes.figure.bbox.width
    assert len(drawn.get_texts()) == 11
    assert columns == 1 or width > axes.figure.bbox.width / 2  # as wide as it may be


def test_a_store_damaged_in_the_middle_is_one_sentence(tmp_path, capsys):
    (tmp_path / "sweep").mkdir()
    path = tmp_path / "sweep" / "samples.sqlite"
    make_store(path, texts=("x" * 3000,)).close()
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(len(whole) // 2)
        file.write(b"\x5a" * 8192)
    configuration = {"model": "nowhere", "samples": [1, 4], "seed": 0}
    run = {"sweep": {"configuration": configuration}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    assert cli.run(["report", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("ponder: ") and "damaged" in said and said.count("\n") == 1, said
