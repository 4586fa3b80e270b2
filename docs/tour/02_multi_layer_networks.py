# %% [markdown]
# # Multi-layer networks
#
# What one neuron cannot do, two layers can. The exclusive or of the last page is
# $\operatorname{relu}(x_1 + x_2) - 2 \operatorname{relu}(x_1 + x_2 - 1)$, where
# $\operatorname{relu}(s) = \max(0, s)$: two neurons, and a third that weighs their outputs. In
# general each layer is a linear map followed by a non-linear function $\varphi$ of every number,
# and the last one is linear:
#
# $$h_0 = x, \qquad h_i = \varphi(W_i h_{i-1} + b_i), \qquad \text{output} = W_n h_{n-1} + b_n$$
#
# Without $\varphi$ the whole is a single linear map, however many layers it has:
# $W_2 (W_1 x) = (W_2 W_1)\,x$. So the same network is trained here twice on the same points, once
# with ReLU and once with the identity in its place.

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.models.mlp import MLP

plt.style.use(figures.STYLE)
torch.manual_seed(0)

angle = torch.linspace(0.5, 5, 100)
arm = torch.stack([angle.cos(), angle.sin()], 1) * angle[:, None] / angle[-1]
x = torch.cat([arm, -arm]) + 0.02 * torch.randn(200, 2)  # two arms of a spiral
y = torch.cat([torch.zeros(100), torch.ones(100)]).long()

networks = {}
for activation in ("identity", "relu"):
    torch.manual_seed(1)
    networks[activation] = MLP((2, 32, 32, 2), activation=activation)
    losses = networks[activation].fit(x, y, steps=250, lr=0.01)
    right = (networks[activation](x).argmax(-1) == y).float().mean()
    print(f"{activation:9} loss {losses[-1]:.3f}, {right:.0%} of the points right")

# %%
u, v = torch.meshgrid(*[torch.linspace(-1.2, 1.2, 150)] * 2, indexing="xy")
figure, panels = plt.subplots(1, 2)
titles = "No non-linearity: one straight line", "ReLU: as many bends as it takes"
for axes, title, network in zip(panels, titles, networks.values(), strict=True):
    figures.square(axes, title)
    chance = network.predict(torch.stack([u, v], dim=-1))[..., 1]
    image = dict(extent=[-1.2, 1.2] * 2, origin="lower", interpolation="bilinear")
    axes.imshow(chance, cmap="RdBu", vmin=0, vmax=1, alpha=0.45, **image)
    axes.contour(u, v, chance, levels=[0.5], colors=figures.INK, linewidths=1)
    for label, colour in ((0, figures.RED), (1, figures.BLUE)):
        axes.scatter(*x[y == label].T, color=colour, s=7)
    axes.set(xlabel="$x_1$", ylabel="$x_2$")
plt.show()

# %% [markdown]
# The colour is the predicted probability of the blue class, the line where it is one half. Left it
# is straight.
#
# **Change and see.** Make the network deeper with `(2, 32, 32, 32, 32, 2)`: the identity's line
# stays straight. Make it narrow with `(2, 3, 2)`: three hidden units bend the line, but not often
# enough. Let the arms wind further (5 → 15): 250 steps no longer do, a thousand (`steps=1000`) do.
#
# **Where the real code lives.** `models/mlp.py`. Inside the transformer the same idea is
# `layers.MLP` and `layers.GatedMLP`, on the fused kernels of `kernels/mlp.py`.
