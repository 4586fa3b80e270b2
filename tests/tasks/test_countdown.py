import ast
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import combinations
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder import tasks

TASK = tasks.get("countdown")
PROBLEMS = TASK.problems("train", 400, 0)


class Broken(Exception):
    """The text breaks a rule of the game."""


def value(node, used):
    """Another reading of the rules: Python's own parser and exact fractions."""
    if isinstance(node, ast.Constant) and type(node.value) is int:
        used.append(node.value)
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise Broken
    a, b = value(node.left, used), value(node.right, used)
    match node.op:
        case ast.Add():
            return a + b
        case ast.Sub():
            return a - b
        case ast.Mult():
            return a * b
        case ast.Div():
            if b == 0 or (a / b).denominator != 1:
                raise Broken
            return a / b
    raise Broken


def is_right(text, numbers, target):
    used = []
    try:
        reached = value(ast.parse(text.strip(), mode="eval").body, used)
    except (SyntaxError, Broken):
        return False
    return reached == target and not Counter(used) - Counter(numbers)


def reach(values):
    """All that can be made of the values (a tuple of Fractions), by brute force: also through
    zero and negative numbers, as long as divisions are exact."""
    found = set(values)
    for i, j in combinations(range(len(values)), 2):
        a, b = values[i], values[j]
        rest = values[:i] + values[i + 1 : j] + values[j + 1 :]
        results = {a + b, a - b, b - a, a * b}
        results |= {x / y for x, y in ((a, b), (b, a)) if y and (x / y).denominator == 1}
        for result in results:
            found |= reach((*rest, result))
    return found


def test_the_example_of_the_documentation():
    problem = TASK.solve(((2, 3, 5, 8), 43))
    assert (problem.prompt, problem.answer, problem.difficulty) == ("2,3,5,8>43", "8*5+3", 2)
    assert TASK.trace(problem) == "8*5=40:2,3,40;40+3=43:2,43;"


@pytest.mark.parametrize(
    "text, right",
    [
        ("8*5+3", True),
        ("3+5*8", True),
        ("(8*5)+3", True),
        ("5*5+5*3+3", False),  # 5 is there once
        ("8*5+8-5", False),
        ("8*5+3+2-2", False),
        ("8*5+1+2", False),  # 1 is not there
        ("8*5+2", False),
    ],
)
def test_each_number_is_used_at_most_as_often_as_it_is_there(text, right):
    assert TASK.verify(TASK.solve(((2, 3, 5, 8), 43)), text) == right
    assert is_right(text, (2, 3, 5, 8), 43) == right


def test_problems_are_solvable_and_not_trivial():
    for problem in PROBLEMS:
        numbers, target = problem.data
        assert problem.prompt == f"{','.join(map(str, numbers))}>{target}"
        assert len(numbers) == 4 and all(1 <= number <= 25 for number in numbers)
        assert 10 <= target <= 100 and target not in numbers
        assert is_right(problem.answer, numbers, target)


def test_traces_are_legal_searches_that_end_at_the_target():
    """Each step is one operation on two numbers of a state that was there before it; none is
    visited twice, and no operation merely throws a number away."""
    for problem in PROBLEMS:
        numbers, target = problem.data
        before, visited = {numbers}, set()
        for step in TASK.trace(problem).removesuffix(";").split(";"):
            operation, state = step.split(":")
            left, result = operation.split("=")
            result = int(result)
            assert value(ast.parse(left, mode="eval").body, used := []) == result > 0
            assert used == sorted(used, reverse=True)
            assert result not in used
            state = tuple(map(int, state.split(",")))
            assert list(state) == sorted(state)
            parent = Counter(state) - Counter([result]) + Counter(used)
            assert Counter(state)[result] and tuple(sorted(parent.elements())) in before
            assert state not in visited
            # Nor one that is too small to reach the target.
            assert result == target or prod(max(n, 2) for n in state) >= target
            visited.add(state)
            before.add(state)
        assert result == target


