"""Memory: how many samples of the engine's fit at once, reckoned before any is drawn."""

import warnings
from collections.abc import Iterable
from typing import Any

from ..models.memory import GIB, require, sampling_memory
from .prompts import round_up
from .request import Request


class Plan:
    """How many slots a run has, for the requests that it is to take.

    Of the numbers of slots in `choices`, from the most to the least, the first with which the
    requests fit into `free` bytes (None: any fits); a warning where that is not the first of all.
    ahead: tokens for which a sample's cache has room behind its last one. run: what else
    `sampling_memory` asks for. Raises ValueError where none fits.
    """

    def __init__(
        self,
        requests: Iterable[Request],
        choices: Iterable[int],
        free: int | None,
        *,
        ahead: int,
        **run: Any,
    ):
        self.free, self.ahead, self.run = free, ahead, run
        self.prompt = self.new = 0
        self._grow(requests)
        most, *fewer = choices
        self.slots = most
        for slots in fewer:
            if not self._lacks():
                break
            self.slots = slots
        self._check()
        if self.slots < most:
            warnings.warn(
                f"{most} slots need {self.needed(most) / GIB:.3g} GiB of memory and "
                f"{(free or 0) / GIB:.3g} GiB are free: {self.slots} slots are used",
                stacklevel=3,
            )

    def admit(self, request: Request) -> None:
        """Reckon with one more request; ValueError where the slots have no memory for it."""
        if self._grow([request]):
            self._check()

    def parts(self, slots: int) -> dict[str, float]:
        """Bytes by part; caches have the lengths that the engine rounds up to."""
        prompt, new = round_up(self.prompt), round_up(self.new + self.ahead)
        return sampling_memory(slots=slots, prompt=prompt, new=new, **self.run)

    def needed(self, slots: int) -> float:
        return sum(self.parts(slots).values())

    def _grow(self, requests: Iterable[Request]) -> bool:
        before = self.prompt, self.new
        for request in requests:
            self.prompt = max(self.prompt, len(request.prompt))
            self.new = max(self.new, request.params.max_tokens)
        return before != (self.prompt, self.new)

    def _lacks(self) -> bool:
        return self.free is not None and self.needed(self.slots) > self.free

    def _check(self) -> None:
        if self.free is not None:
            require(
                self.parts(self.slots),
                self.free,
                f"drawing {self.slots} samples at a time of up to {self.new} tokens behind prompts "
                f"of up to {self.prompt}",
                "fewer slots, a smaller max_tokens or shorter prompts need less",
            )
