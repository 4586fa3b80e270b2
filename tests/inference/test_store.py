import os
import signal
import sqlite3
import subprocess
import sys
import threading
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.inference.store import Key, Record, Store, params_text, parse_params, without_extend

IDENTITY = {"model": "sha256:aa", "task": "last_digit", "config": {"n_layer": 2}}
HOT = "temperature=1.0"


@dataclass(frozen=True)
class Problem:
    prompt: str
    answer: str
    difficulty: int = 1


def record(problem=0, budget=8, sample=0, params=HOT, seed=0, **changes):
    base = Record(
        key=Key(problem, budget, params, seed, sample),
        text="1+2=3</think>3",
        answer="3",
        correct=True,
        prompt_tokens=5,
        sampled_tokens=8,
        forced_tokens=1,
        think_tokens=6,
        logprob=-0.25,
        finish="stop",
        seconds=0.5,
    )
    return replace(base, **changes)


def fill(store, problems=2, budgets=(0, None), samples=3):
    store.add_problems([Problem(f"{i}+1=", str(i + 1), i) for i in range(problems)])
    store.add(
        record(p, b, s, answer=None if s == 2 else str(s), correct=s == p, seconds=p + s / 10)
        for p in range(problems)
        for b in budgets
        for s in range(samples)
    )


def test_what_is_stored_comes_back(tmp_path):
    texts = ["", "\x00 <script>", "a\u202eb", "“é” 日本", "line\nline", "'; DROP TABLE sample; --"]
    records = [record(sample=i, text=t, answer=t or None) for i, t in enumerate(texts)]
    records += [record(sample=len(texts), answer=None, correct=False, logprob=-np.inf)]
    with Store(tmp_path / "new" / "s.sqlite", identity=IDENTITY) as store:
        store.add_problems([Problem("1+2=", "3", 7)])
        store.add(records)
    with Store(tmp_path / "new" / "s.sqlite", identity=None) as store:
        assert store.identity == IDENTITY
        assert store.records(0, budget=8, params=HOT, seed=0) == records
        assert store.problems()[0].difficulty == 7


