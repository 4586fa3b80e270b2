# %% [markdown]
# # Inference-time compute
#
# A finished model can still be made better, by letting it think longer. Two ways:
#
# - a longer chain of thought before the answer,
# - more samples, of which the most common answer is taken (*self-consistency*, Wang et al. 2022).
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
shares = (0.4, *[0.15] * 4)  # right 40 % of the time, four wrong answers
answers = rng.choice(len(shares), p=shares, size=(400, 32))
correct = answers == 0
for k in (1, 4, 16, 32):
    vote = maj_at_k(answers, correct, k).mean()
    print(f"{k:3} samples: vote {vote:.1%}, at least one right {pass_at_k(correct, k).mean():.1%}")

# %% [markdown]
# And measured: the model of `ponder demo`, 0.5M parameters, on chains of up to twelve digits, of
# which it is allowed to work a part. Every point is 500 problems.

# %%
results = Path(ponder.__file__).parent / "docs/results/demo_cpu/results.csv"
rows = list(csv.DictReader(results.open()))
lines = [("greedy", "1", figures.RED), ("sampling", "1", figures.BLUES[0])]
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
axes.set(xscale="log", xlabel="FLOPs per problem", ylabel="accuracy (%)", ylim=(0, 103))
axes.set_title("Along each line the chain of thought grows")
axes.legend()
plt.show()

# %% [markdown]
# Longer thinking pays most here, as each step of the chain needs the one before it. Samples pay
# once a single one is right often enough: then the vote turns 84 % into 99.8 %.
#
# **Change and see.** Let the wrong answers agree, `shares = (0.4, 0.6)`: the vote gets worse with
# every sample, while "at least one right" still climbs. That gap is what a verifier could win.
#
# **Where the real code lives.** `inference/engine.py` draws the samples, `inference/estimators.py`
# computes votes and "at least one right" as means over all subsets of the samples,
# `inference/strategies.py` compares them. `ponder demo` makes this figure in minutes.