def test_searches_take_from_one_step_to_many():
    difficulties = sorted(problem.difficulty for problem in PROBLEMS)
    assert difficulties[0] == 1
    assert difficulties[len(difficulties) // 2] >= 3
    assert difficulties[-20] >= 30
    assert difficulties[-1] <= 200


def test_labels_say_whether_the_target_is_still_in_reach():
    hopeless = 0
    for problem in PROBLEMS[:40]:
        _, target = problem.data
        trace = TASK.trace(problem)
        states = [step.split(":")[1].split(",") for step in trace.split(";")[:-1]]
        # Two or three numbers only: brute force over more is slow.
        expected = [target in reach(tuple(map(Fraction, state))) for state in states]
        assert TASK.step_labels(problem, trace) == expected
        assert expected[-1]
        hopeless += expected.count(False)
        half = problem.difficulty // 2
        assert TASK.step_labels(problem, TASK.trace(problem, half)) == expected[:half]
    assert hopeless > 100


def test_labels_of_steps_that_are_not_the_search():
    problem = TASK.solve(((2, 3, 5, 8), 43))
    for trace, expected in [
        ("", []),
        ("8*5=40", []),
        ("8*5=40:2,3,40;40+", [True]),
        ("8*5=41:2,3,41;", [False]),
        ("8*5=40:2,40;", [False]),
        ("9*5=45:2,3,8,45;", [False]),
        # 43 cannot be made of 2, 3 and 3; then back to the start, without a word.
        ("8-5=3:2,3,3;8*5=40:2,3,40;40+3=43:2,43;", [False, True, True]),
        ("40+3=43:2,43;8*5=40:2,3,40;", [False, True]),
        ("8-5=3:2,3,3;3*>8*5=40:2,3,40;40", [False, True]),
        ("8*5=40:2,3,40;40*2=80:3,80;", [True, False]),
        (";;x;\ud800;" + "(" * 1000 + ";", [False] * 5),
    ]:
        assert TASK.step_labels(problem, trace) == expected
    # A legal step that throws a number away is labelled by what is left.
    wasteful = TASK.solve(((1, 3, 5, 8), 43))
    assert TASK.step_labels(wasteful, "8*1=8:3,5,8;8*5=40:3,40;") == [True, True]


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("5*8+3", True),
        (" ( 5 * 8 ) + 3\n", True),
        ("((((5))*((8)))+(3))", True),
        ("3-5*8", False),
        ("5*(8+3)", False),
        ("3-(2-5)*8", False),
        ("8*5+3+2-2", False),
        ("43", False),
        ("40+3", False),
        ("8*5+3=43", False),
        ("8*5+3;", False),
        ("8*5+03", False),
        ("8*5--3", False),
        ("+8*5+3", False),
        ("8*5 3", False),
        ("8(5)+3", False),
        ("(8*5+3", False),
        ("8*5+3)", False),
        ("8×5+3", False),
        ("8*5+3.0", False),
    ],
)
def test_verify(text, right):
    problem = TASK.solve(((2, 3, 5, 8), 43))
    assert TASK.verify(problem, f"8*5</think>{text}") is right


def test_divisions_must_be_exact():
    problem = TASK.solve(((2, 3, 4, 10), 15))
    assert TASK.verify(problem, "10/2*3")
    assert TASK.verify(problem, "10*3/2")
    assert TASK.verify(problem, "10/(2/3)") is False
    assert TASK.verify(problem, "3/2*10") is False
    assert TASK.answer("3/2*10") is None and TASK.answer("3/(2-2)") is None


def test_through_negative_numbers():
    problem = TASK.solve(((2, 3, 5, 8), 12))
    assert TASK.verify(problem, "(3-5)*(2-8)")
    assert TASK.verify(problem, "2-(3-5)+8")
    assert TASK.verify(problem, "(3-5)/2+8") is False


@pytest.mark.parametrize(
    "group",
    [
        ["8*5+3", "3+5*8", "(3)+(8*5)", "3 + (5 * 8)"],
        ["9-2-4+1", "1+9-(2+4)", "9-(4-1)-2", "(1-2)+(9-4)"],
        ["12/2*3/6", "3*12/(2*6)", "12/(2*6)*3", "12/(6/3)/2"],
        ["(5-2)*(3+4)", "(4+3)*(5-2)"],
        ["9-(2+4)*1", "9-1*(4+2)"],
    ],
)
def test_votes_do_not_depend_on_order_and_brackets(group):
    assert len({TASK.answer(text) for text in group}) == 1
    assert TASK.answer(group[0]) is not None


def test_votes_differ_for_different_ways():
    texts = ["8*5+3", "8*5+2+1", "8*(5+3)", "8-5+3", "8-(5+3)", "8/4", "4-8", "43"]
    assert len({TASK.answer(text) for text in texts}) == len(texts)


