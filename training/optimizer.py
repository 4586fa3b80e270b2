"""Optimizers: Muon for the layers' matrices and AdamW for the rest, or AdamW or SGD alone."""

from typing import Any

from torch import nn, optim

from .config import TrainConfig


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
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def set_rate(self, rate: float) -> None:
        """Every group at `rate` times its peak."""
        for group in self.param_groups:
            group["lr"] = rate * group["initial_lr"]


def build_optimizer(model: nn.Module, config: TrainConfig) -> Together:
    """An optimizer that holds every parameter once.

    Muon (Jordan et al. 2024) orthogonalizes the update of each matrix inside the layers; the
    embedding, the head and the norms take AdamW (Loshchilov and Hutter 2019), as its authors say.
    """
    parameters = list(model.named_parameters())
    matrices = [p for name, p in parameters if p.ndim == 2 and "layers." in name]
    tables = [p for name, p in parameters if p.ndim == 2 and "layers." not in name]
    vectors = [p for _, p in parameters if p.ndim != 2]
    decay = config.weight_decay
    parts: list[optim.Optimizer] = []
    if config.optimizer == "muon":
        parts.append(optim.Muon(matrices, lr=config.matrix_lr, weight_decay=decay))
        matrices = []
    groups = [
        {"params": matrices + tables, "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        parts.append(optim.SGD(groups, lr=config.lr, momentum=0.9))
    else:
        parts.append(optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True))
    for part in parts:
        for group in part.param_groups:
            group["initial_lr"] = group["lr"]
    optimizer = Together(*parts)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for _, p in parameters), "a parameter is not held once"
    return optimizer
