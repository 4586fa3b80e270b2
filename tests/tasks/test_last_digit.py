import random
import re
from collections import Counter

from ponder import tasks

TASK = tasks.get("last_digit")


def running_values(prompt):
    """A plain interpreter of the prompt's text."""
    assert re.fullmatch(r"[0-9]([+-][0-9]|\*[379])+=", prompt)
    value = int(prompt[0])
    for i in range(1, len(prompt) - 1, 2):
        value = eval(f"{value}{prompt[i : i + 2]}") % 10
        yield str(value)


def test_the_example_of_the_documentation():
    solve = TASK.solve(("3", "+8", "*2".replace("2", "9"), "-5"))
    assert (solve.prompt, solve.answer, solve.difficulty) == ("3+8*9-5=", "4", 3)
    assert TASK.trace(solve) == "194"


def test_traces_are_the_running_values():
    for problem in TASK.problems("train", 2_000, 0):
        values = list(running_values(problem.prompt))
        assert TASK.trace(problem) == "".join(values)
        assert problem.answer == values[-1]
        assert problem.difficulty == len(values)


def test_lengths_are_mixed_evenly():
    for low, high in [(3, 12), (2, 2), (5, 6)]:
        task = tasks.get("last_digit", operands=(low, high))
        count = 2_000
        lengths = Counter(p.difficulty + 1 for p in task.problems("train", count, 0))
        assert set(lengths) == set(range(low, high + 1))
        share = count / len(lengths)
        # A binomial count lies within five standard deviations.
        assert all(abs(n - share) < 5 * share**0.5 for n in lengths.values())


def test_no_fixed_answer_and_no_last_operation_gives_the_answer_away():
    """All answers, and all after each kind of last operation, occur equally often."""
    problems = TASK.problems("train", 20_000, 1)
    groups = {"": problems}
    for problem in problems:
        groups.setdefault(problem.prompt[-3], []).append(problem)
    for group in groups.values():
        answers = Counter(problem.answer for problem in group)
        share = len(group) / 10
        assert len(group) > 5_000 and len(answers) == 10
        assert all(abs(n - share) < 5 * share**0.5 for n in answers.values())


def test_exactly_uniform_over_a_whole_space():
    task = tasks.get("last_digit", operands=(3, 3))
    answers = Counter(task.solve(statement).answer for statement in task.every())
    assert set(answers.values()) == {529}


def test_a_slip_goes_on_from_one_wrong_digit():
    rng, places = random.Random(0), Counter()
    for problem in TASK.problems("train", 500, 3):
        text, terms = TASK.slip(problem, rng), re.findall(r"[-+*][0-9]", problem.prompt)
        assert len(text) == len(terms) == problem.difficulty
        before = problem.prompt[0] + text
        wrong = [
            i for i, term in enumerate(terms) if eval(before[i] + term) % 10 != int(before[i + 1])
        ]
        assert len(wrong) == 1
        places[wrong[0] / (len(terms) - 1) > 0.5] += 1
    assert min(places.values()) > 100  # early and late
