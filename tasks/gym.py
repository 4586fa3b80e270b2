"""The tasks of the package reasoning-gym (the extra `gym`), as `gym:NAME`.

They are generated without end and scored by their own verifiers, but come without worked chains of
thought: they are for sweeps, not for training.
"""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .task import PATIENCE, Problem, TooFew, check_ask, final_text, split_of

_TAGGED = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
ENDLESS = 1 << 30  # entries are made when they are asked for


@dataclass(frozen=True)
class Gym:
    """One reasoning-gym data set in its default configuration."""

    dataset: str

    def __post_init__(self):
        self._create(size=1, seed=0)  # an unknown name, or no package: said at once

    @property
    def name(self) -> str:
        return f"gym:{self.dataset}"

    @property
    def alphabet(self) -> str:
        raise ValueError(
            f"{self.name} has no worked chains of thought to train on; it is for sweeps"
        )

    def problems(self, split: str, count: int, seed: int) -> list[Problem]:
        """count distinct problems of a split ("train", "val" or "test"), which a hash of the
        question decides, so that the splits are disjoint whatever the seeds. A longer list begins
        with the shorter one. Raises ValueError for an unknown split or a negative count, TooFew
        where no new problems turn up.
        """
        check_ask(self.name, split, count)
        entries = self._create(size=ENDLESS, seed=seed)
        found: dict[str, Problem] = {}
        index = misses = 0
        while len(found) < count:
            entry = entries[index]
            index += 1
            prompt = str(entry["question"]).strip() + "\n"
            if split_of(prompt) != split or prompt in found:
                misses += 1
                if misses == PATIENCE:
                    raise TooFew(
                        f"{self.name}: {split} holds about {len(found)} distinct problems; {count} "
                        "were asked for",
                        len(found),
                    )
                continue
            misses = 0
            gold = "" if entry["answer"] is None else str(entry["answer"])
            found[prompt] = Problem(self.name, prompt, gold, 0, (entry,))
        return list(found.values())

    def trace(self, problem: Problem, budget: int | None = None) -> str:
        """ "", as there is no worked chain of thought."""
        return ""

    def answer(self, text: str) -> str | None:
        """What the last <answer> tags hold, else all that follows `</think>`."""
        final = final_text(text)
        if not final:
            return None
        tagged = _TAGGED.findall(final)
        return (tagged[-1] if tagged else final).strip() or None

    def verify(self, problem: Problem, text: str) -> bool:
        """Whether the data set's own verifier gives full marks. Some give a part of them to
        anything, and some raise on what they do not expect: both are wrong answers."""
        given = self.answer(text)
        if given is None:
            return False
        try:
            return self._scorer.score_answer(given, problem.data[0]) == 1.0
        except Exception:  # noqa: BLE001  any of a hundred verifiers, on what a model wrote
            return False

    @cached_property
    def _scorer(self) -> Any:
        return self._create(size=1, seed=0)

    def _create(self, size: int, seed: int) -> Any:
        try:
            import reasoning_gym  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                f"gym tasks need the package reasoning-gym (missing: {error.name}): "
                "pip install reasoning-gym"
            ) from None
        try:
            return reasoning_gym.create_dataset(self.dataset, size=size, seed=seed)
        except ValueError as error:
            raise ValueError(f"gym:{self.dataset} could not be made: {error}") from None
