# %% [markdown]
# # Activation functions
#
# An activation is the non-linear function between two layers; without one they would be a single
# linear map. Training sends slopes (derivatives of the loss) back through it, so its derivative
# matters as much as its value.
#
# $$\operatorname{relu}(x) = \max(0, x) \qquad \sigma(x) = \frac{1}{1 + e^{-x}}$$
#
# $$\tanh(x) = 2\sigma(2x) - 1 \qquad \operatorname{silu}(x) = x\,\sigma(x)$$
#
# $\sigma$ is the *sigmoid*, a step from 0 to 1 with its edge rounded off; *tanh* goes from −1 to 1.
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
shown = {"relu": figures.BLUE, "sigmoid": figures.RED, "tanh": figures.GREEN, "silu": figures.AMBER}
figure, (values, slopes) = plt.subplots(1, 2)
for name, colour in shown.items():
    y = ACTIVATIONS[name](x)
    [slope] = torch.autograd.grad(y.sum(), x)
    values.plot(x.detach(), y.detach(), color=colour, label=name)
    slopes.plot(x.detach(), slope, color=colour)
values.set(title="Value", ylim=(-1.2, 4), xlabel="x")
slopes.set(title="Derivative", xlabel="x")
values.legend()
plt.show()

# %% [markdown]
# The sigmoid's derivative is at most 1/4: through ten of them a slope shrinks at least a million
# times ($4^{10}$). ReLU passes it whole, or not at all. That is why deep networks use ReLU and its
# smooth kin, as silu.

# %%
figure, (depth, output) = plt.subplots(1, 2)
for name in ("relu", "tanh", "sigmoid"):
    h = first = torch.ones(1, requires_grad=True)
    left = [1.0]
    for _ in range(10):
        h = ACTIVATIONS[name](h)
        left.append(torch.autograd.grad(h, first, retain_graph=True)[0].item())
    depth.semilogy(left, "o-", color=shown[name], label=name)
    print(f"slope through ten times {name:8} {left[-1]:.1e}")
depth.set(title="What is left of a slope", xlabel="activations that it went through")
depth.legend()

numbers = torch.tensor([2.0, 1.0, 0.0, -1.0])
temperatures = 0.25, 1.0, 4.0
for i, (temperature, colour) in enumerate(zip(temperatures, figures.shades(3), strict=True)):
    shares = softmax(numbers / temperature)
    print(f"softmax at temperature {temperature:<5}", " ".join(f"{p:.2f}" for p in shares))
    place = torch.arange(4) + 0.27 * (i - 1)
    output.bar(place, shares, width=0.25, color=colour, label=f"divided by {temperature:g}")
output.set_xticks(range(4), [f"{n:g}" for n in numbers])
output.set(title="Softmax of four numbers", xlabel="the number", ylabel="probability", ylim=(0, 1))
output.legend()
plt.show()

# %% [markdown]
# The number by which softmax's inputs are divided is called the *temperature*. The lower it is, the
# more goes to the largest.
#
# **Change and see.** Add `"gelu"` or `"relu2"` to `shown`, with a colour: what Transformers use
# besides. Lower the first temperature to 0.01: all goes to the largest, which is what greedy
# decoding takes. Add 100 to every number: nothing changes, as only differences count.
#
# **Where the real code lives.** `kernels/_activations.py` holds each function with its derivative,
# in PyTorch and in Triton; `kernels/mlp.py` applies them inside the matrix product, and
# `kernels/softmax.py` is the output activation.
