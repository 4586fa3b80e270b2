"""Data sets from outside: local files of the Hub's schemas, and reasoning-gym."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import ponder
from ponder import tasks
from ponder.tasks import answers, split_of

GSM8K = Path(ponder.__file__).parent.parent / "shared/data/gsm8k_train.jsonl"


def gsm8k_rows(count, first=0):
    return [
        {
            "question": f"Ann has {i} apples and buys {i}. How many has she?",
            "answer": f"She has {i}+{i}=<<{i}+{i}={2 * i}>>{2 * i:,}.\nThat is all.\n"
            f"#### {2 * i:,}",
        }
        for i in range(first, first + count)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_single_file_is_divided_into_disjoint_splits(tmp_path):
    task = tasks.get(f"gsm8k:{write(tmp_path / 'a.jsonl', gsm8k_rows(1000) * 2)}")
    sizes, seen = {}, set()
    for split in ("train", "val", "test"):
        prompts = [p.prompt for p in task._split(split)]
        assert all(split_of(p) == split for p in prompts)
        assert not seen & set(prompts) and len(set(prompts)) == len(prompts)
        seen |= set(prompts)
        sizes[split] = len(prompts)
    assert sum(sizes.values()) == 1000 and sizes["train"] > 850
    five, ten = task.problems("test", 5, 3), task.problems("test", 10, 3)
    assert ten[:5] == five and five != task.problems("test", 5, 4)
    assert len({p.prompt for p in ten}) == 10
    with pytest.raises(ValueError, match=rf"test holds {sizes['test']} problems; 1000 were asked"):
        task.problems("test", 1000, 0)
    assert tasks.at_most(task, "test", 1000, 3) == task.problems("test", sizes["test"], 3)
    assert len(task.problems("train", 2000, 0)) == 2000  # train goes round again


def test_a_gsm8k_problem(tmp_path):
    task = tasks.get(f"gsm8k:{write(tmp_path / 'a.jsonl', gsm8k_rows(900, first=600))}")
    problem = next(p for p in task._split("train") if p.prompt.startswith("Ann has 613 "))
    assert (problem.answer, problem.difficulty) == ("1226", 2)
    assert problem.prompt.endswith("has she?\n")
    assert task.trace(problem) == "She has 613+613=1,226.\nThat is all.\n"
    assert task.trace(problem, 1) == "She has 613+613=1,226.\n" and task.trace(problem, 0) == ""
    for text in (
        "<think>x</think>1226",
        "#### $1,226.00",
        r"\boxed{1226}",
        "It makes 1226 apples.",
    ):
        assert task.verify(problem, text), text
    for text in ("<think>1226</think>", "<think>1226", "1227", "", "#### 12 26"):
        assert not task.verify(problem, text), text
    assert task.answer("so she has 1,226 of them") == "1226"
    assert set("Ann,0123456789#") - {"#"} <= set(task.alphabet) and "#" not in task.alphabet


def test_a_data_set_s_content_is_its_problems_solutions_and_answers(tmp_path):
    rows = gsm8k_rows(40)
    known = set()
    for changed in (None, "question", "solution", "answer"):
        row = dict(rows[0])
        if changed == "question":
            row["question"] = "Otherwise: " + row["question"]
        elif changed == "solution":
            row["answer"] = "First of all.\n" + row["answer"]
        elif changed == "answer":
            row["answer"] = row["answer"].rpartition("####")[0] + "#### 5"
        folder = tmp_path / str(changed)
        folder.mkdir()
        write(folder / "train.jsonl", [row, *rows[1:]])
        write(folder / "test.jsonl", gsm8k_rows(20, first=300))
        known.add(tasks.get(f"gsm8k:{folder}").content)  # type: ignore[attr-defined]
    assert len(known) == 4


def test_a_folder_keeps_the_official_splits(tmp_path):
    write(tmp_path / "train.jsonl", gsm8k_rows(400))
    rows = gsm8k_rows(60, first=390)  # ten of them stand in train as well
    (tmp_path / "test.json").write_text(json.dumps(rows))
    task = tasks.get(f"gsm8k:{tmp_path}")
    test = {p.prompt for p in task.problems("test", 60, 0)}
    assert len(test) == 60
    train, val = ({p.prompt for p in task._split(s)} for s in ("train", "val"))
    assert len(train) + len(val) == 390 and not test & (train | val) and not train & val


def test_a_split_whose_questions_all_stand_in_test_is_none(tmp_path):
    for split in ("train", "test"):
        write(tmp_path / f"{split}.jsonl", gsm8k_rows(50))
    task = tasks.get(f"gsm8k:{tmp_path}")
    assert len(task.problems("test", 50, 0)) == 50
    with pytest.raises(ValueError, match="has no train problems here; there are test"):
        task.problems("train", 5, 0)


def test_a_file_may_hold_line_separators_of_unicode(tmp_path):
    rows = gsm8k_rows(200)
    rows[0]["question"] += "\u2028 Now?\x85"
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    task = tasks.get(f"gsm8k:{path}")
    assert sum(len(task._split(split)) for split in ("train", "val", "test")) == 200


def test_parquet(tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow comes with datasets")
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(
            [{"problem": "1+1?", "answer": 2, "id": 0}, {"problem": "9*9?", "answer": 81, "id": 1}]
        ),
        tmp_path / "aime.parquet",
    )
    task = tasks.get(f"aime25:{tmp_path / 'aime.parquet'}")
    assert {p.answer for p in task.problems("test", 2, 0)} == {"2", "81"}
    assert task.verify(task._split("test")[1], r"\boxed{081}")
    with pytest.raises(ValueError, match="aime25 has no train problems here; there are test"):
        task.problems("train", 1, 0)


def test_math500_compares_formulas(tmp_path, monkeypatch):
    row = {
        "problem": "Half of x?",
        "solution": "Divide.\n\\[x/2\\]\nSo $\\boxed{\\frac{x}{2}}$.",
        "answer": "\\frac{x}{2}",
        "subject": "Algebra",
        "level": 3,
        "unique_id": "test/algebra/1.json",
    }
    path = write(tmp_path / "m.jsonl", [row])
    monkeypatch.setattr(answers, "have_math_verify", lambda: False)
    with pytest.raises(ValueError, match="math500 .* math-verify, which is not installed: pip"):
        tasks.get(f"math500:{path}")
    monkeypatch.undo()
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    task = tasks.get(f"math500:{path}")
    (problem,) = task.problems("test", 1, 0)
    assert problem.difficulty == 3 and task.trace(problem, 1) == "Divide.\n"
    assert task.verify(problem, r"<think>so</think>\boxed{0.5x}")
    assert task.verify(problem, r"The answer is $\dfrac{x}{2}$.")
    assert not task.verify(problem, r"\boxed{x}") and not task.verify(problem, r"\boxed{")
    assert task.answer(r"\boxed{\frac{x}{2}}") == task.answer(r"\boxed{x/2}")


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "x", "a.txt is none of .jsonl, .json, .parquet"),
        ("a.jsonl", "{", "a.jsonl could not be read"),
        ("a.jsonl", "[1]", "holds no list of rows"),
        ("a.jsonl", '{"question": "q"}', "a row has no text 'answer'; it has question"),
        ("a.jsonl", '{"question": "q", "answer": "well"}', "'well' ends in no number"),
        ("a.jsonl", "[" * 200_000, "a.jsonl could not be read"),
        (
            *("a.jsonl", r'{"question": "1 \ud800", "answer": "#### 1"}'),
            r"the problem '1 \\ud800\\n' has '\\ud800', which is no character of Unicode",
        ),
        ("a.jsonl", "", "gsm8k has no train problems here; there are none at all"),
        (None, None, "there is no file or folder"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    if name:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tasks.get(f"gsm8k:{tmp_path / (name or 'none.jsonl')}").problems("train", 1, 0)


def test_a_level_that_is_no_number_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "have_math_verify", lambda: True)
    monkeypatch.setattr(answers, "canonical", lambda text: text)
    path = write(tmp_path / "a.jsonl", [{"problem": "1+1", "answer": "2", "level": "Level 3"}])
    with pytest.raises(ValueError, match="math500: level is 'Level 3'; it must be a number"):
        tasks.get(f"math500:{path}").problems("test", 1, 0)


def test_an_empty_folder_and_a_hub_out_of_reach(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="holds neither train nor test"):
        tasks.get(f"gsm8k:{tmp_path}").problems("test", 1, 0)

    def load_dataset(path, name, split):
        assert (path, name, split) == ("openai/gsm8k", "main", "train")
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(ValueError, match=r"openai/gsm8k could not.*no route\).*as gsm8k:PATH"):
        tasks.get("gsm8k").problems("test", 1, 0)


def test_the_hubs_splits(monkeypatch):
    def load_dataset(path, name, split):
        return gsm8k_rows(300) if split == "train" else gsm8k_rows(20, first=300)

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    task = tasks.get("gsm8k")
    assert len(task.problems("test", 20, 0)) == 20
    assert len(task._split("train")) + len(task._split("val")) == 300


@pytest.mark.skipif(not GSM8K.exists(), reason="the real data set is not here")
def test_every_row_of_the_real_gsm8k():
    task = tasks.get(f"gsm8k:{GSM8K}")
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    problems = {p.prompt: p for s in ("train", "val", "test") for p in task._split(s)}
    assert len(problems) > 7400
    for row in rows:
        problem = problems[row["question"].strip() + "\n"]
        assert task.verify(problem, f"<think>x</think>{row['answer']}")
        assert task.verify(problem, f"{task.trace(problem)}</think>{problem.answer}")
        assert "<<" not in task.trace(problem) and problem.difficulty >= 1


def test_names_from_outside_are_checked():
    with pytest.raises(ValueError, match="unknown task 'gym:'; known: .*math500.*, gym:NAME"):
        tasks.get("gym:")
    with pytest.raises(ValueError, match="gsm8k: unknown setting 'operands'; it has none"):
        tasks.get("gsm8k", operands=(1, 2))


class FakeGym:
    """What is asked of reasoning-gym: entries by index, and a verifier of doubtful character."""

    def __init__(self, name, size, seed):
        if name == "unknown":
            raise ValueError("Dataset 'unknown' not registered")
        self.size, self.seed = size, seed
        self.kinds = 30 if name == "small" else 10**9

    def __getitem__(self, i):
        value = (self.seed * 7919 + i) % self.kinds
        return {"question": f"{value}+1=", "answer": str(value + 1), "metadata": {}}

    def score_answer(self, answer, entry):
        if answer == "crash":
            raise KeyError("metadata")
        return 1.0 if answer == entry["answer"] else 0.01


@pytest.fixture
def gym(monkeypatch):
    module = SimpleNamespace(create_dataset=FakeGym)
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    return lambda name="sums": tasks.get(f"gym:{name}")


def test_gym_problems(gym, monkeypatch):
    task = gym()
    assert task.name == "gym:sums"
    by_split = {s: {p.prompt for p in task.problems(s, 40, 1)} for s in ("train", "val", "test")}
    assert by_split["train"] != {p.prompt for p in task.problems("train", 40, 2)}
    assert all(len(prompts) == 40 for prompts in by_split.values())
    assert not by_split["train"] & by_split["test"] and not by_split["val"] & by_split["test"]
    problem = task.problems("test", 1, 1)[0]
    right = problem.answer
    assert task.verify(problem, f"<think>hm</think> {right}\n")
    assert task.verify(problem, f"so <answer>{right}</answer>, I think")
    assert task.verify(problem, f"<answer>0</answer>, no, <answer>{right}</answer>")
    # Partial credit and a verifier that raises are both wrong.
    assert not task.verify(problem, "junk") and not task.verify(problem, "crash")
    assert not task.verify(problem, "") and not task.verify(problem, f"<think>{right}")
    assert task.trace(problem) == ""
    with pytest.raises(ValueError, match="gym:sums has no worked chains of thought"):
        _ = task.alphabet
    monkeypatch.setattr("ponder.tasks.gym.PATIENCE", 100)
    small = gym("small")
    with pytest.raises(tasks.TooFew, match=r"small: test holds about \d distinct.*; 50 were") as e:
        small.problems("test", 50, 0)
    assert tasks.at_most(small, "test", 50, 0) == small.problems("test", e.value.held, 0)
    with pytest.raises(ValueError, match="gym:unknown could not be made: Dataset 'unknown'"):
        gym("unknown")


def test_gym_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="need the package reasoning-gym .*pip install"):
        tasks.get("gym:chain_sum")


def test_the_real_gym():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    task = tasks.get("gym:chain_sum")
    for problem in task.problems("test", 5, 0):
        assert task.verify(problem, f"<think>…</think>{problem.answer}")
        assert not task.verify(problem, "junk")


@pytest.mark.parametrize(
    ("gold", "given"),
    [
        (r"x \in [-2,7]", "[-2,7]"),
        ("x=5", "5"),
        (r"\sec^2 x", r"\frac{1}{\cos^2 x}"),
        (r"\cos x", r"\cos(x)"),
        (r"\text{Evelyn}", "Evelyn"),
    ],
)
def test_an_answer_is_compared_with_what_the_data_set_says(tmp_path, gold, given):
    """Not with sympy's way of writing it, which is no LaTeX."""
    pytest.importorskip("math_verify", reason="math-verify is not installed")
    row = dict(problem="What is it?", answer=gold, solution="See.", level=1)
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    task = tasks.get(f"math500:{tmp_path / 'rows.jsonl'}")
    [problem] = task.problems("test", 1, 0)
    assert task.verify(problem, rf"\boxed{{{given}}}")
    assert not task.verify(problem, r"\boxed{x^7 + 1}")
