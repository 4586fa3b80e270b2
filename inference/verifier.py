"""A trained verifier at work: values of solutions, from 0 to 1, in batches, their cost counted."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.special import expit
from tokenizers import Tokenizer
from torch import Tensor

from ..models import KVCache, hub
from ..models.decoder import Decoder, fits
from ..models.flops import verifier_flops
from ..models.verifier import (
    Verifier,
    encode_solutions,
    load_verifier,
    places_of_steps,
    step_ends,
)
from .chat import THINK, THINK_END
from .machine import device, model_hash
from .prompts import LENGTH_STEP, round_up

if TYPE_CHECKING:
    from .search import Judge

Tokens = tuple[int, ...]
ROWS = {"cpu": 8, "cuda": 64}  # that PyTorch reads at once
BLOCK_TOKENS = 2048  # that are read at once in C


class Score(NamedTuple):
    """What a verifier thinks of a completion; each a probability, None where it was not trained to
    tell. end: at its last token. last, least: at the ends of its steps, the last one and the lowest
    of all; at its last token where no step is finished. flops, seconds: what reading it took."""

    end: float | None
    last: float | None
    least: float | None
    flops: int
    seconds: float


class Scorer:
    """A verifier, its tokenizer, and what it can tell.

    A completion's values do not depend on its companions: on a CPU a `Decoder` reads them, and
    PyTorch reads each in a block of a fixed shape that its own length decides.
    """

    def __init__(self, verifier: Verifier, tokenizer: Tokenizer, *, eos: int | None, hash: str):
        self.verifier, self.tokenizer, self.eos, self.hash = verifier.eval(), tokenizer, eos, hash
        self.reading, self.shape = verifier.reading, verifier.config
        self.device = verifier.score.weight.device
        self.decoder = None
        if isinstance(verifier, Verifier) and self.device.type == "cpu":
            if fits(verifier.model, verifier.score.weight.dtype):
                self.decoder = Decoder(verifier.model, head=verifier.score)
        self.think, self.think_end = map(tokenizer.token_to_id, (THINK, THINK_END))
        self.step_ends = step_ends(tokenizer, self.reading.step_end)

    def check(self, prompts: Sequence[str], most: int) -> None:
        """ValueError where this verifier might not read a completion of up to `most` tokens behind
        one of the prompts, to be told before any is drawn."""
        opened = "" if self.think is None else THINK
        pairs = encode_solutions(self.tokenizer, [(prompt, opened, None) for prompt in prompts])
        longest = max(len(tokens) for tokens, _ in pairs)
        if longest + most > self.shape.context:
            raise ValueError(
                f"a problem has up to {longest} tokens and its completion up to {most}; the "
                f"verifier has a context of {self.shape.context}: take a smaller --max-tokens, or "
                "train one with a longer --context"
            )

    def score(self, solutions: Sequence[tuple[str, str, bool]]) -> list[Score]:
        """The scores of completions: (prompt, text, whether it came to its end) each.

        Raises ValueError for a text that the tokenizer does not know or the context does not hold.
        """
        texts = [(p, text, self.eos if whole else None) for p, text, whole in solutions]
        begun = time.perf_counter()
        pairs = encode_solutions(self.tokenizer, texts)
        values = self.values([tuple(tokens) for tokens, _ in pairs])
        seconds = (time.perf_counter() - begun) / max(1, sum(len(tokens) for tokens, _ in pairs))
        return [
            self._score(tokens, start, of, seconds * len(tokens))
            for (tokens, start), of in zip(pairs, values, strict=True)
        ]

    def _score(
        self, tokens: Sequence[int], start: int, values: Sequence[float], seconds: float
    ) -> Score:
        end = values[-1]
        steps = [values[i] for i in self.steps(tokens, start)] or [end]
        told = self.reading.steps
        return Score(
            end=end if self.reading.end else None,
            last=steps[-1] if told else None,
            least=min(steps) if told else None,
            flops=verifier_flops(self.shape, len(tokens)),
            seconds=seconds,
        )

    def steps(self, tokens: Sequence[int], start: int) -> list[int]:
        """Where the steps of a completion end that begins at `start`; none after </think>."""
        return places_of_steps(tokens, start, self.step_ends, self.think_end)

    def values(self, rows: Sequence[Tokens]) -> list[list[float]]:
        """The value after each token of each row, (T,) numbers; ValueError for a row that is longer
        than the verifier's context."""
        context = self.shape.context
        longest = max(map(len, rows), default=0)
        if longest > context:
            raise ValueError(
                f"a problem and its completion have {longest} tokens; the verifier has a context "
                f"of {context}"
            )
        by_width: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            width = len(row) if self.decoder else min(round_up(len(row), LENGTH_STEP), context)
            by_width.setdefault(width, []).append(i)
        found: list[list[float]] = [[] for _ in rows]
        for width, places in by_width.items():
            most = ROWS.get(self.device.type, ROWS["cuda"])
            if self.decoder:
                most = max(1, BLOCK_TOKENS // width)
            for first in range(0, len(places), most):
                block = places[first : first + most]
                padded = [rows[i] + (0,) * (width - len(rows[i])) for i in block]
                if not self.decoder:
                    padded += [(0,) * width] * (most - len(block))
                values = self._read(torch.tensor(padded, device=self.device))
                for i, of in zip(block, values, strict=False):
                    found[i] = of[: len(rows[i])]
        return found

    @torch.inference_mode()
    def _read(self, tokens: Tensor) -> list[list[float]]:
        """The values of tokens (B, T)."""
        if self.decoder is None:
            return self.verifier(tokens).sigmoid().tolist()
        hidden = self.decoder.hidden(tokens, KVCache(self.shape, *tokens.shape))
        # PyTorch's sigmoid rounds otherwise where a number has no whole vector.
        return expit(self.decoder.logits(hidden).squeeze(-1).numpy()).tolist()

    def judge(self, tokenizer: Tokenizer | None = None) -> "Judge":
        """A `search.Judge`: the value of each completion so far, from 0 to 1.

        A verifier of outcomes or of values is asked at the last token. A process verifier is asked
        at the last token when that ends the text, else at the end of the last step (Snell et al.
        2024, "Scaling LLM Test-Time Compute Optimally", section 5.1); before the first, at the last
        token. tokenizer: the generator's; ValueError unless it writes the verifier's tokens.
        """
        if tokenizer is not None and tokenizer.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(
                "the verifier's tokenizer is not the model's; train the verifier with --init MODEL"
            )
        return self._judged

    def _judged(self, prompt: Tokens, completions: Sequence[Tokens]) -> list[float]:
        rows = [(*prompt, *completion) for completion in completions]
        judged = []
        for row, values in zip(rows, self.values(rows), strict=True):
            place, whole = len(row) - 1, row[-1] == self.eos and self.reading.end
            if self.reading.labels == "process" and not whole:
                place = (self.steps(row, len(prompt)) or [place])[-1]
            judged.append(values[place])
        return judged


def open_verifier(path: str | Path, *, on: str | None = None) -> Scorer:
    """The verifier in a folder that `ponder train --verifier` left; ValueError for any other."""
    folder = Path(path)
    verifier = load_verifier(folder, device=on or device())
    eos = hub.read_json(folder / "config.json").get("eos_token_id")
    return Scorer(verifier, hub.load_tokenizer(folder), eos=eos, hash=model_hash(folder))
