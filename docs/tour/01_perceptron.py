# %% [markdown]
# # The perceptron
#
# One neuron. It weighs its inputs, adds a bias, and answers 1 where the sum reaches 0, else 0
# (Rosenblatt 1958):
#
# $$\hat y = \operatorname{step}(w \cdot x + b), \qquad
# \operatorname{step}(s) = \begin{cases} 1 & s \ge 0 \\ 0 & s < 0 \end{cases}$$
#
# With two inputs, $w \cdot x + b = 0$ is a line: points above it get a 1, points below it a 0.
# It learns from its mistakes alone. Each wrongly placed point pulls the line towards itself:
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
print(neuron.fit(x, y))

# %% [markdown]
# Where a line parts the points, the rule finds one after at most $(R/\gamma)^2$ corrections
# (Novikoff 1962): $R$ is the length of the longest point $(x, 1)$, and $\gamma$, the margin, is how
# far the nearest point is from the best line. Where no line does, the rule never rests. The
# simplest such case has four points, the exclusive or: 1 where exactly one input is 1.

# %%
corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
odd = torch.tensor([0, 1, 1, 0])
stuck = Perceptron(2)
print(stuck.fit(corners, odd, max_passes=100))


def draw(axes, neuron, x, y, reach):
    """The points, and the half-plane to which the neuron answers 1."""
    u, v = torch.meshgrid(*[torch.linspace(*reach, 200)] * 2, indexing="xy")
    side = neuron(torch.stack([u, v], dim=-1))
    axes.contourf(u, v, side, levels=[0.5, 1.5], colors=[figures.BLUE], alpha=0.12)
    for label, colour, marker in ((0, figures.RED, "o"), (1, figures.BLUE, "s")):
        axes.scatter(*x[y == label].T, color=colour, marker=marker, s=26, label=f"$y = {label}$")


figure, (left, right) = plt.subplots(1, 2)
draw(figures.square(left, "Separable: every point on its side"), neuron, x, y, (-3.6, 3.6))
draw(figures.square(right, "Exclusive or: no line does it"), stuck, corners, odd, (-0.5, 1.5))
left.legend(loc="lower left", framealpha=0.9, frameon=True, edgecolor="none")
plt.show()

# %% [markdown]
# **Change and see.** Keep points that are closer to the line (0.15 → 0.01): many more corrections
# are needed, as the margin $\gamma$ is smaller. Flip one label with `y[0] = 1 - y[0]`: the rule
# says that no line separates the points. Give the exclusive or a third input, `x1 * x2`: a plane
# does it.
#
# **Where the real code lives.** `models/perceptron.py`: `step`, `Perceptron.fit`, and `separable`,
# which decides by linear programming whether a line exists.
