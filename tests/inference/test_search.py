"""Searches on a tree whose every value is known: the engine's i-th child of a line is token i."""

import math
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from ponder.inference.engine import LocalEngine, Sample, SamplingParams
from ponder.inference.search import (
    SEARCHES,
    BeamSearch,
    DiverseTreeSearch,
    Node,
    Rebase,
    Revision,
    Steps,
    TreeSearch,
    run,
    stream,
)
from ponder.models.flops import decode_flops, prefill_flops

from ..models.test_flops import SMALL
from .test_engine import Mock, random_table

EOS, THINK_END, DEPTH = 99, 98, 3
PROMPT = (7, 7)


class Tree:
    """An engine: the i-th request for a line gets token i, and <eos> behind it at DEPTH tokens.
    Counts its batches."""

    def __init__(self, depth=DEPTH):
        self.depth, self.batches, self.requests = depth, 0, []

    def generate(self, requests):
        requests = list(requests)
        self.batches += 1
        self.requests += requests
        for request in reversed(requests):  # in another order than asked for
            tokens = (request.index,)
            done = len(request.prompt) - len(PROMPT) + 1 >= self.depth
            tokens += (EOS,) if done else ()
            yield Sample(
                request=request,
                tokens=tokens,
                sampled_tokens=len(tokens),
                forced_tokens=0,
                logprob=-1.0,
                finish="stop" if done else "length",
                seconds=0.5,
            )


class Ragged(Tree):
    """Every third child of a line ends it, so that some lines end long before others."""

    @staticmethod
    def ends(line):
        return line[-1] % 3 == 2 or len(line) == DEPTH + 1

    def generate(self, requests):
        for request in requests:
            done = self.ends((*request.prompt[len(PROMPT) :], request.index))
            tokens = (request.index, EOS) if done else (request.index,)
            finish = "stop" if done else "length"
            yield Sample(request, tokens, len(tokens), 0, -1.0, finish, 0.5)


def value(line):
    """Some number in [0, 1] for a line of tokens, <eos> aside."""
    line = tuple(t for t in line if t != EOS)
    return np.random.default_rng([len(line), *line]).random()


def judge(prompt, lines):
    assert prompt == PROMPT
    return [value(line) for line in lines]


STEPS = Steps(SamplingParams(max_tokens=10), step=1, seed=0)


def found_by(searcher, engine=None):
    (found,) = run(engine or Tree(), [searcher.search(PROMPT, STEPS, judge)])
    return found


def test_beam_search_keeps_the_best():
    lines = [(i,) for i in range(6)]
    drawn = 6
    for _ in range(DEPTH - 1):
        kept = sorted(lines, key=lambda line: -value(line))[:2]
        lines = [(*line, i) for line in kept for i in range(3)]
        drawn += 6
    found = found_by(BeamSearch(beams=6, width=3))
    assert found.best.tokens == (*max(lines, key=value), EOS)
    assert {f.tokens[:-1] for f in found.finished} == set(lines)
    assert found.sampled_tokens == drawn + 6 and len(found.judged) == drawn  # six ends of a text
    # Four of six are dropped after each of the first two steps; the last six are all finished.
    assert found.pruned_tokens == 8
    assert found.seconds == drawn * 0.5 and found.best.logprob == -3


