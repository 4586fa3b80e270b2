"""Stores of samples that no model wrote, for what learns from them."""

import random

from ponder import tasks
from ponder.inference.store import Key, Record, Store


def write_store(path, task, split, solutions, *, seed=0):
    """solutions: for each problem of the split, (text, whether it came to its end, right) of its
    samples. Returns the path."""
    task = tasks.get(task)
    problems = task.problems(split, len(solutions), seed)
    with Store(path, identity={"model": "m", "task": task.name, "split": split}) as store:
        store.add_problems(problems)
        store.add(
            Record(
                key=Key(i, None, "temperature=1.0", seed, s),
                text=text,
                answer=task.answer(text),
                correct=right,
                prompt_tokens=len(problem.prompt) + 1,
                sampled_tokens=len(text) - 6,
                forced_tokens=0,
                think_tokens=len(text) - 15,
                logprob=-1.0,
                finish="stop" if whole else "length",
                seconds=0.01,
            )
            for i, problem in enumerate(problems)
            for s, (text, whole, right) in enumerate(solutions[i])
        )
    return path


def solutions(split, count, samples, *, seed=0):
    """Solutions of last_digit: half of them right; of the others half have another answer than
    their own last step, and half are cut while they think."""
    task, draw = tasks.get("last_digit"), random.Random(f"{split}/{seed}")
    found = []
    for problem in task.problems(split, count, 0):
        trace, row = task.trace(problem), []
        for _ in range(samples):
            if draw.random() < 0.5:
                row.append((f"<think>{trace}</think>{problem.answer}", True, True))
            elif draw.random() < 0.5:
                other = draw.choice([c for c in "0123456789" if c != problem.answer])
                row.append((f"<think>{trace}</think>{other}", True, False))
            else:
                row.append((f"<think>{trace[: len(trace) // 2]}", False, False))
        found.append(row)
    return found
