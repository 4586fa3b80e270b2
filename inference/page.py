"""How a page is written: its template's environment, and the wording of numbers and budgets."""

import math
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..provenance import write_aside

# What a strategy is called on the page; one that is not here goes by its own name.
WORDS = {
    "greedy": "greedy",
    "sampling": "one sample",
    "self-consistency": "majority vote",
    "probability-vote": "vote weighted by probability",
    "mean-probability-vote": "vote weighted by mean token probability",
    "confidence-vote": "vote weighted by self-confidence",
    "best-of-n": "the most probable per token",
    "verifier-best-of-n": "the verifier's best",
    "last-step-best-of-n": "the verifier's best last step",
    "worst-step-best-of-n": "the verifier's best worst step",
    "verifier-vote": "vote weighted by the verifier",
    "last-step-vote": "vote weighted by the verifier's last step",
    "adaptive-consistency": "vote, stopped when likely decided (Beta)",
    "early-stopping": "vote, stopped by a unanimous window",
    "certain-mode": "vote, stopped when the mode is proven",
    "pass@k": "any right (perfect verifier)",
    "beam": "step beam search",
    "dvts": "diverse tree search",
    "rebase": "REBASE tree search",
    "mcts": "Monte Carlo tree search",
    "revise": "attempts in one chain",
    "revise-vote": "attempts in one chain, their vote",
}
WORDS |= {f"{n}-vote": f"{WORDS[n]}, vote of its lines" for n in ("beam", "dvts", "rebase", "mcts")}


def environment() -> jinja2.Environment:
    """Templates in which everything that is not their own markup is escaped, and characters that
    would not show are spelled out."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value
        ),
    )
    made.filters |= {
        "percent": percent,
        "human": human,
        "duration": duration,
        "short_budget": short_budget,
        "budget_phrase": budget_phrase,
        "vote": vote_text,
        "way": way_text,
        "setting": setting_text,
        "points": points,
        "problems": problems_text,
        "whole": lambda text: text.replace(" ", "\N{NO-BREAK SPACE}"),
        "minus": lambda text: text.replace("-", "−"),
        "words": lambda name: WORDS.get(name, name),
    }
    return made


def write_files(folder: str | Path, files: Mapping[str, bytes]) -> Path:
    """Each file written aside and renamed, so that an old one is whole until the new one is."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        write_aside(folder / name, content)
    return folder


def spread(items: Sequence, count: int) -> list:
    """At most `count` of the items, evenly spaced, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


def budget_order(budget: int | None) -> float:
    return math.inf if budget is None else budget


def budget_phrase(budget: int | None) -> str:
    return "unlimited thinking" if budget is None else f"thinking budget {budget:,}"


def short_budget(budget: int | None) -> str:
    return "∞" if budget is None else f"{budget:,}"


def vote_text(samples: int) -> str:
    return "1 sample" if samples == 1 else f"vote of {samples}"


def way_text(r: Any) -> str:
    """A row's strategy, thinking tokens and samples, where there are several."""
    samples = f" × {r.samples}" if r.samples > 1 else ""
    return f"{WORDS.get(r.strategy, r.strategy)}, {short_budget(r.think_budget)}{samples}"


def setting_text(setting: str) -> str:
    """A row's setting, the hash of a verifier in short."""
    return re.sub(r"(judge=[0-9a-f]{6})[0-9a-f]{10}", r"\1", setting)


def problems_text(results: Sequence[Any]) -> str:
    """How many problems the rows are of: not of equally many, where a sweep that grows, or a
    server, left samples out."""
    counts = [r.problems for r in results]
    fewer = "" if min(counts) == max(counts) else f"{min(counts):,} to "
    return f"{fewer}{max(counts):,} problems"


def percent(share: float) -> str:
    return "unknown" if math.isnan(share) else f"{100 * share:.1f} %"


def human(x: float) -> str:
    """A number of three digits and a unit: 1234567 → "1.23 M"."""
    if math.isnan(x):
        return "unknown"
    x = _three_digits(x)
    for unit, size in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(x) >= size:
            return f"{x / size:g} {unit}"
    return f"{x:.3g}"


def duration(seconds: float) -> str:
    """Seconds with a unit of fitting size: 0.00032 → "320 µs"."""
    seconds = _three_digits(seconds)
    for unit, size in (("s", 1), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:g} {unit}"
    return f"{seconds:.2g} s"


def _three_digits(x: float) -> float:
    """Rounded before a unit is chosen: 999.6 is a thousand."""
    return float(f"{x:.3g}")


def visible(text: str) -> str:
    """The text with what would not show, or would reorder its neighbours, spelled out."""
    return "".join(
        f"⟨U+{ord(c):04X}⟩"
        if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Cs", "Cn", "Zl", "Zp")
        else c
        for c in text
    )


def points(share: float) -> str:
    """A difference of shares in points: -0.0213 → "−2.1"; what rounds to nothing has no sign."""
    text = f"{100 * share:+.1f}".replace("-", "−")
    return text.lstrip("+−") if text.endswith("0.0") and len(text) == 4 else text
