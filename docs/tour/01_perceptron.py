# %% [markdown]
# # The perceptron
#
# One neuron. It weighs its inputs, adds a bias, and answers 1 where the sum reaches 0, else 0
# (Rosenblatt 1958):
#
# $$\hat y = \operatorname{step}(w \cdot x + b)$$
#
# $$\operatorname{step}(s) = \begin{cases} 1 & s \ge 0 \\ 0 & s < 0 \end{cases}$$
#
# With two inputs, $w \cdot x + b = 0$ is a line, and $w$ points to the side that gets a 1: above
# the line, where $w_2 > 0$. Points below it get a 0.
#
# It learns from its mistakes alone. A point on the wrong side pulls the line towards itself; where
# the answer is right, $y - \hat y$ is 0 and nothing moves:
#
# $$w \leftarrow w + (y - \hat y)\,x, \qquad b \leftarrow b + (y - \hat y)$$

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.models.perceptron import Perceptron

plt.style.use(figures.STYLE)
torch.manual_seed(0)

x = torch.randn(80, 2)
height = x @ torch.tensor([0.6, 1.0]) - 0.2  # above or below a line of our own
x, y = x[height.abs() > 0.15], (height > 0).long()[height.abs() > 0.15]

neuron = Perceptron(2)
print(learning := neuron.fit(x, y))

w, b, lines = torch.zeros(2), 0.0, []  # the same by hand, to see the line move
for point, label in [*zip(x, y, strict=True)] * min(len(learning.updates), 20):
    error = label - (w @ point + b >= 0).long()
    w, b = w + error * point, b + error
    if error:
        lines.append((w, b))

# %% [markdown]
# Where a line parts the points, the rule finds one after at most $(R/\gamma)^2$ corrections
# (Novikoff 1962): $R$ is the length of the longest $(x, 1)$, and $\gamma$, the margin, the largest
# distance that a plane through the origin can keep from all of these. Where no line does, the rule
# never rests. The simplest such case has four points, the exclusive or: 1 where exactly one input
# is 1.

# %%
corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
odd = torch.tensor([0, 1, 1, 0])
stuck = Perceptron(2)
print(stuck.fit(corners, odd, max_passes=100))


def draw(axes, neuron, x, y, reach):
    """The points, and the half-plane to which the neuron answers 1."""
    u, v = torch.meshgrid(*[torch.linspace(*reach, 400)] * 2, indexing="xy")
    side = neuron(torch.stack([u, v], dim=-1))
    axes.contourf(u, v, side, levels=[0.5, 1.5], colors=[figures.BLUE], alpha=0.12)
    for label, colour, marker in ((0, figures.RED, "o"), (1, figures.BLUE, "s")):
        axes.scatter(*x[y == label].T, color=colour, marker=marker, s=26, label=f"$y = {label}$")
    axes.set(xlabel="$x_1$", ylabel="$x_2$", xlim=reach, ylim=reach)


figure, (left, right) = plt.subplots(1, 2)
draw(figures.square(left, "The line after each correction"), neuron, x, y, (-3, 3.6))
for (w, b), colour in zip(lines[-7:], figures.shades(len(lines[-7:])), strict=True):
    left.axline((0, -b / w[1]), slope=-w[0] / w[1], color=colour, linewidth=1)
draw(figures.square(right, "Exclusive or: no line does it"), stuck, corners, odd, (-0.5, 1.5))
right.set(xticks=[0, 1], yticks=[0, 1])
right.legend(loc="center")
plt.show()

# %% [markdown]
# The darker the line, the later (of many corrections these are the last seven). The shade is where
# the neuron answers 1.
#
# **Change and see.** Keep points that are closer to the line (0.15 → 0.01): 29 corrections are
# needed instead of 4, as the margin $\gamma$ is smaller. Flip one label, `y[0] = 1 - y[0]` before
# the neuron is made: the rule says that no line separates the points. Give the exclusive or a third
# input, the product of the two: a plane does it, as
# `print(Perceptron(3).fit(torch.cat([corners, corners.prod(1, keepdim=True)], 1), odd))` says.
#
# **Where the real code lives.** `models/perceptron.py`: `step`, `Perceptron.fit`, and `separable`,
# which decides by linear programming whether a line exists.
