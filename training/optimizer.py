"""Optimizers: Muon for the layers' matrices and AdamW for the rest, or one; averaged weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..models.memory import MUON_STACK
from .config import TrainConfig
from .hardware import has_bf16_products


class Together(optim.Optimizer):
    """Several optimizers as one, so that a gradient scaler sees one step and not several."""

    def __init__(self, *parts: optim.Optimizer):
        self.parts = parts
        # The parts' own group dictionaries: a rate set here is set there.
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure=None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state_dict[str(i)])
        self.share_groups()

    def share_groups(self) -> None:
        """Take the parts' group dictionaries again: loading a state makes new ones."""
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        """Every group at `rate` times its peak."""
        for group in self.param_groups:
            group["lr"] = rate * group["initial_lr"]


class Muon(optim.Muon):
    """torch.optim.Muon, with matrices of one shape orthogonalized in one batch.

    The same to the bit where the machine has products in bf16; elsewhere in fp32, as a CPU without
    them is ten times slower in bf16.
    16 matrices of 128 × 128 take 7 ms of a CPU core instead of 13; on a GPU one launch stands for
    many. Sharded matrices go one by one, through PyTorch's own step.
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params: list[Tensor] = []
            grads: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, params, grads, momenta)
            if any(isinstance(p, DTensor) for p in params):
                return super().step(closure)
            alike: dict[torch.Size, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for p, grad, momentum in zip(params, grads, momenta, strict=True):
                momentum.lerp_(grad, 1 - group["momentum"])
                alike.setdefault(p.shape, []).append((p, grad, momentum))
            for (rows, columns), found in alike.items():
                rate = group["lr"] * max(1, rows / columns) ** 0.5
                count = max(1, MUON_STACK // (rows * columns))
                if not has_bf16_products(params[0].device):  # in fp32 they need more room
                    count = min(count, -(-len(found) // 2))
                for i in range(0, len(found), count):
                    part = found[i : i + count]
                    updates = orthogonal(  # of Nesterov's momentum; nothing else holds on to it
                        torch.stack([g.lerp(m, group["momentum"]) for _, g, m in part]), group
                    )
                    for (p, _, _), update in zip(part, updates, strict=True):
                        p.mul_(1 - group["lr"] * group["weight_decay"])
                        p.add_(update, alpha=-rate)


def orthogonal(x: Tensor, group: dict[str, Any]) -> Tensor:
    """Matrices (N, A, B) in fp32, which are lost, made nearly orthogonal by Newton and Schulz's
    iteration, in bf16 where the device has such products.

    X ← a X + (b X Xᵀ + c (X Xᵀ)²) X, from X scaled to a norm of 1 (Jordan et al. 2024). `group`
    holds (a, b, c) and the number of steps by torch.optim.Muon's names.
    """
    a, b, c = group["ns_coefficients"]
    tall = x.shape[-2] > x.shape[-1]
    x = x.bfloat16() if has_bf16_products(x.device) else x
    x = x.mT if tall else x
    x.div_(torch.linalg.matrix_norm(x, keepdim=True).clamp(min=group["eps"]))
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x.mT if tall else x


def build_optimizer(model: nn.Module, config: TrainConfig) -> Together:
    """An optimizer that holds every parameter once.

    Muon (Jordan et al. 2024) orthogonalizes the update of each matrix inside the layers; the
    embedding, the head and the norms take AdamW (Loshchilov and Hutter 2019), as its authors say.
    Adam: Kingma and Ba 2015. Sharded matrices are gathered by Muon's own products.
    """
    parameters = list(model.named_parameters())
    matrices = [p for name, p in parameters if p.ndim == 2 and "layers." in name]
    tables = [p for name, p in parameters if p.ndim == 2 and "layers." not in name]
    vectors = [p for _, p in parameters if p.ndim != 2]
    decay = config.weight_decay
    parts: list[optim.Optimizer] = []
    if config.optimizer == "muon":
        parts.append(Muon(matrices, lr=config.matrix_lr, weight_decay=decay))
        matrices = []
    groups = [
        {"params": matrices + tables, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer in ("momentum", "sgd"):
        momentum = 0.9 if config.optimizer == "momentum" else 0.0
        parts.append(optim.SGD(groups, lr=config.lr, momentum=momentum))
    else:
        adam = optim.Adam if config.optimizer == "adam" else optim.AdamW
        parts.append(adam(groups, lr=config.lr, betas=(0.9, 0.95), fused=True))
    for part in parts:
        for group in part.param_groups:
            group["initial_lr"] = group["lr"]
    optimizer = Together(*parts)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in parameters), "a parameter is not held once"
    return optimizer


class Average:
    """An exponential moving average of a model's weights (Polyak and Juditsky 1992).

    average ← decay · average + (1 − decay) · weights after each step; in the first steps the decay
    is (1 + step) / (10 + step) where that is smaller, so that it forgets the random beginning.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.weights = [_local(p) for p in model.parameters()]
        self.average = [w.clone() for w in self.weights]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights as they are after this step (0 is the first)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        get_ema_multi_avg_fn(decay)(self.average, self.weights, None)

    @contextmanager
    def shown(self) -> Iterator[None]:
        """The model's weights are the averaged ones in here, and exactly the old ones after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self.weights, self.average, strict=True):
            kept = weight.clone()
            weight.copy_(average)
            average.copy_(kept)


def _local(p: nn.Parameter) -> Tensor:
    """This process's part of a parameter, sharing its memory."""
    return (p.to_local() if isinstance(p, DTensor) else p).detach()
