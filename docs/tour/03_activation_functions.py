# %% [markdown]
# # Activation functions
#
# An activation is the non-linear function between two layers. Training sends slopes (derivatives of
# the loss) back through it, so its derivative matters as much as its value.
#
# $$\operatorname{relu}(x) = \max(0, x) \qquad \sigma(x) = \frac{1}{1 + e^{-x}} \qquad
# \tanh(x) = 2\sigma(2x) - 1 \qquad \operatorname{silu}(x) = x\,\sigma(x)$$
#
# At the output, *softmax* turns any numbers into probabilities. The others treat each number by
# itself; softmax looks at all of them:
#
# $$\operatorname{softmax}(x)_i = \frac{e^{x_i}}{\sum_j e^{x_j}}$$

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.kernels import softmax
from ponder.kernels._activations import ACTIVATIONS

plt.style.use(figures.STYLE)

x = torch.linspace(-4, 4, 401, requires_grad=True)
shown = ("relu", "sigmoid", "tanh", "silu", "gelu", "relu2")
figure, (values, slopes) = plt.subplots(1, 2)
for name, colour in zip(shown, (*figures.CYCLE, figures.BLUES[0]), strict=True):
    y = ACTIVATIONS[name](x)
    [slope] = torch.autograd.grad(y.sum(), x)
    values.plot(x.detach(), y.detach(), color=colour, label=name)
    slopes.plot(x.detach(), slope, color=colour)
values.set(title="Value", ylim=(-1.2, 4), xlabel="x")
slopes.set(title="Derivative", ylim=(-0.3, 2.5), xlabel="x")
values.legend()
plt.show()

# %% [markdown]
# The sigmoid's derivative is at most 1/4: through ten of them a slope shrinks at least a million
# times ($4^{10}$).
# ReLU passes it whole, or not at all. That is why deep networks use ReLU and its smooth kin.

# %%
for name in ("sigmoid", "tanh", "relu"):
    h = x = torch.ones(1, requires_grad=True)
    for _ in range(10):
        h = ACTIVATIONS[name](h)
    h.backward()
    print(f"slope through ten times {name:8} {x.grad.item():.1e}")

logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
for temperature in (0.25, 1.0, 4.0):
    shares = " ".join(f"{p:.2f}" for p in softmax(logits / temperature))
    print(f"softmax at temperature {temperature:<5} {shares}")

# %% [markdown]
# **Change and see.** Divide the logits by a lower temperature: softmax nears "all for the largest",
# which is what greedy decoding takes. Add 100 to every logit: nothing changes, as only differences
# count.
#
# **Where the real code lives.** `kernels/_activations.py` holds each function with its derivative,
# in PyTorch and in Triton; `kernels/mlp.py` applies them inside the matrix product, and
# `kernels/softmax.py` is the output activation.
