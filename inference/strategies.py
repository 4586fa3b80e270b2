"""Ways to spend compute at inference, computed from one stored pool of samples.

A strategy says how often it is right on each problem and how often it draws each stored sample;
what that costs is the same sum for all of them. To add one, write a `Strategy` and put it into
STRATEGIES.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np

from ..models import GPTConfig
from ..models.flops import prefill_flops, sample_flops
from . import estimators
from .store import Pool, parse_params


class Choice(NamedTuple):
    """scores (P,) in [0, 1]: the chance of being right; drawn (P, N): how often each stored sample
    is drawn, on average; verified: whether the verifier reads what is drawn."""

    scores: np.ndarray
    drawn: np.ndarray
    verified: bool = False


@dataclass(frozen=True)
class Outcome:
    """Scores in [0, 1] and costs of P problems, each array (P,); samples is how many were drawn,
    flops is NaN where the model's shape is not known. Of the sampled and forced tokens
    pruned_tokens are in no completion that was finished; of the flops judge_flops are a verifier's,
    which chose among samples or judged a search's lines, and whose time seconds includes.
    """

    scores: np.ndarray
    samples: np.ndarray
    prompt_tokens: np.ndarray
    sampled_tokens: np.ndarray
    forced_tokens: np.ndarray
    flops: np.ndarray
    seconds: np.ndarray
    judge_flops: np.ndarray
    pruned_tokens: np.ndarray

    @property
    def tokens(self) -> np.ndarray:
        """All that were read or written, (P,)."""
        return self.prompt_tokens + self.sampled_tokens + self.forced_tokens


def spend(pool: Pool, choice: Choice, shape: GPTConfig | None) -> Outcome:
    """What the samples of a choice cost: the prompt is read once, and each sample costs its own
    tokens as often as it is drawn, and a verifier's reading where one chooses. shape None: FLOPs
    are unknown."""
    flops = np.full(len(pool.problems), np.nan)
    if shape is not None:
        new_tokens = pool.sampled_tokens + pool.forced_tokens
        decode = sample_flops(shape, pool.prompt_tokens[:, None], new_tokens)
        flops = prefill_flops(shape, pool.prompt_tokens) + (choice.drawn * decode).sum(1)
    judge_flops, seconds = np.zeros(len(flops)), pool.seconds
    if choice.verified and pool.scores is not None:
        judge_flops = (choice.drawn * pool.scores.flops).sum(1)
        seconds = seconds + pool.scores.seconds
    return Outcome(
        scores=choice.scores,
        samples=choice.drawn.sum(1),
        prompt_tokens=pool.prompt_tokens,
        sampled_tokens=(choice.drawn * pool.sampled_tokens).sum(1),
        forced_tokens=(choice.drawn * pool.forced_tokens).sum(1),
        flops=flops + judge_flops,
        seconds=(choice.drawn * seconds).sum(1),
        judge_flops=judge_flops,
        pruned_tokens=np.zeros(len(flops)),
    )


def evenly(pool: Pool, scores: np.ndarray, k: int) -> Choice:
    """scores (P,) for k samples, any of the stored ones being as likely as any other."""
    return Choice(scores, np.full(pool.correct.shape, k / pool.samples))


class Strategy(ABC):
    """name: what it is called in results.csv. oracle: whether it is a bound on what others can
    reach, so that it never competes with them."""

    name: str
    oracle: ClassVar[bool] = False

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        """The numbers of samples, among those asked for, that it can be run with on this pool: all
        above one that the pool can fill."""
        return [k for k in samples if 1 < k <= pool.samples] if pool.temperature > 0 else []

    @abstractmethod
    def run(self, pool: Pool, k: int) -> Choice:
        """Its scores and draws with (at most) k samples of each problem."""


class Sampling(Strategy):
    """One sample at a temperature; its accuracy is the mean over all the stored ones."""

    name = "sampling"

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        return [1] if (pool.temperature > 0) == (self.name == "sampling") else []

    def run(self, pool: Pool, k: int) -> Choice:
        return evenly(pool, pool.correct.mean(1), 1)


class Greedy(Sampling):
    """The most likely token at every step: one answer, always the same."""

    name = "greedy"


class SelfConsistency(Strategy):
    """The most common answer of k samples (Wang et al. 2022)."""

    name = "self-consistency"

    def run(self, pool: Pool, k: int) -> Choice:
        return evenly(pool, estimators.maj_at_k(pool.answers, pool.correct, k), k)


Confidence = Callable[[Pool], np.ndarray]  # a number for each sample, (P, N)


def log_probability(pool: Pool) -> np.ndarray:
    """Of all the sampled tokens together, (P, N) in nats."""
    return pool.logprob


def mean_log_probability(pool: Pool) -> np.ndarray:
    """Of a sampled token, (P, N) in nats, so that long texts are not at a disadvantage."""
    return pool.logprob / np.maximum(pool.sampled_tokens, 1)


def self_confidence(pool: Pool) -> np.ndarray:
    """(P, N): the probability of a sampled token at the mean, over a softmax temperature of 0.1: a
    sample at 0.9 has as much to say as 2.7 at 0.8. Source: Taubenfeld et al. 2025, "Confidence
    Improves Self-Consistency in LLMs" (their temperature was tuned on each model; this one is
    fixed)."""
    return np.exp(mean_log_probability(pool)) / 0.1


def by_verifier(which: Literal["end", "last", "least"], *, log: bool = False) -> Confidence:
    """A verifier's value of each sample (see `verifier.Score`), or its logarithm; NaN without."""

    def confidence(pool: Pool) -> np.ndarray:
        if pool.scores is None:
            return np.full(pool.correct.shape, np.nan)
        value = getattr(pool.scores, which)
        return np.log(np.maximum(value, 1e-30)) if log else value

    return confidence