def test_a_lone_surrogate_does_not_lose_the_batch(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        for _ in range(2):  # what is stored is what a run that goes on is compared with
            store.add_problems([Problem("1+2=\ud800", "3\ud800")])
        store.add([record(text="a\ud800b", answer="\ud800")])
        (kept,) = store.records(0, budget=8, params=HOT, seed=0)
        assert (kept.text, kept.answer) == ("a?b", "?")
        assert (store.problems()[0].prompt, store.problems()[0].answer) == ("1+2=?", "3?")


@given(
    grid=st.sets(
        st.tuples(st.integers(0, 3), st.sampled_from([None, 0, 4]), st.integers(0, 2)), max_size=36
    )
)
@settings(max_examples=30, deadline=None)
def test_missing_is_the_grid_less_the_stored(grid, tmp_path_factory):
    with Store(tmp_path_factory.mktemp("s") / "s.sqlite", identity=IDENTITY) as store:
        store.add_problems([Problem(str(i), "1") for i in range(4)])
        store.add(record(p, b, s) for p, b, s in grid)
        store.add([record(0, 0, 0, params="temperature=0.0"), record(1, 0, 0, seed=9)])
        missing = store.missing(
            problems=range(4), budgets=[None, 0, 4], params=HOT, seed=0, samples=3
        )
        full = {Key(p, b, HOT, 0, s) for p in range(4) for b in (None, 0, 4) for s in range(3)}
        assert set(missing) == full - {Key(p, b, HOT, 0, s) for p, b, s in grid}
        assert len(missing) == len(set(missing))
        assert [k.problem for k in missing] == sorted(k.problem for k in missing)
        store.add(record(*k[:2], k.sample) for k in missing)
        assert not store.missing(
            problems=range(4), budgets=[None, 0, 4], params=HOT, seed=0, samples=3
        )


@pytest.mark.parametrize("budget", [None, 0, 8])
def test_the_first_of_two_samples_with_one_key_stays(tmp_path, budget):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        store.add_problems([Problem("1+2=", "3")])
        store.add([record(budget=budget, text="first")])
        store.add([record(budget=budget, text="second"), record(budget=budget, sample=1)])
        assert len(store) == 2
        assert store.records(0, budget=budget, params=HOT, seed=0)[0].text == "first"


def test_pool(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        fill(store, problems=3)
        store.add([record(1, None, 3)])  # problem 1 alone has a fourth sample
        pool = store.pool(budget=None, params=HOT, seed=0, samples=3)
        assert pool.problems.tolist() == [0, 1, 2] and pool.difficulty.tolist() == [0, 1, 2]
        assert pool.correct.tolist() == [[p == s for s in range(3)] for p in range(3)]
        votes = [[pool.answer_texts[a] if a >= 0 else None for a in row] for row in pool.answers]
        assert votes == [["0", "1", None]] * 3
        np.testing.assert_allclose(pool.seconds, [[p + s / 10 for s in range(3)] for p in range(3)])
        assert pool.prompt_tokens.tolist() == [5, 5, 5] and pool.temperature == 1.0

        assert store.pool(budget=None, params=HOT, seed=0, samples=4).problems.tolist() == [1]
        # A growth that has only begun takes no problem away.
        assert store.pool(budget=None, params=HOT, seed=0).correct.shape == (3, 3)
        assert store.pool(budget=0, params=HOT, seed=0, samples=2).correct.shape == (3, 2)
        assert store.pool(budget=7, params=HOT, seed=0).correct.shape == (0, 1)
        found = [(s.budget, s.problems, s.samples) for s in store.settings()]
        assert found == [(0, 3, 3), (None, 3, 4)]


@pytest.mark.parametrize(
    "changed, named",
    [
        ({"model": "sha256:bb"}, "aa.*bb"),
        ({"task": "countdown"}, "last_digit.*countdown"),
        ({"split": "val"}, "split None; this run has split 'val'"),
    ],
)
def test_a_store_of_another_model_or_task_is_refused_and_kept(tmp_path, changed, named):
    path = tmp_path / "s.sqlite"
    with Store(path, identity=IDENTITY) as store:
        fill(store)
    with pytest.raises(ValueError, match=named):
        Store(path, identity=IDENTITY | changed)
    with Store(path, identity=IDENTITY) as store:
        assert len(store) == 12


def test_another_problem_under_the_same_index_is_refused(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        store.add_problems([Problem("1+2=", "3"), Problem("2+2=", "4")])
        store.add_problems([Problem(f"{a}+{b}=", str(a + b)) for a, b in ((1, 2), (2, 2), (2, 3))])
        with pytest.raises(
            ValueError, match=r"prompt of problem 1 is '2\+2=' in the store and '9\+9='"
        ):
            store.add_problems([Problem("1+2=", "3"), Problem("9+9=", "8"), Problem("0+0=", "0")])
        with pytest.raises(ValueError, match="answer of problem 0 is '3' in the store and '4' in"):
            store.add_problems([Problem("1+2=", "4")])
        with pytest.raises(ValueError, match="difficulty of problem 0 is 1 in the store and 2 in"):
            store.add_problems([Problem("1+2=", "3", 2)])
        assert [p.prompt for p in store.problems().values()] == ["1+2=", "2+2=", "2+3="]


def test_files_that_are_no_store(tmp_path):
    path = tmp_path / "s.sqlite"
    with pytest.raises(ValueError, match="no sample store"):
        Store(path, identity=None)
    assert not path.exists()

    path.write_text("not a database at all" * 100)
    with pytest.raises(ValueError, match="not a sample store"):
        Store(path, identity=IDENTITY)
    assert path.read_text().startswith("not a database")

    path.unlink()
    path.touch()
    with pytest.raises(ValueError, match="empty file"):
        Store(path, identity=None)

    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE recipes (name TEXT)")
    with pytest.raises(ValueError, match="SQLite file, but not a sample store"):
        Store(path, identity=IDENTITY)


def test_what_keeps_sqlite_from_the_file_is_a_sentence(tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder: unable to open database file"):
        Store(tmp_path / "folder", identity=IDENTITY)
    monkeypatch.setattr("ponder.inference.store.TIMEOUT", 0)
    path = tmp_path / "s"
    with Store(path, identity=IDENTITY) as store:
        with Store(path, identity=IDENTITY) as other, other.transaction():
            with pytest.raises(ValueError, match=f"{path}: database is locked"):
                store.add_problems([Problem("1+1=", "2")])
        ((pages,),) = store.rows("PRAGMA page_count")
        store.rows(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(ValueError, match=f"{path}: database or disk is full"):
            store.add_problems([Problem("1" * 100_000, "2")])
        assert not store.problems()


def test_another_schema_version(tmp_path):
    path = tmp_path / "s.sqlite"
    Store(path, identity=IDENTITY).close()
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="schema version 99; this ponder reads"):
        Store(path, identity=IDENTITY)


def test_a_failed_batch_leaves_nothing_behind(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        store.add_problems([Problem("1+2=", "3")])
        with pytest.raises(sqlite3.IntegrityError):
            store.add([record(), record(sample=-1)])
        assert len(store) == 0
        store.add([record()])
        assert len(store) == 1


WRITER = """
import sys
from types import SimpleNamespace
from ponder.inference.store import Key, Record, Store
store = Store(sys.argv[1], identity={"model": "m", "task": "t"})
store.add_problems([SimpleNamespace(prompt="1+2=", answer="3", difficulty=1)])
for batch in range(1_000_000):
    keys = [Key(0, 8, "temperature=1.0", 0, batch * 50 + i) for i in range(50)]
    store.add(Record(k, "x" * 1000, "3", True, 5, 8, 1, 6, -0.25, "stop", 0.5) for k in keys)
    print(batch, flush=True)
"""


def test_a_store_is_read_while_it_is_written(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        assert store.rows("PRAGMA journal_mode") == [("wal",)]


def test_a_killed_writer_loses_at_most_its_batch(tmp_path):
    path = tmp_path / "s.sqlite"
    command = [sys.executable, "-c", WRITER, str(path)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    for line in writer.stdout:
        if int(line) >= 9:
            break
    os.kill(writer.pid, signal.SIGKILL)
    written = 10 + len(writer.stdout.read().split())
    assert writer.wait() == -signal.SIGKILL

    with Store(path, identity={"model": "m", "task": "t"}) as store:
        # Every batch that was reported is whole; one more may have landed before its report.
        assert len(store) in (50 * written, 50 * (written + 1))
        (check,) = sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone()
        assert check == "ok"
        missing = store.missing(
            problems=[0], budgets=[8], params=HOT, seed=0, samples=len(store) + 3
        )
        assert [key.sample for key in missing] == [len(store) + i for i in range(3)]


def test_several_writers_at_once(tmp_path):
    path = tmp_path / "s.sqlite"
    failures = []

    def write(worker):
        try:
            with Store(path, identity=IDENTITY) as store:
                store.add_problems([Problem("1+2=", "3"), Problem("2+2=", "4")])
                for batch in range(5):
                    store.add(record(worker % 2, 8, 10 * batch + i) for i in range(10))
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures
    with Store(path, identity=IDENTITY) as store:
        assert len(store) == 100


def test_a_new_store_opened_by_several_at_once(tmp_path):
    failures = []

    def open_it(path, gate):
        gate.wait(60)
        try:
            Store(path, identity=IDENTITY).close()
        except Exception as error:
            failures.append(error)

    for i in range(60):  # one in twenty met the fault
        case = tmp_path / f"{i}.sqlite", threading.Barrier(6)
        workers = [threading.Thread(target=open_it, args=case) for _ in range(6)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures


def sampling(**changes):
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0, "extend": 0}
    return SimpleNamespace(**(plain | changes))


def test_params_text_is_canonical():
    assert params_text(sampling()) == params_text(sampling(temperature=1, top_p=1)) == HOT
    assert params_text(sampling(temperature=0, top_k=5)) == "temperature=0.0"
    full = params_text(sampling(temperature=0.1 + 0.2, top_k=40, top_p=0.95, min_p=0.05))
    assert full == "temperature=0.30000000000000004 top_k=40 top_p=0.95 min_p=0.05"
    assert params_text(sampling(top_k=1)) == "temperature=1.0 top_k=1"
    drawn_out = params_text(sampling(temperature=0, top_k=5, extend=2))
    assert drawn_out == "temperature=0.0 extend=2"
    assert without_extend(drawn_out) == "temperature=0.0" and without_extend(full) == full
    assert parse_params(full)["temperature"] == 0.1 + 0.2


def test_a_merged_store_holds_both_and_what_was_here_stays(tmp_path):
    with Store(tmp_path / "shard.sqlite", identity=IDENTITY) as shard:
        fill(shard, problems=3, samples=2)
        shard.add([record(0, 4, 0, text="theirs", logprob=None)])
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        fill(store, problems=2, samples=3)
        store.add([record(0, 4, 0, text="ours")])
        for _ in range(2):  # a merge that was killed before the shard went is made again
            store.merge(tmp_path / "shard.sqlite")
            assert len(store) == 2 * 2 * 3 + 1 * 2 * 2 + 1
            assert sorted(store.problems()) == [0, 1, 2]
            (kept,) = store.records(0, budget=4, params=HOT, seed=0)
            assert kept.text == "ours"
            assert len(store.records(2, budget=None, params=HOT, seed=0)) == 2
    with Store(tmp_path / "new.sqlite", identity=IDENTITY) as store:
        store.merge(tmp_path / "shard.sqlite")
        (theirs,) = store.records(0, budget=4, params=HOT, seed=0)
        assert theirs.logprob is None and theirs.text == "theirs"
        store.add([record(0, 4, 1)])
        pool = store.pool(budget=4, params=HOT, seed=0)
        assert np.isnan(pool.logprob[0, 0]) and pool.logprob[0, 1] == -0.25


def test_a_store_of_something_else_is_not_merged(tmp_path):
    with Store(tmp_path / "s.sqlite", identity=IDENTITY) as store:
        fill(store)
        Store(tmp_path / "model.sqlite", identity=IDENTITY | {"model": "b"}).close()
        with pytest.raises(ValueError, match="a store holds one model"):
            store.merge(tmp_path / "model.sqlite")
        with Store(tmp_path / "problem.sqlite", identity=IDENTITY) as other:
            other.add_problems([Problem("9+9=", "8", 0)])
            other.add([record(0, 99, 0)])
        with pytest.raises(ValueError, match=r"prompt of problem 0 is '9\+9=' there and '0\+1='"):
            store.merge(tmp_path / "problem.sqlite")
        with Store(tmp_path / "answer.sqlite", identity=IDENTITY) as other:
            other.add_problems([Problem("0+1=", "8", 0)])
        with pytest.raises(ValueError, match="answer of problem 0 is '8' there and '1' in"):
            store.merge(tmp_path / "answer.sqlite")
        assert len(store) == 2 * 2 * 3
        assert store.pool(budget=None, params=HOT, seed=0).samples == 3  # it still works