NUMBERS = st.integers(1, 12).map(str)
EXPRESSIONS = st.recursive(
    NUMBERS,
    lambda part: st.tuples(part, st.sampled_from("+-*/"), part).map(
        lambda t: f"({t[0]}){t[1]}({t[2]})"
    ),
    max_leaves=4,
)


@given(EXPRESSIONS)
@settings(max_examples=400, deadline=None)
def test_canonical_answers_mean_the_same(text):
    """Same value, same numbers, itself canonical, and as exact as the original."""
    used, canonical_used = [], []
    try:
        expected = value(ast.parse(text, mode="eval").body, used)
    except Broken:
        assert TASK.answer(text) is None
        return
    canonical = TASK.answer(text)
    assert canonical is not None and TASK.answer(canonical) == canonical
    assert value(ast.parse(canonical, mode="eval").body, canonical_used) == expected
    assert sorted(used) == sorted(canonical_used)


@given(st.data())
@settings(max_examples=600, deadline=None)
def test_perturbed_answers_are_judged_as_by_the_rules(data):
    problem = data.draw(st.sampled_from(PROBLEMS))
    at = data.draw(st.integers(0, len(problem.answer)))
    gone = data.draw(st.integers(0, 2))
    new = data.draw(st.text(st.sampled_from("0123456789+-*/()"), max_size=2))
    text = problem.answer[:at] + new + problem.answer[at + gone :]
    # Python also reads signs, powers and floor divisions, but they are no BinOp of ours.
    assert TASK.verify(problem, text) == is_right(text, *problem.data)


def test_the_targets_of_a_small_space():
    """Two numbers of 1 and 2: 1+1 is 2; 1+2 is 3 (2-1 is 1 and 2*1 is 2, numbers given); 2+2 and
    2*2 are 4, 2/2 is 1."""
    task = tasks.get("countdown", size=2, numbers=(1, 2), targets=(1, 99))
    prompts = {task.prompt(statement) for statement in task.every()}
    assert prompts == {"1,1>2", "1,2>3", "2,2>4", "2,2>1"}
    drawn = {problem.prompt for problem in task.problems("train", 200, 0)}
    assert drawn == {p for p in prompts if tasks.split_of(p) == "train"}


def test_paths_are_the_searches_without_their_dead_ends():
    paths = tasks.get("countdown", traces="path")
    dead = 0
    for problem, searched in zip(paths.problems("train", 400, 0), PROBLEMS, strict=True):
        assert (problem.prompt, problem.answer) == (searched.prompt, searched.answer)
        path, search = paths.trace(problem), TASK.trace(searched)
        steps = path.split(";")[:-1]
        assert 1 <= len(steps) == problem.difficulty <= 3
        assert all(paths.step_labels(problem, path)), "a step of a path leads nowhere"
        assert f"={problem.data[1]}:" in steps[-1]
        rest = iter(search.split(";"))
        assert all(step in rest for step in steps), "the search takes other steps, or others first"
        dead += search.count(";") - len(steps)
    assert dead > 1000


def test_a_slip_is_legal_and_misses_the_target_or_claims_to_have_it():
    rng = random.Random(0)
    claims = 0
    for problem in PROBLEMS:
        numbers, target = problem.data
        steps, hand = TASK.slip(problem, rng).split(";")[:-1], numbers
        assert steps
        for step in steps:
            move, left = step.split(":")
            expression, result = move.split("=")
            used = sorted(map(int, re.findall(r"[0-9]+", expression)))
            rest = Counter(hand) - Counter(used)
            if int(result) == target:
                claims += 1
                assert step is steps[-1] and len(hand) == 2 and eval(expression) != target
            else:
                assert eval(expression) == int(result)
            hand = tuple(map(int, left.split(",")))
            assert Counter(hand) == rest + Counter([int(result)])
            assert list(hand) == sorted(hand)
    assert 0.3 < claims / len(PROBLEMS) < 0.6


def test_a_prompt_says_which_problem_it_is():
    for problem in PROBLEMS[:40]:
        assert TASK.read(problem.prompt) == problem
    for text in ("", "1,2,3,4", "1,2,3,4>x", "4,3,2,1>10", "1,2>3>4", "²,3>6"):
        with pytest.raises(ValueError, match="is not a problem of it"):
            TASK.read(text)