@dataclass(frozen=True)
class ByConfidence(Strategy):
    """What goes by a number for each sample; verified: by a verifier's, whose reading is paid."""

    name: str
    confidence: Confidence
    verified: bool = False

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        return super().sizes(pool, samples) if _finite(self.confidence(pool)) else []


class WeightedVote(ByConfidence):
    """The answer with the largest sum of exp(confidence) over k samples."""

    def run(self, pool: Pool, k: int) -> Choice:
        weights = self.confidence(pool)
        scores = estimators.weighted_vote_at_k(pool.answers, pool.correct, weights, k)
        return evenly(pool, scores, k)._replace(verified=self.verified)


class BestOfN(ByConfidence):
    """The one of k samples with the highest confidence."""

    def run(self, pool: Pool, k: int) -> Choice:
        scores = estimators.best_of_at_k(self.confidence(pool), pool.correct, k)
        return evenly(pool, scores, k)._replace(verified=self.verified)


def _finite(values: np.ndarray) -> bool:
    """Whether every sample has a value: a server need not tell log-probabilities."""
    return bool(np.isfinite(values).all())


class AdaptiveConsistency(Strategy):
    """Sample one by one until the leading answer is likely to stay ahead (Aggarwal et al. 2023)."""

    name = "adaptive-consistency"
    threshold = 0.95

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        # Unanimous samples reach the threshold at 1 - 2^-(n + 1); before that it is a plain vote.
        return [k for k in super().sizes(pool, samples) if 1 - 0.5**k >= self.threshold]

    def run(self, pool: Pool, k: int) -> Choice:
        rule = estimators.beta_rule(self.threshold)
        return Choice(*estimators.stop_early(pool.answers, pool.correct, k, rule))


class EarlyStopping(Strategy):
    """Sample in windows until one is unanimous (Li et al. 2024, ESC)."""

    name = "early-stopping"
    window = 4

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        return [k for k in super().sizes(pool, samples) if k > self.window]

    def run(self, pool: Pool, k: int) -> Choice:
        rule = estimators.unanimous_rule(self.window)
        return Choice(*estimators.stop_early(pool.answers, pool.correct, k, rule))


class CertainMode(Strategy):
    """Sample until the model's probabilities prove which answer is its most probable one."""

    name = "certain-mode"

    def sizes(self, pool: Pool, samples: Sequence[int]) -> list[int]:
        # Log-probabilities are the plain model's: those of another temperature, or behind a
        # filter, add up to something else than one.
        plain = parse_params(pool.params) == {"temperature": 1.0}
        return super().sizes(pool, samples) if plain and _finite(pool.logprob) else []

    def run(self, pool: Pool, k: int) -> Choice:
        rule = estimators.certain_rule(pool.texts, pool.logprob)
        return Choice(*estimators.stop_early(pool.answers, pool.correct, k, rule))


class PassAtK(Strategy):
    """Whether any of k samples is right (Chen et al. 2021): what a perfect verifier would reach."""

    name = "pass@k"
    oracle = True

    def run(self, pool: Pool, k: int) -> Choice:
        return evenly(pool, estimators.pass_at_k(pool.correct, k), k)


STRATEGIES: dict[str, Strategy] = {
    strategy.name: strategy
    for strategy in (
        Greedy(),
        Sampling(),
        SelfConsistency(),
        WeightedVote("probability-vote", log_probability),
        WeightedVote("mean-probability-vote", mean_log_probability),
        WeightedVote("confidence-vote", self_confidence),
        BestOfN("best-of-n", mean_log_probability),
        # By a trained verifier: its word on the whole solution, Cobbe et al. 2021; on the last
        # step, Snell et al. 2024; on the worst step, Lightman et al. 2023, Wang et al. 2024
        # (Math-Shepherd). The vote weighted by it: Li et al. 2023, "Making Language Models Better
        # Reasoners with Step-Aware Verifier".
        BestOfN("verifier-best-of-n", by_verifier("end"), verified=True),
        BestOfN("last-step-best-of-n", by_verifier("last"), verified=True),
        BestOfN("worst-step-best-of-n", by_verifier("least"), verified=True),
        WeightedVote("verifier-vote", by_verifier("end", log=True), verified=True),
        WeightedVote("last-step-vote", by_verifier("last", log=True), verified=True),
        AdaptiveConsistency(),
        EarlyStopping(),
        CertainMode(),
        PassAtK(),
    )
}