@pytest.mark.parametrize("beams, width", [(6, 3), (8, 2), (12, 4), (12, 1)])
def test_a_line_that_has_ended_keeps_its_place_and_is_not_grown(beams, width):
    lines, ended_early = [(i,) for i in range(beams)], False
    while not all(map(Ragged.ends, lines)):
        kept = sorted(lines, key=lambda line: -value(line))[: beams // width]
        lines = [line for line in kept if Ragged.ends(line)]
        ended_early |= 0 < len(lines) < len(kept)
        lines += [(*line, i) for line in kept if not Ragged.ends(line) for i in range(width)]
    assert ended_early
    found = found_by(BeamSearch(beams=beams, width=width), Ragged())
    assert [f.tokens[:-1] for f in found.finished] == lines


def test_subtrees_keep_their_own_best():
    lines = [(), ()]
    taken = {}
    for _ in range(DEPTH):
        grown = []
        for line in lines:
            first = taken.get(line, 0)
            taken[line] = first + 3  # siblings of both subtrees at the root are numbered on
            grown.append(max(((*line, first + i) for i in range(3)), key=value))
        lines = grown
    found = found_by(DiverseTreeSearch(beams=6, width=3))
    assert [f.tokens[:-1] for f in found.finished] == lines
    assert found.best.tokens[:-1] == max(lines, key=value)
    assert found.pruned_tokens == 2 * 2 * 2 + 2 * 2 * 2  # of the last step two tokens a line


def test_rebase_divides_by_value():
    rebase = Rebase(beams=10, temperature=0.1)
    assert rebase.shares([0.5, 0.5], 10) == [5, 5]
    assert rebase.shares([0.9, 0.1, 0.1], 10) == [10, 0, 0]
    assert rebase.shares([0.3, 0.3, 0.3], 10) == [4, 3, 3]
    weights = np.exp(np.array([0.2, 0.4, 0.3]) / 0.1)
    assert rebase.shares([0.2, 0.4, 0.3], 1000) == pytest.approx(
        (1000 * weights / weights.sum()).tolist(), abs=1
    )
    assert sum(rebase.shares([0.2, 0.4, 0.3], 7)) == 7
    lines = [(i,) for i in range(10)]
    for _ in range(DEPTH - 1):
        shares = rebase.shares([value(line) for line in lines], 10)
        lines = [(*line, i) for line, n in zip(lines, shares, strict=True) for i in range(n)]
    found = found_by(rebase)
    assert {f.tokens[:-1] for f in found.finished} == set(lines)
    assert len(found.judged) == 30


def test_lines_that_end_take_their_share_of_rebase_with_them():
    rebase, ended, sampled = Rebase(beams=10), [], 0
    lines = [(i,) for i in range(10)]
    while lines:
        sampled += len(lines)
        ended += [line for line in lines if Ragged.ends(line)]
        alive = [line for line in lines if not Ragged.ends(line)]
        shares = rebase.shares([value(x) for x in alive], 10 - len(ended)) if alive else []
        lines = [(*line, i) for line, n in zip(alive, shares, strict=True) for i in range(n)]
    assert len({len(line) for line in ended}) > 1
    found = found_by(rebase, Ragged())
    assert [f.tokens[:-1] for f in found.finished] == ended and len(ended) == 10
    assert len(found.judged) == sampled < 10 * (DEPTH + 1)


@pytest.mark.parametrize("expansions", [7, 20])  # 1 + 2 + 4 inner nodes, or more than there are
def test_tree_search_with_enough_expansions_finds_the_best_of_all(expansions):
    every = product(range(2), repeat=DEPTH)
    found = found_by(TreeSearch(expansions=expansions, width=2))
    assert len(found.finished) == 8 and found.pruned_tokens == 0
    assert found.best.tokens[:-1] == max(every, key=value)


def test_tree_search_spends_where_values_are_high():
    """A line whose first token is 0 is worth 0.9, any other 0.1."""

    def steep(_, lines):
        return [0.9 if line[0] == 0 else 0.1 for line in lines]

    tree = Tree(depth=9)
    searcher = TreeSearch(expansions=20, width=2, exploration=0.1)
    (found,) = run(tree, [searcher.search(PROMPT, STEPS, steep)])
    grown = [r.prompt[len(PROMPT)] for r in tree.requests if len(r.prompt) > len(PROMPT)]
    assert grown.count(0) > 0.8 * len(grown)
    assert found.best.tokens[0] == 0 and found.best.ended


@pytest.mark.parametrize("expansions, depth, exploration", [(12, 4, 0.5), (12, 4, 0.1), (8, 6, 1)])
def test_tree_search_grows_the_leaf_of_the_highest_bound(expansions, depth, exploration):
    """Kocsis and Szepesvári's, by hand; then the best child of each is followed to its end."""
    visits, total, grown = Counter(), Counter(), []

    def children(line):
        return [(*line, i) for i in range(2)]

    def closed(line):
        return len(line) == depth or line in grown and all(map(closed, children(line)))

    def bound(line):
        spread = math.sqrt(math.log(visits[line[:-1]]) / visits[line])
        return total[line] / visits[line] + exploration * spread

    for _ in range(expansions):
        leaf = ()
        while leaf in grown:
            leaf = max((c for c in children(leaf) if not closed(c)), key=bound)
        grown.append(leaf)
        for child in children(leaf):
            visits.update(child[:n] for n in range(len(child) + 1))
            total.update({child[:n]: value(child) for n in range(len(child) + 1)})
    line, expanded = (), grown[:]
    while len(line) < depth:
        grown += [] if line in expanded else [line]
        line = max(children(line), key=value)
    tree = Tree(depth)
    searcher = TreeSearch(expansions=expansions, width=2, exploration=exploration)
    found = found_by(searcher, tree)
    assert [r.prompt[len(PROMPT) :] for r in tree.requests[::2]] == grown
    assert (*line, EOS) in [f.tokens for f in found.finished]


def test_of_equal_lines_the_first_is_the_best():
    (found,) = run(Tree(), [BeamSearch(4, 2).search(PROMPT, STEPS, lambda _, x: [0.5] * len(x))])
    assert len(found.finished) == 4 and found.best == found.finished[0]


def test_a_little_tree_search_still_ends_its_line():
    found = found_by(TreeSearch(expansions=1, width=2))
    assert found.best.tokens[-1] == EOS and len(found.best.tokens) == DEPTH + 1


def test_searches_of_many_problems_share_their_rounds():
    tree = Tree()
    beam = BeamSearch(beams=4, width=2)
    together = run(tree, [beam.search(PROMPT, STEPS, judge) for _ in range(5)])
    assert tree.batches == DEPTH
    assert all(found.judge_seconds > 0 for found in together)
    alone = replace(found_by(beam), judge_seconds=0)
    assert [replace(found, judge_seconds=0) for found in together] == [alone] * 5


def test_a_stream_of_its_own_for_every_step():
    tree = Tree()
    for make in SEARCHES.values():
        tree.requests.clear()
        run(tree, [make(8, 4).search(PROMPT, STEPS, judge)])
        streams = [(r.prompt, r.seed, r.index) for r in tree.requests]
        assert len(set(streams)) == len(streams) and streams


def test_budget_and_length_are_of_the_whole_completion():
    steps = Steps(SamplingParams(max_tokens=10, budget=6), 4, 0, THINK_END)
    first = steps.request(PROMPT, Node(), 0).params
    assert (first.max_tokens, first.budget) == (4, 6)
    thinking = steps.request(PROMPT, Node(tokens=(1, 2, 3, 4)), 0)
    assert thinking.prompt == (*PROMPT, 1, 2, 3, 4) and thinking.params.budget == 2
    closed = steps.request(PROMPT, Node(tokens=(1, 2, THINK_END, 4, 5, 6, 7, 8)), 0)
    assert closed.params.budget is None and closed.params.max_tokens == 2
    late = steps.request(PROMPT, Node(tokens=(1, 2, 3, 4, 5, 6, 7, 8)), 0)
    assert late.params.budget == 0


def test_a_line_that_never_ends_is_cut():
    steps = Steps(SamplingParams(max_tokens=4), step=1, seed=0)
    for name in ("beam", "dvts", "rebase", "mcts"):  # a tree gives one token at a time
        (found,) = run(Tree(depth=100), [SEARCHES[name](8, 4).search(PROMPT, steps, judge)])
        assert all(len(node.tokens) == 4 for node in found.finished)


@pytest.mark.parametrize("beams, width", [(6, 4), (2, 4), (4, 0)])
def test_shapes_that_cannot_be_are_named(beams, width):
    for kind in (BeamSearch, DiverseTreeSearch):
        with pytest.raises(ValueError, match=f"{beams} beams of width {width}; the beams must be"):
            kind(beams=beams, width=width)
    for name in SEARCHES:
        with pytest.raises(ValueError, match=f"{name}: 0 beams of width .; the beams must be"):
            SEARCHES[name](0, 1)
    with pytest.raises(ValueError, match="a step of 0 tokens"):
        Steps(SamplingParams(), 0, 0)


def test_costs_count_what_is_read_again():
    """Two beams of width two, three steps: the prompt once, then the one kept line of each step."""
    found = found_by(BeamSearch(beams=2, width=2))
    n = len(PROMPT)
    assert found.read == (n, n + 1, n + 2) and found.prompt_tokens == 3 * n + 3
    assert found.drawn == ((n, 1), (n, 1), (n + 1, 1), (n + 1, 1), (n + 2, 2), (n + 2, 2))
    assert found.judged == (n + 1, n + 1, n + 2, n + 2, n + 4, n + 4)
    by_hand = sum(prefill_flops(SMALL, length) for length in (n, n + 1, n + 2))
    # A sample's last token is not fed; of the last step's two the first is.
    assert found.flops(SMALL) == by_hand + 2 * decode_flops(SMALL, n + 2, 1)


def test_a_line_that_is_asked_twice_is_read_once():
    found = found_by(DiverseTreeSearch(beams=6, width=3))
    assert found.read[0] == len(PROMPT) and len(found.read) == 1 + 2 * (DEPTH - 1)


def test_confidence_is_of_sampled_tokens_and_costs_no_judge():
    assert Node((1, 2, 3), forced=1, logprob=-3.0, sampled=2).confidence == np.exp(-1.5)
    (found,) = run(Tree(), [BeamSearch(4, 2).search(PROMPT, STEPS, None)])
    assert found.judged == () and found.judge_seconds == 0
    # Every request has log-probability -1: the end of a text comes with its last token.
    assert found.best.value == pytest.approx(np.exp(-3 / (DEPTH + 1)))


class Chain:
    """An engine whose attempts are 50 + (number of cues so far), </think>, an answer, <eos>."""

    CUE = (40, 41)

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        for request in requests:
            self.requests.append(request)
            attempt = request.prompt.count(self.CUE[0])
            tokens = (50 + attempt, THINK_END, 60 + attempt, EOS)[: request.params.max_tokens]
            finish = "stop" if tokens[-1] == EOS else "length"
            yield Sample(request, tokens, len(tokens), 0, -1.0 - attempt, finish, 0.5)


def revised(attempts, most=100, judge=judge):
    engine = Chain()
    steps = Steps(SamplingParams(max_tokens=most), 2, 0, THINK_END, Chain.CUE)
    (found,) = run(engine, [Revision(attempts).search(PROMPT, steps, judge)])
    return found, engine.requests


def test_revision_takes_one_chain_up_again():
    found, requests = revised(3)
    chain = (50, 40, 41, 51, 40, 41)
    assert [r.prompt for r in requests] == [PROMPT + chain[:n] for n in (0, 3, 6)]
    assert [r.params.max_tokens for r in requests] == [100, 97, 94]
    lines = [node.tokens for node in found.finished]
    assert lines == [(*chain[: 3 * i], 50 + i, THINK_END, 60 + i, EOS) for i in range(3)]
    assert found.best.tokens == max(lines, key=value)
    assert (found.sampled_tokens, found.forced_tokens, found.pruned_tokens) == (12, 0, 0)
    assert found.read == (2, 5, 8) and found.seconds == 1.5
    assert [node.forced for node in found.finished] == [0, 2, 4]  # the cues
    # An attempt's confidence is of its own four tokens, not of the chain before it.
    assert [n.confidence for n in found.finished] == [np.exp(-(i + 1) / 4) for i in range(3)]


def test_revision_ends_where_there_is_no_room():
    found, requests = revised(9, most=7)
    assert [r.params.max_tokens for r in requests] == [7, 4, 1]
    assert found.finished[-1].tokens == (50, 40, 41, 51, 40, 41, 52)  # a thought that never closed
    assert len(found.finished) == 3
    found, requests = revised(9, most=6)  # two attempts and two cues fill it to the last token
    assert [r.params.max_tokens for r in requests] == [6, 3] and len(found.finished) == 2


def test_a_stream_begins_searches_as_there_is_room():
    """With at most a few requests under way the first searches end before the last begin, and come
    to the same."""
    beam, tree = BeamSearch(beams=4, width=2), Tree()
    begun = []

    def searches():
        for i in range(6):
            begun.append(i)
            yield beam.search((i, i), STEPS, lambda _, lines: [value(line) for line in lines])

    ended = []
    for place, found in stream(tree.generate, searches(), busy=5):
        ended.append((place, found))
        assert len(begun) <= len(ended) + 2
    assert sorted(place for place, _ in ended) == begun == [*range(6)]
    assert {found.best.tokens for _, found in ended} == {found_by(beam).best.tokens}


@pytest.mark.parametrize("slots", [8, 64])
def test_costs_are_what_an_engine_spends(slots):
    """What it prefilled is `read`, and what it drew the tokens."""
    mock = Mock(table=random_table())
    engine = LocalEngine(mock, slots=slots, eos=0)
    steps = Steps(SamplingParams(max_tokens=12), step=3, seed=0)
    kinds = [make(4, 2) for make in SEARCHES.values()] * 4
    found = run(
        engine,
        [kind.search((1 + i % 10, 3 + i // 10), steps, None) for i, kind in enumerate(kinds)],
    )
    spent = [row for row in mock.prefilled if row[0]]  # the rest of a block is zeros
    lengths = [len("".join(map(chr, row)).rstrip("\0")) for row in spent]
    assert sorted(lengths) == sorted(n for f in found for n in f.read)
    for f in found:
        assert sum(n for _, n in f.drawn) == f.sampled_tokens + f.forced_tokens
        assert all(start + n <= 14 for start, n in f.drawn)
