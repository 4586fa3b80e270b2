import random
from collections import Counter

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
