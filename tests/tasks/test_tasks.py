"""What holds for every task."""

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder import tasks
from ponder.tasks import SPLITS

NAMES = ["last_digit", "permute", "multiply", "countdown"]
# Spaces so small that the draws below visit every problem many times, and how many there are:
# 10·23², 120 + 120², 9² + 90²; countdown's own test counts a smaller one by hand.
SMALL = {
    "last_digit": ({"operands": (3, 3)}, 5290),
    "permute": ({"length": (1, 2)}, 14520),
    "multiply": ({"digits": (1, 2)}, 8181),
    "countdown": ({"size": 3, "numbers": (1, 9), "targets": (1, 30)}, None),
}


@pytest.fixture(params=NAMES)
def task(request):
    return tasks.get(request.param)


def drawn(task, split, count, seed=0):
    return [task.prompt(statement) for statement in task.statements(split, count, seed)]


def check_disjoint(task, train, held_out):
    """Returns all the prompts that were seen."""
    train = set(drawn(task, "train", train))
    val, test = drawn(task, "val", held_out), drawn(task, "test", held_out)
    assert len(set(val)) == len(val) and len(set(test)) == len(test)
    assert not train & set(val) and not train & set(test) and not set(val) & set(test)
    return train.union(val, test)


def test_splits_are_disjoint_over_100_000_problems(task):
    check_disjoint(task, 96_000, 2_000)


