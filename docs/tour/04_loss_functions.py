# %% [markdown]
# # Loss functions
#
# One number that says how wrong the output is. For values, the mean squared error:
#
# $$L = \frac{1}{n} \sum_i (\hat y_i - y_i)^2$$
#
# For classes, and so for the next token, cross-entropy: the negative logarithm of the probability
# that the model gave to what really came.
#
# $$L = -\log p_{\text{target}} = \log \sum_v e^{z_v} - z_{\text{target}}$$
#
# It is counted in nats. A model that guesses among $V$ tokens has a loss of $\log V$; a loss of
# 1.5 nats is as unsure as a fair choice among $e^{1.5} \approx 4.5$ tokens.

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
    ("squared error of the probability", square, figures.RED),
):
    [slope] = torch.autograd.grad(loss.sum(), z, retain_graph=True)
    values.plot(z.detach(), loss.detach(), color=colour, label=name)
    slopes.plot(z.detach(), slope, color=colour)
values.set(title="Loss", xlabel="logit of the right class")
slopes.set(title="Its slope in that logit", xlabel="logit of the right class")
values.legend()
plt.show()

# %% [markdown]
# Left of 0 the model is wrong. There cross-entropy pulls with full force, its slope is $p - 1$,
# while the squared error of a probability goes flat: the surer a model is of something wrong, the
# less it would learn. Hence cross-entropy for classes.

# %%
V = 50_257
flat = torch.zeros(1, V)
print(f"guessing among {V} tokens: {cross_entropy(flat, torch.tensor([7])).item():.3f} nats")
print(f"log {V} = {math.log(V):.3f}")

# %% [markdown]
# **Change and see.** Give `cross_entropy` the option `label_smoothing=0.1`: being sure is no longer
# free, and the loss has its floor at a finite logit. Or `z_loss=0.01`, which keeps logits small.
#
# **Where the real code lives.** `kernels/cross_entropy.py` and `kernels/mse_loss.py`.
# `kernels/linear_cross_entropy.py` computes the last product and the loss together, a chunk at a
# time, as all logits of a long batch would fill the memory.
