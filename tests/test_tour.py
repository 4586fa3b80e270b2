"""Every code block of the tour runs, each page in this one process, and says what the text says."""

import re
import runpy
from pathlib import Path

import matplotlib
import pytest

import ponder

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

ROOT = Path(ponder.__file__).parent
PAGES = sorted((ROOT / "docs/tour").glob("*.py"))

SAID = {  # what the page's text claims, as its code prints it
    "01_perceptron": ["converged after", "no line separates these points"],
    "02_multi_layer_networks": ["relu      loss 0.0", "100% of the points right"],
    "03_activation_functions": ["ten times relu     1.0e+00"],
    "04_loss_functions": ["10.825 nats", "log 50257 = 10.825"],
    "05_gradient_descent": ["η = 0.1 ends at (-1.83, 0.00)", "η = 0.9 ends at (0.00, 0.00)"],
    "06_backpropagation": ["first  layer: largest difference", "last   layer: largest difference"],
    "07_training_chain": ["the quick brown fox jumps over the lazy dog"],
    "08_optimizers": ["sgd       ends at (-1.83", "momentum  ends at (0.00, 0.00)"],
    "09_attention_and_transformers": ["outputs that moved: [6, 7, 8, 9, 10]"],
    "10_scaling_laws": ["70B parameters, 1.4T tokens: 1.9"],
    "11_inference_time_compute": [
        "four wrong answers  vote of 31  93.5 %, at least one of 31 right 100%"
    ],
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs_and_says_what_it_claims(page, monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(plt, "show", lambda: shown.extend(plt.get_fignums()) or plt.close("all"))
    with matplotlib.rc_context():
        runpy.run_path(str(page))
    assert shown and not plt.get_fignums(), "a page shows its figures"
    printed = capsys.readouterr().out
    for words in SAID[page.stem]:
        assert words in printed


@pytest.mark.parametrize(
    ("page", "changes", "words"),
    [
        ("01_perceptron", {"neuron = P": "y[0] = 1 - y[0]\nneuron = P"}, ["no line separates"] * 2),
        ("05_gradient_descent", {"(-3.5, 1.0)": "(-3.5, 0.0)"}, [r"0.9 ends at \(-1.83, 0.00\)"]),
        (
            "10_scaling_laws",
            {"np.geomspace(5e7, 1e10, 5)": "np.geomspace(5e7, 1e9, 3)", "0.002": "0.02"},
            ["70B parameters"],
        ),
        (
            "11_inference_time_compute",
            {"(0.4, *[0.15] * 4)": "(0.4, 0.4, 0.1, 0.1)"},
            ["four wrong answers  vote of 31  50"],
        ),
        ("02_multi_layer_networks", {"(0.5, 5,": "(0.5, 15,"}, [r"relu .* [5-9]\d% of the points"]),
        (
            "02_multi_layer_networks",
            {"(2, 32, 32, 2)": "(2, 3, 2)"},
            [r"relu .* [5-9]\d% of the points"],
        ),
    ],
)
def test_a_change_that_a_page_suggests_shows_what_it_says(
    page, changes, words, monkeypatch, capsys, tmp_path
):
    [path] = [p for p in PAGES if p.stem == page]
    text = path.read_text()
    for old, new in changes.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    (tmp_path / "page.py").write_text(text)
    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    with matplotlib.rc_context():
        runpy.run_path(str(tmp_path / "page.py"))
    printed = capsys.readouterr().out
    for word in words:
        assert len(re.findall(word, printed)) >= words.count(word), printed


def test_every_notion_has_its_page():
    assert [page.stem for page in PAGES] == list(SAID)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_formula_changes_and_the_place_of_the_code(page):
    text = page.read_text()
    assert text.startswith("# %% [markdown]\n# # ")
    for part in ("$$", "**Change and see.**", "**Where the real code lives.**"):
        assert part in text, f"{page.name} lacks {part}"
    places = re.findall(r"`([a-z]+/[\w/]+\.py)`", re.sub(r"\n#", "", text))
    assert places
    for place in places:
        assert (ROOT / place).is_file(), f"{page.name} names {place}, which is not there"
