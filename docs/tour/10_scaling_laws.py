# %% [markdown]
# # Scaling laws
#
# A bigger model, more data, more compute: the loss falls, and so regularly that it can be predicted
# (Kaplan et al. 2020; Hoffmann et al. 2022). With $N$ parameters and $D$ tokens,
#
# $$L(N, D) = E + \frac{A}{N^\alpha} + \frac{B}{D^\beta}$$
#
# $E$ is the loss that would be left to an endless model with endless data: the text's own entropy,
# which nobody can predict. The other two terms are what a finite model and finite data add.
# A FLOP is one addition or multiplication, and training costs about $C = 6ND$ of them: each token
# meets each parameter with two on the way forward and with four on the way back. So a budget of
# compute can buy a large model or much data. The law says how the best size grows with the budget:
#
# $$N_{\text{opt}} \propto C^{\,\beta / (\alpha + \beta)}$$
#
# The runs below are not measured: they are drawn from a law that is known, with a scatter of 0.2 %,
# to see whether the fit finds it again. [Measured ones](../scaling.md) are what `ponder scale`
# makes.

# %%
import matplotlib.pyplot as plt
import numpy as np

from ponder import figures
from ponder.training.scaling import Law, fit_law, frontier

plt.style.use(figures.STYLE)

# The constants of Hoffmann et al.'s runs, as Besiroglu et al. 2024 fitted them.
truth = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
N, D = np.meshgrid(np.geomspace(5e7, 1e10, 5), np.geomspace(1e9, 3e11, 4))
N, D = N.ravel(), D.ravel()
losses = truth.loss(N, D) * np.exp(np.random.default_rng(0).normal(0, 0.002, len(N)))

fit = fit_law(N, D, losses, resamples=40)
for name in ("E", "alpha", "beta", "size_exponent"):
    value, low, high = fit.intervals[name]
    print(f"{name:14}{value:.3f}  ({low:.3f} to {high:.3f})")
value, low, high = fit.predict(7e10, 1.4e12)
print(f"70B parameters, 1.4T tokens: {value:.3f}  ({low:.3f} to {high:.3f})")
print(
    "in truth:", *(f"{v:.3f}" for v in (truth.E, truth.alpha, truth.beta, truth.loss(7e10, 1.4e12)))
)

# %%
figure, axes = plt.subplots()
sizes = np.unique(N)
for size, colour in zip(sizes, figures.shades(len(sizes)), strict=True):
    tokens = np.geomspace(5e8, 1e12, 100)
    axes.plot(6 * size * tokens, fit.law.loss(size, tokens), color=colour, linewidth=1.2)
    mine = size == N
    axes.plot(6 * size * D[mine], losses[mine], "o", color=colour, label=f"{size / 1e9:.2g}B")
compute = np.geomspace(1e18, 1e24, 60)
best, _ = frontier(fit.law, compute, lambda n: 6 * n, (1e7, 1e12))
axes.plot(compute, best, color=figures.INK, linestyle="--", label="best size for this compute")
axes.set(
    xscale="log", xlabel="FLOPs of the training", ylabel="loss (nats a token)", ylim=(1.8, 4.2)
)
axes.set_title("Each line is a model that trains longer; dots are runs")
axes.legend(title="parameters")
plt.show()

# %% [markdown]
# At first a line falls with the data term, then it comes to rest on its own size's floor, and a
# larger model should take over. The frontier runs along the points where it does.
#
# **Change and see.** Leave the largest sizes out (`np.geomspace(5e7, 1e9, 3)`), with ten times the
# scatter (0.02): the intervals widen, and `print(fit.unidentified)` says what the runs no longer
# tell.
#
# **Where the real code lives.** `training/scaling.py` fits the law; `ponder scale` trains the
# ladder, fits, and predicts a larger run before it measures it.
