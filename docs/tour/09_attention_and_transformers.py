# %% [markdown]
# # Attention and transformers
#
# Every token (a word, or a part of one) asks a question $q$; every token so far offers a key $k$
# and a value $v$: three linear maps of what is known of it. A token takes the values whose keys
# answer its question best, as a weighted mean (Vaswani et al. 2017):
#
# $$\operatorname{attention} = \operatorname{softmax}\!\left(
# \frac{Q K^{\mathsf T}}{\sqrt{d}} + \text{mask} \right) V$$
#
# The rows of $Q$, $K$ and $V$ are the tokens, and $d$ is how many numbers a key has. The products
# of $Q$ and $K$ grow as $\sqrt{d}$; were they not divided by it, softmax would take one value alone
# in wide models. The mask is $-\infty$ for what comes later: a model that is to predict the next
# token must not see it. A layer does this several times side by side (*heads*), each with maps of
# its own.
#
# A transformer alternates attention, which moves information between tokens, with an MLP, which
# works on each token by itself. Both add to a stream that runs from the first layer to the last:
#
# $$h \leftarrow h + \operatorname{attention}(\operatorname{norm}(h))$$
#
# $$h \leftarrow h + \operatorname{mlp}(\operatorname{norm}(h))$$
#
# The stream begins as a learned vector of each token (its embedding); $\operatorname{norm}$ brings
# it to the same size everywhere; behind the last layer one more linear map, the head, makes of it a
# logit for each possible next token.

# %%
import matplotlib.pyplot as plt
import torch

from ponder import figures
from ponder.kernels import attention, softmax
from ponder.models import GPT, GPTConfig

plt.style.use(figures.STYLE)
torch.manual_seed(0)

words = "the cat saw the dog and the dog saw the cat".split()
known = sorted(set(words))
T, D = len(words), 32
meaning = torch.randn(len(known), D)[[known.index(w) for w in words]]
q = k = v = meaning[None, None]  # one sequence, one head: each word asks for its like
scores = (q @ k.mT)[0, 0] / D**0.5
hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
weights = softmax(scores.masked_fill(hidden, float("-inf")))

fused = attention(q, k, v, causal=True)[0, 0]  # never holds the T × T weights
print(f"the formula against the kernel: {(weights @ v[0, 0] - fused).abs().max():.1e}")

# %% [markdown]
# Shuffle the words before the last one, and its weighted mean is the same: attention by itself
# knows no order. So positions must enter somewhere. *Rotary* positions turn $q$ and $k$ by angles
# that grow with the place, and how well they match then depends on how far apart they are.
#
# Whether the mask holds can be tested: change one token of a GPT's input, and no output before it
# may move.

# %%
model = GPT(GPTConfig(vocab_size=len(known), context=T, n_layer=2))
with torch.no_grad():
    for p in model.parameters():
        p.add_(0.05 * torch.randn_like(p))  # untrained, attention adds 0, and would hide it
    tokens = torch.tensor([[known.index(w) for w in words]])
    other = tokens.clone()
    other[0, 6] = (tokens[0, 6] + 1) % len(known)
    moved = (model(tokens) - model(other))[0].abs().amax(-1)
print("outputs that moved:", [i for i, m in enumerate(moved.tolist()) if m > 1e-6])

figure, (left, right) = plt.subplots(1, 2, width_ratios=(3, 2))
left.imshow(weights, cmap="Blues", vmin=0, vmax=1)
left.set_xticks(range(T), words, rotation=60, ha="right")
left.set_yticks(range(T), words)
left.set(title="Who looks at whom: the darker, the more", ylabel="this word takes …")
left.set_xlabel("… so much of this one")
left.grid(False)
colours = [figures.RED if i == 6 else figures.BLUE for i in range(T)]
right.bar(range(T), moved.tolist(), color=colours)
right.set_xticks(range(T))
right.set(title="Word 6 changed: the past stays", xlabel="position")
right.set_ylabel("change of the output")
plt.show()

# %% [markdown]
# **Change and see.** Divide `scores` by 8: each word now looks at all before it, and at its likes
# only a little more. Give `attention` a `window=3`: no token looks further back than that, and the
# printed difference is no rounding any more.
#
# **Where the real code lives.** `kernels/attention.py` (exact, in blocks, forward and backward),
# `kernels/rotary.py`, `kernels/norm.py`; `models/layers.py` and `models/gpt.py` put them together.
