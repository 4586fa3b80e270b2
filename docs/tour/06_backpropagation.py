# %% [markdown]
# # Backpropagation
#
# How much would the loss change if this weight were turned up a little? One could try: nudge it,
# run the network again, look. For a million weights that is a million runs. Backpropagation answers
# for all weights at once, for about twice the cost of computing the loss. It is the chain rule,
# read from the loss backwards, layer by layer:
#
# $$\frac{\partial L}{\partial W_i} = \frac{\partial L}{\partial h_i} \,
# \frac{\partial h_i}{\partial W_i}$$
#
# $$\frac{\partial L}{\partial h_{i-1}} = \frac{\partial L}{\partial h_i} \,
# \frac{\partial h_i}{\partial h_{i-1}}$$
#
# Each layer gets the slope of the loss in its output, makes of it those in its weights, and hands
# the one in its input to the layer before. Here by hand, for two layers with tanh between them and
# a squared error.

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.models.mlp import MLP

plt.style.use(figures.STYLE)
torch.manual_seed(0)

x, y = torch.randn(64, 3), torch.randn(64, 1)
model = MLP((3, 8, 1), activation="tanh", head="values")
first, last = model.layers

h = torch.tanh(x @ first.weight.T + first.bias)  # forward, and keep what the way back needs
output = h @ last.weight.T + last.bias
d_output = 2 * (output - y) / y.numel()  # slope of the mean squared error
d_last = d_output.T @ h
d_h = d_output @ last.weight
d_first = (d_h * (1 - h**2)).T @ x  # tanh' = 1 − tanh²

model.loss(x, y).backward()  # PyTorch does the same
for name, ours, theirs in (("first", d_first, first), ("last", d_last, last)):
    print(f"{name:6} layer: largest difference {(ours - theirs.weight.grad).abs().max():.1e}")

nudge = 1e-2  # the slow way, for one weight
before = model.loss(x, y).item()
with torch.no_grad():
    first.weight[0, 0] += nudge
tried = (model.loss(x, y).item() - before) / nudge
print(f"one weight, nudged: {tried:.3f}; backpropagation says {d_first[0, 0]:.3f}")

# %% [markdown]
# The slope that reaches the first layers is a product of one factor for each layer above. Where
# most factors are below 1, it vanishes, and the first layers learn nothing; well-chosen starting
# weights and a good activation keep its size. Here are sixteen layers, not trained yet:

# %%
figure, axes = plt.subplots()
for activation, colour in (
    ("sigmoid", figures.RED),
    ("tanh", figures.AMBER),
    ("relu", figures.BLUE),
):
    torch.manual_seed(0)
    deep = MLP([64] * 16 + [1], activation=activation, head="values")
    deep.loss(torch.randn(256, 64), torch.randn(256, 1)).backward()
    sizes = [layer.weight.grad.norm().item() for layer in deep.layers]
    axes.semilogy(range(1, len(sizes) + 1), sizes, "o-", color=colour, label=activation)
axes.set(title="How much of the slope reaches each layer", ylabel="norm of ∂L/∂W")
axes.set_xlabel("layer (16 is next to the loss)")
axes.legend()
plt.show()

# %% [markdown]
# **Change and see.** Double the starting weights:
# `for layer in deep.layers: layer.weight.data *= 2` above `deep.loss`. ReLU's slopes explode, a
# hundred million times as large. A residual connection, $h + f(h)$, has a 1 in its factor, and this
# is what lets transformers be deep.
#
# **Where the real code lives.** PyTorch's autograd calls the backward passes; those of `kernels/`
# are written by hand. `kernels/mlp.py` and its neighbours have the forward and the backward kernel
# one after the other, and `tests/kernels` holds both against fp64.
