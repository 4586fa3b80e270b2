import random
from collections import Counter

from ponder import tasks

TASK = tasks.get("permute")


def words(prompt):
    """A plain interpreter of the prompt's text, letter by letter."""
    word, permutations = prompt.removesuffix("=").split(":")
    for permutation in permutations.split(","):
        moved = ["?"] * 5
        for new, old in enumerate(permutation):
            moved[new] = word["12345".index(old)]
        word = "".join(moved)
        yield word


def test_the_example_of_the_documentation():
    problem = TASK.solve(("31254", "21345"))
    assert (problem.prompt, problem.answer) == ("abcde:31254,21345=", "acbed")
    assert TASK.trace(problem) == "cabed;acbed;"


def test_traces_are_the_words():
    for problem in TASK.problems("train", 2_000, 0):
        expected = list(words(problem.prompt))
        assert TASK.trace(problem) == "".join(word + ";" for word in expected)
        assert problem.answer == expected[-1]
        assert problem.difficulty == len(expected)
        assert 2 <= problem.difficulty <= 10


def test_all_permutations_and_words_are_equally_likely():
    problems = TASK.problems("train", 12_000, 1)
    for counts in (
        Counter(problem.answer for problem in problems),
        Counter(problem.data[0] for problem in problems),
    ):
        assert len(counts) == 120
        assert all(abs(n - 100) < 60 for n in counts.values())


def test_only_rearrangements_are_answers():
    assert TASK.answer("x</think> edcba\n") == "edcba"
    for text in ("abcd", "abcdd", "abcdef", "ABCDE", "abcde;", "abcde abcde"):
        assert TASK.answer(text) is None


def test_a_slip_goes_on_from_two_letters_that_changed_places():
    rng = random.Random(0)
    for problem in TASK.problems("train", 300, 3):
        found = TASK.slip(problem, rng).rstrip(";").split(";")
        assert len(found) == problem.difficulty
        wrong, before = 0, "abcde"
        for permutation, word in zip(problem.data, found, strict=True):
            right = "".join(before[int(digit) - 1] for digit in permutation)
            wrong += sum(a != b for a, b in zip(right, word, strict=True))
            before = word
        assert wrong == 2