@pytest.mark.parametrize("name", NAMES)
def test_splits_cover_a_small_space_without_overlap(name):
    given_settings, size = SMALL[name]
    task = tasks.get(name, **given_settings)
    every = {task.prompt(statement) for statement in task.every()}
    assert size is None or len(every) == size
    # 3 % of the space is less than each held-out split holds, which is 5 % give or take.
    seen = check_disjoint(task, 100_000, len(every) * 3 // 100)
    assert seen <= every


@pytest.mark.parametrize("name", NAMES)
def test_a_held_out_split_can_be_used_up(name, monkeypatch):
    monkeypatch.setattr("ponder.tasks.task.PATIENCE", 2_000)
    task = tasks.get(name, **SMALL[name][0])
    train = {task.prompt(statement) for statement in task.every()}
    space = len(train)
    for split in ("val", "test"):
        with pytest.raises(ValueError, match=r"holds \d+ distinct.*; 10000 were asked for") as e:
            task.problems(split, 10_000, 0)
        size = int(str(e.value).split(" holds ")[1].split()[0])
        whole = set(drawn(task, split, size, seed=1))
        assert len(whole) == size
        assert whole == set(drawn(task, split, size, seed=2))
        assert whole <= train
        train -= whole
        # A share of 5 %, off by less than four standard deviations (of pairs that move together).
        assert abs(size - 0.05 * space) < 4 * (0.05 * 0.95 * 2 * space) ** 0.5
    assert set(drawn(task, "train", 20_000)) <= train


def test_at_most_gives_all_that_a_split_holds(monkeypatch):
    monkeypatch.setattr("ponder.tasks.task.PATIENCE", 200)
    task = tasks.get("multiply", digits=(2, 2))
    held = sum(tasks.split_of(task.key(s)) == "val" for s in task.every())
    given = tasks.at_most(task, "val", 1024, 3)
    assert given == task.problems("val", held, 3) and held == 369
    assert tasks.at_most(task, "val", 5, 3) == given[:5]
    with pytest.raises(ValueError, match="unknown split 'dev'"):
        tasks.at_most(task, "dev", 5, 3)


def test_a_space_with_nothing_held_out_says_so():
    task = tasks.get("multiply", digits=(1, 1))
    held = {
        split: sum(tasks.split_of(task.key(s)) == split for s in task.every()) for split in SPLITS
    }
    with pytest.raises(
        ValueError, match=rf"test holds {held['test']} distinct problems.*; 80 were"
    ):
        task.problems("test", 80, 0)
    assert len(task.problems("train", 1000, 0)) == 1000


@pytest.mark.parametrize("split", SPLITS)
def test_problems_repeat_and_begin_alike(task, split):
    longer = task.problems(split, 60, 7)
    assert task.problems(split, 60, 7) == longer
    assert task.problems(split, 13, 7) == longer[:13]
    assert task.problems(split, 0, 7) == []
    assert [task.prompt(s) for s in task.statements(split, 60, 7)] == [p.prompt for p in longer]
    other = task.problems(split, 60, 8)
    assert sum(a == b for a, b in zip(longer, other, strict=True)) < 30
    assert {p.task for p in longer} == {task.name}


def test_the_last_problems_of_a_split_begin_alike_too():
    task = tasks.get("last_digit", operands=(2, 2))
    with pytest.raises(ValueError) as e:
        task.problems("val", 1000, 3)
    size = int(str(e.value).split(" holds ")[1].split()[0])
    whole = task.problems("val", size, 3)
    assert all(task.problems("val", n, 3) == whole[:n] for n in range(size))


# Stored samples and trained models refer to these: they must never change.
FIRST = {
    "last_digit": ["6+9*9+4-0=", "2+6+9+5+6+8=", "3*9-5*7+7*7="],
    "permute": [
        "abcde:13254,12345,23145,53412,24513,41253,53241,53142=",
        "abcde:23145,51342,12543,31524,12354,42315,43251,41325=",
        "abcde:51432,14523,45213,54123,41325,42153,45231,53142,53421=",
    ],
    "multiply": ["964*265=", "603*401=", "8167*8939="],
    "countdown": ["7,9,13,21>18", "5,12,21,21>60", "8,11,18,20>13"],
}


@pytest.mark.parametrize("name", NAMES)
def test_the_problems_of_a_seed_are_the_same_everywhere(name):
    task = tasks.get(name)
    assert [task.problems(split, 1, 0)[0].prompt for split in SPLITS] == FIRST[name]


def test_every_problem_is_right_with_its_own_trace_and_answer(task):
    for split in SPLITS:
        for problem in task.problems(split, 400, 1):
            trace = task.trace(problem)
            assert task.verify(problem, f"<think>{trace}</think>{problem.answer}")
            assert task.verify(problem, f"{trace}</think>\n {problem.answer} ")
            assert task.verify(problem, problem.answer)
            assert task.answer(problem.answer) == problem.answer
            assert not task.verify(problem, f"{trace}</think>")
            assert not task.verify(problem, f"<think>{problem.answer}")
            assert not task.verify(problem, f"{problem.answer}</think>{trace}x")
            assert not task.verify(problem, f"</think>{problem.answer}<think>")


def test_alphabet_is_what_the_texts_use(task):
    problems = [p for split in SPLITS for p in task.problems(split, 300, 2)]
    used = {c for p in problems for c in p.prompt + task.trace(p) + p.answer}
    assert used == set(task.alphabet)
    assert len(task.alphabet) == len(set(task.alphabet))


def steps(task, trace):
    """The number of steps in a trace, read from its text."""
    return {"last_digit": len(trace), "multiply": trace.count("+")}.get(task.name, trace.count(";"))


def test_a_budget_cuts_the_trace_after_so_many_steps(task):
    for problem in task.problems("train", 60, 3):
        whole = task.trace(problem)
        assert steps(task, whole) == problem.difficulty > 0
        assert task.trace(problem, budget=0) == ""
        for budget in range(problem.difficulty + 2):
            cut = task.trace(problem, budget=budget)
            assert whole.startswith(cut)
            assert steps(task, cut) == min(budget, problem.difficulty)
        assert cut == whole
        with pytest.raises(ValueError, match="budget is -1; it must be 0 or more"):
            task.trace(problem, budget=-1)


def test_difficulties_are_mixed(task):
    difficulties = [problem.difficulty for problem in task.problems("val", 300, 4)]
    assert len(set(difficulties)) >= 3
    assert max(difficulties.count(d) for d in difficulties) <= 150


HOSTILE = [
    "",
    " ",
    "</think>",
    "<think>" * 50_000,
    "(" * 100_000,
    "(" * 100_000 + "1" + ")" * 100_000,
    "9" * 10_000,
    "1" + "*9" * 10_000,
    "1/0",
    "1/(2-2)",
    "()",
    "1+",
    "\0",
    "\ud800",
    "²",
    "٣",
    "__import__('os')",
    "1e5",
    "-1",
    "abcde" * 1000,
    "1,2,3",
]


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_text_is_wrong_and_nothing_else(task, text):
    problem = task.problems("val", 1, 5)[0]
    assert task.verify(problem, text) is False
    assert task.answer(text) is None or task.answer(task.answer(text)) == task.answer(text)


TASKS = {name: tasks.get(name) for name in NAMES}
PROBLEMS = {name: TASKS[name].problems("test", 50, 6) for name in NAMES}


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_any_text_has_one_canonical_answer_or_none(data):
    task = TASKS[data.draw(st.sampled_from(NAMES))]
    pieces = st.sampled_from([*task.alphabet, "<think>", "</think>", " ", "é"])
    text = data.draw(st.one_of(st.text(), st.lists(pieces).map("".join)))
    answer = task.answer(text)
    assert answer is None or task.answer(answer) == answer
    for problem in PROBLEMS[task.name][:2]:
        assert task.verify(problem, text) in (True, False)
        assert not (answer is None and task.verify(problem, text))


@given(st.data())
@settings(max_examples=400, deadline=None)
def test_any_other_answer_is_wrong(data):
    """Countdown, where many answers are right, has its own test of this."""
    task = TASKS[data.draw(st.sampled_from(NAMES[:3]))]
    problem = data.draw(st.sampled_from(PROBLEMS[task.name]))
    at = data.draw(st.integers(0, len(problem.answer)))
    gone = data.draw(st.integers(0, 2))
    new = data.draw(st.text(st.sampled_from(task.alphabet), max_size=2))
    text = problem.answer[:at] + new + problem.answer[at + gone :]
    thought = data.draw(st.sampled_from(["", "</think>", f"<think>{problem.answer}</think>"]))
    assert task.verify(problem, thought + text) == (text == problem.answer)


def test_unknown_names_settings_and_values_are_named():
    assert tasks.names() == [*NAMES, "gsm8k", "math500", "aime24", "aime25"]
    with pytest.raises(ValueError, match="unknown task 'sudoku'; known: last_digit, permute, mul"):
        tasks.get("sudoku")
    with pytest.raises(ValueError, match="last_digit: unknown setting 'digits'; known: operands"):
        tasks.get("last_digit", digits=(2, 4))
    for name, field, value in [
        ("last_digit", "operands", (1, 3)),
        ("last_digit", "operands", 5),
        ("permute", "length", (0, 3)),
        ("permute", "length", (3,)),
        ("multiply", "digits", (4, 2)),
        ("multiply", "digits", (2, 2.5)),
        ("countdown", "numbers", (0, 9)),
        ("countdown", "targets", "ab"),
        ("countdown", "size", 7),
    ]:
        with pytest.raises(ValueError, match=f"{name}: {field} is .*must be"):
            tasks.get(name, **{field: value})


def test_a_name_may_carry_settings():
    for text, written in [
        ("multiply:digits=3-3", tasks.get("multiply", digits=(3, 3))),
        ("countdown:size=3,traces=path", tasks.get("countdown", size=3, traces="path")),
        ("permute:length=2-4,", tasks.get("permute", length=(2, 4))),
    ]:
        assert tasks.get(text) == written
    for text, message in [
        ("multiply:digits", "task 'multiply:digits': 'digits' is no setting; say NAME:SETTING="),
        ("multiply:=3", "'=3' is no setting"),
        ("multiply:digits=3", "multiply: digits is 3; it must be"),
        ("multiply:digits=-3-4", "multiply: digits is '-3-4'; it must be"),
        ("multiply:colour=red", "multiply: unknown setting 'colour'; known: digits"),
        ("countdown:traces=short", "countdown: traces is 'short'; it must be search or path"),
    ]:
        with pytest.raises(ValueError, match=message):
            tasks.get(text)


OWN = """
from __future__ import annotations

from dataclasses import dataclass

from ponder.tasks import WorkedTask
from ponder.tasks.permute import Permute


@dataclass(frozen=True)
class Shuffle(Permute):
    name = "shuffle"


class Half(WorkedTask):
    name = "half"


class Bare:
    name = "bare"


number = 3
"""


def test_a_task_may_be_a_class_in_a_file_of_one_s_own(tmp_path, monkeypatch):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    monkeypatch.chdir(tmp_path)
    task = tasks.get("own.py:Shuffle:length=2-3")
    assert task.name == "shuffle" and task.length == (2, 3)  # type: ignore[attr-defined]
    assert tasks.get(f"{file}:Shuffle", length=(2, 3)).problems("val", 9, 1) == task.problems(
        "val", 9, 1
    )
    code = task.code  # type: ignore[attr-defined]
    assert tasks.get("own.py:Shuffle").code == code  # type: ignore[attr-defined]
    file.write_text(OWN + "\n# another")
    assert tasks.get("own.py:Shuffle").code != code  # type: ignore[attr-defined]
    file.write_text(OWN)
    # What is given beside the name is asked for more clearly than what is in it.
    assert tasks.get("own.py:Shuffle:length=2-3", length=(4, 5)).length == (4, 5)  # type: ignore
    for name, message in [
        ("none.py:Shuffle", "task none.py:Shuffle: there is no file none.py"),
        ("own.py:Chess", "own.py has no class Chess; it has Shuffle, Half, Bare"),
        ("own.py:number", "own.py has no class number; it has Shuffle, Half, Bare"),
        ("own.py:Half", "own.py:Half: Can't instantiate abstract class Half .*draw"),
        ("own.py:Bare", "own.py:Bare is no task: it has no alphabet, problems, trace, verify, ans"),
        ("own.py:Shuffle:size=3", "own.py:Shuffle: unknown setting 'size'; known: length"),
        ("own.py:Shuffle:length=5-3", "length is .5, 3.; it must be"),
        ("own.py", "unknown task 'own.py'; known: .*, gym:NAME, FILE.py:CLASS"),
    ]:
        with pytest.raises(ValueError, match=message):
            tasks.get(name)
    file.write_text(OWN + "\n1 / 0\n")
    with pytest.raises(
        ValueError, match="own.py does not run .ZeroDivisionError: division by zero"
    ):
        tasks.get("own.py:Shuffle")


def test_unknown_splits_and_negative_counts_are_named(task):
    with pytest.raises(ValueError, match="unknown split 'dev'; known: train, val, test"):
        task.problems("dev", 1, 0)
    with pytest.raises(ValueError, match="count is -1; it must be 0 or more"):
        task.problems("train", -1, 0)


def test_a_verifier_that_raises_is_named(task, monkeypatch):
    problem = task.problems("test", 1, 0)[0]
    right = f"<think></think>{problem.answer}"
    assert tasks.judge(task, problem, right) == (task.answer(right), True)
    assert tasks.judge(task, problem, "?")[1] is False

    def broken(self, problem, text):
        raise KeyError("gone")

    with monkeypatch.context() as patch:
        patch.setattr(type(task), "verify", broken)
        with pytest.raises(
            ValueError, match=rf"{task.name}: its verifier failed on .*KeyError: 'gone'"
        ):
            tasks.judge(task, problem, right)
    with monkeypatch.context() as patch:
        patch.setattr(type(task), "verify", lambda *_: True)
        assert tasks.judge(task, problem, right) == (task.answer(right), True)
        patch.setattr(type(task), "answer", lambda *_: None)
        with pytest.raises(ValueError, match="finds it right and answer.. finds none, which votes"):
            tasks.judge(task, problem, right)
        patch.setattr(type(task), "verify", lambda *_: False)
        assert tasks.judge(task, problem, right) == (None, False)
    monkeypatch.setattr(type(task), "answer", lambda *_: 7)
    with pytest.raises(ValueError, match=rf"{task.name}: .*answer\(\) gives 7, which is neither"):
        tasks.judge(task, problem, right)


def test_problems_that_are_none_are_named(monkeypatch):
    task, fine = tasks.get("last_digit"), tasks.get("last_digit").problems("test", 2, 0)
    assert tasks.problems_of(task, "test", 2, 0) == fine

    def gone(*_):
        raise KeyError("gone")

    for wrong, message in [
        (lambda *_: [], r"problems\(\) gives \[\]; it must be a list of problems"),
        (lambda *_: iter(fine), "it must be a list of problems"),
        (lambda *_: ["1+2="], "gives '1.2='; prompt and answer must be text"),
        (lambda *_: [replace(fine[0], answer=3)], "prompt and answer must be text"),
        (lambda *_: [replace(fine[0], difficulty="hard")], "difficulty a whole number"),
        (lambda *_: [replace(fine[0], difficulty=10**30)], "of at most 63 bits"),
        (gone, r"last_digit: problems\(\) failed \(KeyError: 'gone'\)"),
    ]:
        monkeypatch.setattr(type(task), "problems", wrong)
        with pytest.raises(ValueError, match=message):
            tasks.problems_of(task, "test", 2, 0)


def test_a_slip_is_no_trace_and_neither_holds_the_cue(task):
    assert len(task.cue) == 1 and task.cue in task.alphabet
    for problem in task.problems("train", 200, 6):
        slips = {task.slip(problem, random.Random(seed)) for seed in range(8)}
        assert task.slip(problem, random.Random(0)) in slips  # the rng decides, nothing else
        for text in (*slips, task.trace(problem)):
            assert set(text) <= set(task.alphabet) - {task.cue}
        assert task.trace(problem) not in slips and len(slips) > 1
