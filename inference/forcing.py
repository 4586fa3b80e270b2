"""Forced tokens: where a row gets </think>, or the cue, rather than what it drew.

A thought is cut short by a </think> at its budget, and drawn out by the cue in a </think>'s place:
the model, which was about to close it, takes it up again. Source: Muennighoff et al. 2025, "s1:
Simple test-time scaling", section 3.1 (budget forcing; their cue is "Wait").
"""

import torch
from torch import Tensor

from .request import SamplingParams

NEVER = 1 << 62


class Forcing:
    """What is forced on each of `rows` samples that decode together.

    think_end: the id of </think>, None where the model has none, and nothing is forced; cue: the
    ids of the cue's tokens. `forced` (rows,) counts the tokens that were forced.
    """

    def __init__(
        self,
        rows: int,
        *,
        think_end: int | None,
        cue: tuple[int, ...] = (),
        device: torch.device | str,
    ):
        self.think_end = think_end
        self.cue = torch.tensor(cue, dtype=torch.int64, device=device)
        self.state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        # force_at: the count of tokens at which </think> is forced; extend: how often one is still
        # to be suppressed; cue_at: which token of the cue is next, 0 where none is under way.
        self.force_at, self.extend, self.cue_at, self.forced = self.state

    def start(self, rows: Tensor, params: list[SamplingParams]) -> None:
        """Rows (n,) that begin anew, and how each is drawn."""
        columns = [(NEVER if p.budget is None else p.budget, p.extend, 0, 0) for p in params]
        self.state.index_copy_(1, rows, torch.tensor(columns, device=rows.device).t())

    def __call__(self, token: Tensor, count: Tensor, done: Tensor) -> Tensor:
        """Puts what is forced into token (rows,), in place; returns which rows that were (rows,).

        count (rows,): the tokens that each row has got before; done (rows,): rows that are idle,
        of which nothing is counted.
        """
        if self.think_end is None:
            return torch.zeros_like(done)
        forced = count == self.force_at
        token.masked_fill_(forced, self.think_end)
        if len(self.cue):
            begins = (token == self.think_end) & (self.extend > 0) & (self.cue_at == 0)
            cued = (begins | (self.cue_at > 0)) & ~forced
            token.copy_(torch.where(cued, self.cue[self.cue_at], token))
            self.extend -= (begins & cued).long()
            self.cue_at.copy_(torch.where(cued, (self.cue_at + 1) % len(self.cue), 0))
            self.extend.masked_fill_(token == self.think_end, 0)  # what is closed stays so
            forced = forced | cued
        self.force_at.masked_fill_(token == self.think_end, NEVER)
        self.forced += forced > done  # forced and not done
        return forced
