"""MLP: a fully connected network of any depth, for classes or for values."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ..kernels import ACTIVATIONS, cross_entropy, mse_loss, softmax

Head = Literal["classes", "values"]
Optimizer = Literal["sgd", "momentum", "adam"]


class MLP(nn.Module):
    """Linear layers with an activation between them:

        h₀ = x;  hᵢ = act(Wᵢ hᵢ₋₁ + bᵢ);  output = W h + b

    widths: inputs, hidden layers, outputs, as in (2, 16, 16, 3). With head "classes" the outputs
    are the logits of as many classes, and the loss is cross-entropy; with "values" they are the
    values themselves, and the loss is the mean squared error. With activation "identity" the whole
    is one linear map, however deep. (`layers.MLP` is the two-layer form inside a transformer.)
    """

    def __init__(self, widths: Sequence[int], *, activation: str = "relu", head: Head = "classes"):
        super().__init__()
        problems = []
        if len(widths) < 2 or min(widths) < 1:
            problems.append(f"widths are {tuple(widths)}; give at least two, each at least 1")
        if activation not in ACTIVATIONS:
            problems.append(f"activation is {activation!r}; known are {', '.join(ACTIVATIONS)}")
        if head not in get_args(Head):
            problems.append(f"head is {head!r}; it must be classes or values")
        if problems:
            raise ValueError("; ".join(problems))
        self.activation, self.head = activation, head
        pairs = zip(widths[:-1], widths[1:], strict=True)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairs)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 2/fan-in for the ReLUs (He et al. 2015), 1/fan-in for the
        others, so that signals keep their size from layer to layer; biases 0."""
        gain = 2.0 if self.activation.startswith("relu") else 1.0
        for i, layer in enumerate(self.layers, 1):
            assert isinstance(layer, nn.Linear)
            last = i == len(self.layers)
            layer.weight.normal_(std=((1.0 if last else gain) / layer.in_features) ** 0.5)
            layer.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """x (..., widths[0]) → (..., widths[-1]): logits, or values."""
        act = ACTIVATIONS[self.activation]
        *hidden, last = self.layers
        for layer in hidden:
            x = act(layer(x))
        return last(x)

    def predict(self, x: Tensor) -> Tensor:
        """x (..., widths[0]) → (..., widths[-1]): probabilities of the classes, or the values. No
        gradient."""
        with torch.no_grad():
            y = self(x)
            return softmax(y) if self.head == "classes" else y

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss, in nats or squared units, of x (..., widths[0]): y (...) class numbers,
        int64; or y (..., widths[-1]) values, as x."""
        if self.head == "classes":
            return cross_entropy(self(x), y)
        return mse_loss(self(x), y)

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        *,
        steps: int = 200,
        lr: float = 0.01,
        batch_size: int | None = None,
        optimizer: Optimizer = "adam",
        seed: int = 0,
    ) -> list[float]:
        """Train on points x (N, F) and their y; the loss before each step.

        Each step sees all points, or `batch_size` of them drawn at random. ValueError for points
        that do not fit the network or are not finite, and where the loss explodes; the weights are
        then those that gave that loss.
        """
        self._check(x, y)
        if batch_size is not None and not 1 <= batch_size <= len(x):
            raise ValueError(f"batch_size is {batch_size}; it must be from 1 to {len(x)}")
        choose = {
            "sgd": lambda p: torch.optim.SGD(p, lr=lr),
            "momentum": lambda p: torch.optim.SGD(p, lr=lr, momentum=0.9),
            "adam": lambda p: torch.optim.Adam(p, lr=lr),
        }
        if optimizer not in choose:
            raise ValueError(f"optimizer is {optimizer!r}; it must be one of {', '.join(choose)}")
        update = choose[optimizer](self.parameters())
        draw = torch.Generator().manual_seed(seed)
        losses: list[float] = []
        for _ in range(steps):
            rows = slice(None)
            if batch_size is not None:
                rows = torch.randperm(len(x), generator=draw)[:batch_size]
            loss = self.loss(x[rows], y[rows])  # forward, loss
            if not loss.isfinite():
                raise ValueError(
                    f"the loss of step {len(losses) + 1} is not finite; lr is {lr}, try a lower one"
                )
            update.zero_grad()
            loss.backward()
            update.step()
            losses.append(loss.item())
        return losses

    def _check(self, x: Tensor, y: Tensor) -> None:
        first, last = self.layers[0], self.layers[-1]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        if x.ndim != 2 or x.shape[1] != first.in_features or not len(x):
            raise ValueError(f"x is {tuple(x.shape)}; it must be (N, {first.in_features}), N ≥ 1")
        if x.dtype != first.weight.dtype:
            raise ValueError(f"x is {x.dtype}; the weights are {first.weight.dtype}, so it must be")
        shape = (len(x),) if self.head == "classes" else (len(x), last.out_features)
        if y.shape != shape:
            raise ValueError(f"y is {tuple(y.shape)}; for {len(x)} points it must be {shape}")
        for name, points in (("x", x), ("y", y)):
            if not points.isfinite().all():
                raise ValueError(f"{name} holds a number that is not finite")
