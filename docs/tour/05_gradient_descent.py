# %% [markdown]
# # Gradient descent
#
# A blindfolded walk downhill: feel the slope under your feet, take a step against it, repeat.
#
# $$p \leftarrow p - \eta \, \nabla L(p)$$
#
# $p$ is the place, $L$ the height there (in training: the weights, and their loss). The gradient
# $\nabla L$ holds the slope in each direction and points uphill; $\eta$, the learning rate, is how
# much of it makes a step. Blindfolded, one cannot see that a lower valley lies behind the next
# ridge. The surface below has its floor at (0, 0), and on the way a small dip:
#
# $$f(x, y) = \frac{x^2}{10} + y^2 - 0.3\,e^{-4((x+2)^2 + y^2)}$$

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.training.descent import descend, valley_with_dip

plt.style.use(figures.STYLE)

start = (-3.5, 1.0)
walks = {
    "η = 0.1": descend(valley_with_dip, start, "sgd", lr=0.1, steps=200),
    "η = 0.9": descend(valley_with_dip, start, "sgd", lr=0.9, steps=200),
}
for name, path in walks.items():
    x, y = (path[-1].round(decimals=2) + 0.0).tolist()
    print(f"{name} ends at ({x:.2f}, {y:.2f}), loss {abs(valley_with_dip(*path[-1])):.3f}")

# %%
u, v = torch.meshgrid(torch.linspace(-4, 1.5, 300), torch.linspace(-1.4, 1.4, 200), indexing="xy")
figure, (plan, profile) = plt.subplots(2, 1, figsize=(7.2, 5.4), height_ratios=(3, 2))
plan.contourf(u, v, valley_with_dip(u, v).sqrt(), levels=24, cmap="Blues_r", alpha=0.9)
along = torch.linspace(-4, 1.5, 400)
profile.plot(along, valley_with_dip(along, torch.zeros(400)), color=figures.MUTED)
for (name, path), colour in zip(walks.items(), (figures.RED, figures.INK), strict=True):
    plan.plot(*path.T, "o-", color=colour, markersize=3, linewidth=1, label=name)
    profile.plot(path[-1, 0], valley_with_dip(*path[-1]), "o", color=colour, markersize=8)
plan.set(
    title="Seen from above: the darker, the lower", ylabel="y", xlim=(-4, 1.5), ylim=(-1.4, 1.4)
)
plan.grid(False)
plan.legend(loc="lower right")
profile.set(title="Along the valley's floor: where each walk ends", xlabel="x", ylabel="loss")
profile.set(xlim=(-4, 1.5), ylim=(-0.1, 1.7))
plt.show()

# %% [markdown]
# Short steps follow the slope into the dip, and there the slope is 0: the dip holds the walk,
# though the floor lies lower. Long steps swing from side to side, and so miss the dip. There is a
# limit: 2 divided by the curvature across the valley (here 2), which is 1. With a rate above it
# each swing is wider than the last.
#
# **Change and see.** Start at `(-3.5, 0.0)`: without a swing, the dip catches the long steps too.
# Take 1.05 instead of 0.9: the walk climbs out of the picture, further with every swing.
#
# **Where the real code lives.** `training/descent.py` walks this surface. In a network the place
# is all its weights, and the slope comes from backpropagation: the next page.
