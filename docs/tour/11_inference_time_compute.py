# %% [markdown]
# # Inference-time compute
#
# A finished model can still be made better, by letting it think longer. Two ways:
#
# - a longer *chain of thought*: text in which the model works step by step before it answers, and
#   which it reads as it goes on,
# - more samples, of which the most common answer is taken (*self-consistency*, Wang et al. 2022).
#
# OpenAI's o1 (2024) made it an axis: accuracy against the logarithm of the compute spent at
# inference. The first figure below shows when votes gain, the second is such a curve.
#
# If each sample is right with probability $p > \frac12$, and the samples err independently of one
# another, a vote of $k$ (odd, so that there are no ties) is right with a probability of at least
#
# $$P_k = \sum_{i > k/2} \binom{k}{i}\, p^i (1 - p)^{k - i}$$
#
# which goes to 1 as $k$ grows. Where wrong answers differ from one another, $p$ may be far below
# one half: the right answer need only be the most common one. Where the model makes the same
# mistake each time, no vote helps.

# %%
import csv
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import ponder
from ponder import figures
from ponder.inference.estimators import maj_at_k, pass_at_k

plt.style.use(figures.STYLE)

rng = np.random.default_rng(0)
kinds = {  # how often each answer comes; the first is right
    "p = 0.6, one wrong answer": (0.6, 0.4),
    "p = 0.4, four wrong answers": (0.4, *[0.15] * 4),
    "p = 0.4, one wrong answer": (0.4, 0.6),
}
counts = (1, 3, 5, 9, 15, 31)
figure, axes = plt.subplots()
for (name, shares), colour in zip(kinds.items(), figures.CYCLE, strict=False):
    answers = rng.choice(len(shares), p=shares, size=(1000, 32))
    right = answers == 0
    votes = [100 * maj_at_k(answers, right, k).mean() for k in counts]
    axes.plot(counts, votes, "o-", color=colour, label=name)
    some = pass_at_k(right, 31).mean()
    print(f"{name:28} vote of 31 {votes[-1]:5.1f} %, at least one of 31 right {some:.0%}")
axes.set(title="A vote finds what is most common", xlabel="samples", ylabel="accuracy (%)")
axes.set(xscale="log", xticks=counts, xticklabels=counts, ylim=(0, 103))
axes.minorticks_off()
axes.legend()
plt.show()

# %% [markdown]
# And measured: the model of `ponder demo`, half a million parameters, on sums and products of up to
# twelve digits. Along a line its chain of thought may be longer and longer, 0 to 10 tokens and at
# last as long as it likes. Every point is 500 problems.

# %%
results = Path(ponder.__file__).parent / "docs/results/demo_cpu/results.csv"
rows = list(csv.DictReader(results.open()))
lines = [("greedy", "1", figures.RED), ("sampling", "1", figures.BLUES[1])]
lines += [
    ("self-consistency", k, c) for k, c in (("4", figures.BLUES[3]), ("16", figures.BLUES[6]))
]
figure, axes = plt.subplots()
for strategy, k, colour in lines:
    mine = [r for r in rows if (r["strategy"], r["samples"]) == (strategy, k)]
    mine.sort(key=lambda r: float(r["think_budget"]))
    cost = [float(r["flops_per_problem"]) for r in mine]
    accuracy = [100 * float(r["accuracy"]) for r in mine]
    label = {"greedy": "greedy", "sampling": "one sample"}.get(strategy, f"vote of {k}")
    axes.plot(cost, accuracy, "o-", color=colour, label=label)
ticks = (2e7, 5e7, 1e8)
axes.set(xscale="log", xlabel="millions of FLOPs per problem", ylabel="accuracy (%)", ylim=(0, 103))
axes.set_xticks(ticks, [f"{t / 1e6:.0f}" for t in ticks])
axes.minorticks_off()
axes.set_title("Along each line the chain of thought grows")
axes.legend()
plt.show()

# %% [markdown]
# Greedy decoding takes the most probable token each time, a sample draws one by its probability.
# Longer thinking pays most here, as each step of the chain needs the one before it. Samples pay
# once a single one is right often enough: then the vote turns 88 % into 100 %. (Greedy decoding is
# there too, for a sixth of the compute. [Other tasks](../inference_time_compute.md) say when a vote
# gains on it.)
#
# **Change and see.** Make one of the four wrong answers as common as the right one, with
# `(0.4, 0.4, 0.1, 0.1)`: the vote is right half of the time, however many samples it has. At least
# one of 31 samples is right in all these cases: that gap is what a verifier could win.
#
# **Where the real code lives.** `inference/engine.py` draws the samples, `inference/estimators.py`
# computes votes and "at least one right" as means over all subsets of the samples,
# `inference/strategies.py` compares them. `ponder demo` makes this figure in minutes.
