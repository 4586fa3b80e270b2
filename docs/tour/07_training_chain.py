# %% [markdown]
# # The training chain
#
# Every training, of one neuron or of a trillion weights, repeats four steps:
#
# 1. **forward**: the model computes its output,
# 2. **loss**: one number says how wrong it is,
# 3. **backward**: backpropagation gives the slope of the loss in every weight,
# 4. **update**: the optimizer moves the weights a little against it.
#
# $$\hat y = f_w(x) \;\to\; L(\hat y, y) \;\to\; g = \frac{\partial L}{\partial w}
# \;\to\; w \leftarrow w - \eta\,g$$
#
# Here a whole GPT learns one sentence by heart: at every place, it is to say the next letter.

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.models import GPT, GPTConfig

plt.style.use(figures.STYLE)
torch.manual_seed(0)

text = "the quick brown fox jumps over the lazy dog. " * 2
letters = sorted(set(text))  # 28, with the space and the full stop
tokens = torch.tensor([[letters.index(c) for c in text]])
inputs, targets = tokens[:, :-1], tokens[:, 1:]

shape = dict(n_layer=2, n_head=2, n_kv_head=2, head_dim=16, n_embd=32, n_inner=64)
model = GPT(GPTConfig(vocab_size=len(letters), context=128, **shape))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

losses = []
for _ in range(80):
    loss = model(inputs, targets)  # forward, loss
    loss.backward()  # backward
    optimizer.step()  # update
    optimizer.zero_grad()
    losses.append(loss.item())
print(f"{model.parameter_count:,} parameters; loss {losses[0]:.2f} → {losses[-1]:.3f} nats")

# %%
written = inputs[:, :4]
for _ in range(40):
    written = torch.cat([written, model(written)[:, -1:].argmax(-1)], dim=1)
print("".join(letters[i] for i in written[0].tolist()))

figure, axes = plt.subplots()
axes.plot(losses, color=figures.BLUE)
guess = torch.tensor(float(len(letters))).log().item()
axes.axhline(guess, color=figures.MUTED, linestyle="--", label=f"guessing: log {len(letters)}")
axes.set(title="The four steps, eighty times", xlabel="updates", ylabel="loss (nats a letter)")
axes.set_ylim(0)
axes.legend()
plt.show()

# %% [markdown]
# **Change and see.** Train with `lr=1.0`: the loss leaps up and never comes near 0. Leave out
# `zero_grad`: the slopes of all steps so far add up, each update follows old ones too, and the loss
# falls to 1 and climbs again.
#
# **Where the real code lives.** `training/loop.py` has the same four steps in `_update`, with what
# a long run needs around them: mixed precision, several GPUs, checkpoints, clipping, a learning
# rate that warms up and decays. `ponder train shakespeare --data text:FILE` runs it.
