import random
from collections import Counter

import pytest

from ponder import tasks

TASK = tasks.get("multiply")


def test_the_example_of_the_documentation():
    problem = TASK.solve((12, 34))
    assert (problem.prompt, problem.answer, problem.difficulty) == ("12*34=", "804", 2)
    assert TASK.trace(problem) == "+84=84+063=804"


def test_traces_are_long_multiplication():
    """Each step is read back as numbers: the digit's product, in its place, and the sum so far."""
    for problem in TASK.problems("train", 2_000, 0):
        a, b = problem.prompt.removesuffix("=").split("*")
        steps = TASK.trace(problem).split("+")[1:]
        assert len(steps) == len(b) == problem.difficulty
        total = 0
        for place, step in enumerate(steps):
            partial, running = (int(text[::-1]) for text in step.split("="))
            assert partial == int(a) * int(b[-1 - place]) * 10**place
            total += partial
            assert running == total
            assert step == f"{str(partial)[::-1]}={str(total)[::-1]}"
        assert total == int(a) * int(b)
        assert problem.answer == str(total)[::-1]


def test_any_way_leads_to_the_product():
    """Either factor is taken apart, its digits in each of their six orders; steps say which."""
    free = tasks.get("multiply:digits=3-3,ways=any")
    found = Counter()
    for problem in free.problems("train", 1_500, 0):
        a, b = map(str, problem.data)
        total, places = 0, []
        for step in free.trace(problem).split("+")[1:]:
            said, partial, running = step.split("=")
            multiplier, factor = said.split("x")
            assert factor[::-1] in (a, b)
            other = b if factor[::-1] == a else a
            place = len(multiplier) - 1
            assert multiplier == "0" * place + other[-1 - place]
            assert int(partial[::-1]) == int(factor[::-1]) * int(multiplier[::-1])
            total += int(partial[::-1])
            assert running == str(total)[::-1]
            places.append(place)
        assert sorted(places) == [0, 1, 2] and running == problem.answer
        found[factor[::-1] == a, *places] += 1
    assert len(found) == 12 and min(found.values()) > 75
    with pytest.raises(ValueError, match="ways is 'two'; it must be one or any"):
        tasks.get("multiply:ways=two")


def test_a_slip_on_any_way_goes_the_way_of_the_trace():
    free = tasks.get("multiply:digits=3-3,ways=any")
    for problem in free.problems("train", 300, 3):
        right = [step.split("=")[:2] for step in free.trace(problem).split("+")[1:]]
        tried = [
            step.split("=")[:2] for step in free.slip(problem, random.Random(0)).split("+")[1:]
        ]
        assert [said for said, _ in right] == [said for said, _ in tried]
        assert sum(one != other for one, other in zip(right, tried, strict=True)) == 1


def test_sizes_are_mixed_and_both_factors_have_the_same():
    sizes = Counter()
    for problem in TASK.problems("train", 3_000, 0):
        a, b = map(str, problem.data)
        assert len(a) == len(b) and a[0] != "0" != b[0]
        sizes[len(a)] += 1
    assert set(sizes) == {2, 3, 4} and min(sizes.values()) > 850


def test_a_product_and_its_mirror_image_share_a_split():
    val = {problem.data for problem in TASK.problems("val", 3_000, 0)}
    for split in ("train", "test"):
        others = {problem.data for problem in TASK.problems(split, 3_000, 0)}
        assert not val & {(b, a) for a, b in others}
    assert any((b, a) in val for a, b in val if a != b)


def test_padding_is_no_answer():
    assert TASK.answer("804") == "804"
    for text in ("8040", "80 4", "", "0", "+804", "8,04"):
        assert TASK.answer(text) is None


def test_a_slip_is_one_digit_off_and_the_sums_follow():
    rng = random.Random(0)
    for problem in TASK.problems("train", 500, 3):
        a, b = problem.data
        total, wrong = 0, []
        for place, step in enumerate(TASK.slip(problem, rng).split("+")[1:]):
            partial, running = (int(text[::-1]) for text in step.split("="))
            total += partial
            assert running == total
            off = partial - a * int(str(b)[-1 - place]) * 10**place
            if off:
                wrong.append((place, abs(off)))
        ((place, off),) = wrong
        assert off in [10 ** (place + i) for i in range(len(str(a)) + 1)]
