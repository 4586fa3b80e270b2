"""What the report tells beyond its rows, on stores whose every number is known."""

import json
import sqlite3

import numpy as np
import pytest

from ponder.inference.browser import problem_groups
from ponder.inference.curves import Curves
from ponder.inference.evaluation import evaluate
from ponder.inference.findings import control_rows, coverage_rows, outcome_shares, policies, ways
from ponder.inference.report import write_report
from ponder.inference.stats import guess_coverage
from ponder.models.flops import prefill_flops

from ..models.test_flops import SMALL
from .test_report import make_store as make_run
from .test_strategies import make_store

# The vote corrects the first sample of 0; 1 is outvoted; 2 is never right; 3 always.
POOL = ["baaa", "bbab", "bbb-", "aaaa"]


@pytest.fixture
def store(tmp_path):
    make_store(tmp_path / "s", POOL, greedy="abba", budget=2).close()
    with make_store(tmp_path / "s", ["aaaa"] * 4, greedy="aaab", budget=8) as store:
        yield store


def test_where_the_right_answer_stands(store):
    shares = outcome_shares(Curves.of(evaluate(store)), store)
    assert shares == {2: (0.5, 0.25, 0.25), 8: (1, 0, 0)}


def test_the_ways_to_be_right(tmp_path):
    # Texts are the answers: one way to be right. 0 and 3 have two right samples or more.
    store = make_store(tmp_path / "s", [*POOL, "----"], greedy="bba-" + "-")
    found = ways(Curves.of(evaluate(store)), store)
    assert (found.budget, found.right, found.texts) == (8, 3.5, 1)
    # The most common answers are a, b, b, a and none; greedy decoding says b, b, a, none, none.
    assert found.agreement == 1 / 5
    never = make_store(tmp_path / "n", ["bbbb"], greedy="b")
    assert ways(Curves.of(evaluate(never)), never) is None


def test_coverage_rows(store):
    two, eight = coverage_rows(Curves.of(evaluate(store)), store)
    assert (two["budget"], two["samples"], two["all"]) == (2, 4, 0.75)
    assert two["one"] == pytest.approx((3 + 1 + 0 + 4) / 16)
    # By hand, two samples of each: 1, 1/2, 0, 1.
    assert two["fit"](2) == pytest.approx(2.5 / 4, abs=0.05)
    assert eight["one"] == 1 and eight["fit"] is None
    answers = [problem.answer for problem in store.problems().values()]
    assert two["guesses"] == guess_coverage(answers, two["k"])


def test_control(store):
    greedy, single = control_rows(Curves.of(evaluate(store)), store)
    assert greedy["name"] == "greedy" and greedy["tokens"] == [(2, 3.0), (8, 3.0)]
    # Three thinking tokens everywhere: within 8, not within 2; and no slope.
    assert greedy["measures"].control == 0.5 and greedy["measures"].performance == 0.75
    assert np.isnan(greedy["measures"].scaling)
    assert single["measures"].performance == 1


def test_who_thinks_on_behind_the_forced_end_has_not_kept_to_a_budget(tmp_path):
    texts = ("thought", "cut</think>again")
    with make_run(tmp_path / "s", budgets=(4, None), texts=texts) as store:
        for row in control_rows(Curves.of(evaluate(store)), store):
            assert row["measures"].control == (0.5 + 1) / 2


def test_problems_by_how_they_came_out(store):
    results = [r for r in evaluate(store) if r.think_budget == 2]
    groups = problem_groups(Curves.of(results), store, 5)
    assert [g["shown"][0]["index"] for g in groups] == [0, 1, 2, 3]
    corrected, outvoted, never, always = (g["shown"][0] for g in groups)
    assert [s["record"].key.sample for s in corrected["samples"]] == [0, 1, 2, 3]
    assert [(v["answer"], v["votes"], v["right"]) for v in outvoted["votes"]] == [
        ("b", 3, False),
        ("a", 1, True),
    ]
    assert [v["answer"] for v in never["votes"]] == ["b", None]
    assert [s["record"].correct for s in always["greedy"]] == [True]


def test_policies_are_over_what_competes(tmp_path):
    """Greedy is right where a cheap budget is enough: on the easier half of twenty problems."""
    path = tmp_path / "s"
    easy = "".join("a" if i < 10 else "b" for i in range(20))
    make_store(path, ["aabb"] * 20, greedy=easy, budget=2).close()
    with make_store(path, ["aabb"] * 20, greedy="a" * 20, budget=8, tokens=30) as store:
        results = evaluate(store, shape=SMALL, strategies=["greedy", "sampling", "pass@k"])
        found = policies(results, store)
    assert found is not None and found.unit == "FLOPs"
    assert {r.strategy for r in found.ways} == {"greedy", "sampling"}
    assert found.bins == ["0–4", "5–9", "10–14", "15–19"]
    last = found.split[-1]
    assert last.accuracy.mean == 1
    chosen = [(found.ways[w].strategy, found.ways[w].think_budget) for w in last.choice]
    assert chosen == [("greedy", 2)] * 2 + [("greedy", 8)] * 2
    dear = np.mean([prefill_flops(SMALL, 10 + i) for i in range(20)])
    assert dear < last.cost < found.overall[-1].cost
    assert found.overall[-1].accuracy.mean == 1
    assert found.table[0].choice != found.table[-1].choice == last.choice


def test_a_policy_may_be_dearer_by_as_much_as_chance(tmp_path):
    path = tmp_path / "s"
    make_store(path, ["aabb"] * 20, greedy="ab" * 10, budget=2, tokens=100).close()
    with make_store(path, ["aabb"] * 20, greedy="a" * 20, budget=8, tokens=101) as store:
        found = policies(evaluate(store, strategies=["greedy"]), store)
    assert found is not None and found.unit == "Tokens"
    assert {found.ways[way].think_budget for way in found.overall[0].choice} == {8}


def test_no_policy_for_too_little(store):
    assert policies(evaluate(store), store) is None  # four problems


def test_settings_without_a_problem_in_common(tmp_path):
    """As where a server left samples out: the rows are told, and no difference between them."""
    store = make_store(tmp_path / "s", ["aaab", "abab"], greedy="ab")
    with sqlite3.connect(tmp_path / "s") as db:
        db.execute("DELETE FROM sample WHERE (params LIKE '%temperature=0%') = problem")
    results = evaluate(store)
    assert {tuple(r.ids) for r in results} == {(0,), (1,)}
    page = write_report(tmp_path / "out", results, store)
    assert "Strategy" in page.read_text()
    told = json.loads((tmp_path / "out" / "findings.json").read_text())["against_greedy"]
    assert told and all(row["difference"] is None for row in told)


def test_a_server_that_says_that_nothing_was_used(tmp_path):
    store = make_store(tmp_path / "s", ["aaab"] * 10, greedy="a" * 5 + "b" * 5)
    with sqlite3.connect(tmp_path / "s") as db:
        db.execute("UPDATE sample SET prompt_tokens = 0, sampled_tokens = 0, forced_tokens = 0")
    assert "50.0" in write_report(tmp_path / "out", evaluate(store), store).read_text()


def test_a_sweep_stopped_while_it_grew_tells_how_many_problems_its_rows_are_of(
    tmp_path, no_figures
):
    store = make_store(tmp_path / "s", ["aaab", "ab", "aa", ""], greedy="abaa")
    page = write_report(tmp_path / "out", evaluate(store), store).read_text()
    assert "3 to 4 problems of the" in page
