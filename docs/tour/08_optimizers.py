# %% [markdown]
# # Optimizers
#
# All of them go downhill; they differ in what they make of the slopes $g$ that they have seen.
#
# $$\text{SGD:}\quad p \leftarrow p - \eta\, g$$
#
# $$\text{momentum:}\quad v \leftarrow 0.9\, v + g, \quad p \leftarrow p - \eta\, v$$
#
# $$\text{Adam:}\quad m \leftarrow 0.9\, m + 0.1\, g$$
#
# $$s \leftarrow 0.999\, s + 0.001\, g^2, \quad
# p \leftarrow p - \eta\, \frac{\hat m}{\sqrt{\hat s} + \varepsilon}$$
#
# SGD (stochastic gradient descent) is the walk of the page on gradient descent; stochastic, as in
# training each slope is that of a few examples drawn at random. Momentum rolls like a ball: it
# gathers speed along the valley and through small dips. Adam (Kingma and Ba 2015) divides the
# running mean $m$ of the slope by its usual size, the root of the running mean $s$ of its square,
# for each weight apart: so all weights move at about the same pace. (The hats make up for both
# means starting at 0; $\varepsilon$ is tiny and keeps the division from one by 0.)

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.models.mlp import MLP
from ponder.training.descent import descend, valley_with_dip

plt.style.use(figures.STYLE)

start = (-3.5, 1.0)
u, v = torch.meshgrid(torch.linspace(-4, 1.5, 300), torch.linspace(-1.4, 1.4, 200), indexing="xy")
colours = {"sgd": figures.RED, "momentum": figures.GREEN, "adam": figures.AMBER}
figure, axes = plt.subplots(figsize=(7.2, 3.4))
axes.contourf(u, v, valley_with_dip(u, v).sqrt(), levels=24, cmap="Blues_r", alpha=0.75)
for rule, colour in colours.items():
    path = descend(valley_with_dip, start, rule, lr=0.1, steps=200)
    axes.plot(*path.T, "o-", color=colour, markersize=2.5, linewidth=1.2, label=rule)
    x, y = (path[-1].round(decimals=2) + 0.0).tolist()
    print(f"{rule:9} ends at ({x:.2f}, {y:.2f})")
axes.set(
    title="From the same place, at the same rate: the darker, the lower", xlabel="x", ylabel="y"
)
axes.set(xlim=(-4, 1.5), ylim=(-1.4, 1.4))
axes.grid(False)
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# On a network there is no picture of the surface, only the loss. Its weights have slopes of very
# different sizes, and that is where Adam gains. Each optimizer has about the highest rate at which
# its loss does not leap.

# %%
x = torch.linspace(-2, 2, 128)[:, None]
y = torch.sin(4 * x)
figure, axes = plt.subplots(figsize=(7.2, 3.2))
for rule, lr in (("sgd", 0.02), ("momentum", 0.01), ("adam", 0.003)):
    torch.manual_seed(0)
    losses = MLP((1, 64, 64, 1), activation="tanh", head="values").fit(
        x, y, steps=300, lr=lr, optimizer=rule
    )
    axes.semilogy(losses, color=colours[rule], label=f"{rule}, η = {lr}")
axes.set(title="A network learns sin 4x", xlabel="updates", ylabel="mean squared error")
axes.legend()
plt.show()

# %% [markdown]
# **Change and see.** Give all three a rate of 0.9 on the surface: SGD misses the dip. Change
# `sin 4x` into `sin x`: an easy task, and all three get there. Give SGD a rate of 0.1 on the
# network: its loss explodes, and `fit` says so. At 0.1 Adam's loss leaps too, but comes down again:
# however steep the slope, a step of Adam moves no weight by much more than the rate.
#
# **Where the real code lives.** `training/optimizer.py`: Muon for the matrices inside the layers
# (it makes each update orthogonal, so that no direction is left behind), AdamW for the rest.
# `training/descent.py` has the walks.
