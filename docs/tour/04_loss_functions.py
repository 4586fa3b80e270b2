# %% [markdown]
# # Loss functions
#
# One number that says how wrong the output is. For values, the mean squared error, in which an
# error of 2 counts as much as four of 1:
#
# $$L = \frac{1}{n} \sum_i (\hat y_i - y_i)^2$$
#
# For classes, and so for the next token, cross-entropy: the negative logarithm of the probability
# that the model gave to what really came.
#
# $$L = -\log p_{\text{target}} = \log \sum_v e^{z_v} - z_{\text{target}}$$
#
# The model's last numbers $z$ are called *logits*, and $p = \operatorname{softmax}(z)$. The loss is
# counted in nats (natural logarithms). A model that gives $V$ tokens the same chance has a loss of
# $\log V$; a loss of 1.5 nats is as unsure as a fair choice among $e^{1.5} \approx 4.5$ tokens.

# %%
import math

import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.kernels import cross_entropy, mse_loss

plt.style.use(figures.STYLE)

z = torch.linspace(-6, 6, 201, requires_grad=True)  # the right class's logit, the other's is 0
logits = torch.stack([z, torch.zeros_like(z)], dim=1)
right = torch.zeros(len(z), dtype=torch.int64)
entropy = cross_entropy(logits, right, reduction="none")
probability = logits.softmax(-1)[:, 0]
square = mse_loss(probability, torch.ones_like(z), reduction="none")

figure, (values, slopes) = plt.subplots(1, 2)
for name, loss, colour in (
    ("cross-entropy", entropy, figures.BLUE),
    ("squared error of p", square, figures.RED),
):
    [slope] = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    values.plot(z.detach(), loss.detach(), color=colour, label=name)
    slopes.plot(z.detach(), slope, color=colour)
for axes, title in ((values, "Loss"), (slopes, "Its slope: how hard it pulls")):
    axes.set(title=title, xlabel="logit of the right class (the other's is 0)")
    axes.axvspan(-6, 0, color=figures.RED, alpha=0.06, linewidth=0)
slopes.text(0.06, 0.35, "here the model\nis wrong", color=figures.MUTED, transform=slopes.transAxes)
values.legend()
plt.show()

# %% [markdown]
# Two classes, and $p$ is the probability of the right one. Left of 0 the model is wrong. There
# cross-entropy pulls with full force, its slope is $p - 1$, while the squared error, $(p - 1)^2$,
# goes flat: the surer a model is of something wrong, the less it would learn. Hence cross-entropy
# for classes.

# %%
V = 50_257
flat = torch.zeros(1, V)
print(f"guessing among {V} tokens: {cross_entropy(flat, torch.tensor([7])).item():.3f} nats")
print(f"log {V} = {math.log(V):.3f}")

# %% [markdown]
# **Change and see.** Give the first `cross_entropy` the option `label_smoothing=0.1`: being sure is
# no longer free, and beyond a logit of 3 the loss rises again. So it does with `z_loss=0.01`, which
# keeps logits small. Swap the loss of classes for that of values, `square = (z - 1) ** 2`: the
# further off, the harder it pulls, without bound.
#
# **Where the real code lives.** `kernels/cross_entropy.py` and `kernels/mse_loss.py`.
# `kernels/linear_cross_entropy.py` computes the last product and the loss together, a chunk at a
# time, as all logits of a long batch would fill the memory.
