"""One process or many, through accelerate: DDP, or FSDP2 where weights are to be sharded.

A run's state is gathered whole on the main process, under the parameters' own names, so that any
number of processes, sharded or not, goes on from it.
"""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    ProjectConfiguration,
    broadcast_object_list,
)
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import MixedPrecisionPolicy

from ..models import GPT, hub
from ..models.verifier import Verifier
from .config import TrainConfig
from .optimizer import Together

DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Model = GPT | Verifier
T = TypeVar("T")
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def process_state() -> PartialState:
    """How many processes there are, and which of them this is."""
    # Said in so many words: accelerate runs several processes on CPUs only where it is told.
    return PartialState(cpu=not torch.accelerator.is_available())


def main_alone(action: Callable[[], T]) -> T:
    """What the main process's `action` returns, on every process; where it raises ValueError or
    OSError, all raise ValueError. What it returns must pickle."""
    found, fault = None, None
    if process_state().is_main_process:
        try:
            found = action()
        except ValueError as error:
            fault = str(error)
        except OSError as error:
            fault = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    found, fault = broadcast_object_list([found, fault])
    if fault is not None:
        raise ValueError(fault)
    return cast(T, found)


def wants_shards(config: TrainConfig) -> bool:
    """Whether weights are to be sharded: `config.shard`, or accelerate's own configuration.

    ValueError where that one (`accelerate config`, `accelerate launch`) asks for the first FSDP.
    """
    launched = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = os.environ.get("FSDP_VERSION", "1") if launched else "2"
    if version != "2":
        raise ValueError(
            f"accelerate's configuration has fsdp_version {version}; ponder shards with FSDP2, "
            "so set fsdp_version to 2"
        )
    return config.shard or launched


def shard_count(config: TrainConfig, ranks: int) -> int:
    """Over how many processes weights are split: 1, all, or as many as accelerate's parallelism
    configuration makes a whole copy of."""
    if not wants_shards(config):
        return 1
    if os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "false").lower() != "true":
        return ranks
    return int(os.environ.get("PARALLELISM_CONFIG_DP_SHARD_SIZE", ranks))


def build_accelerator(config: TrainConfig, precision: str, *, sharded: bool) -> Accelerator:
    """accelerate, set up for this run: its devices, processes, precision and trackers."""
    folder = str(config.out / "train")
    plugin = None
    if sharded:
        dtype = DTYPE[precision]
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["Block"],
            cpu_ram_efficient_loading=False,  # every process draws the same weights from the seed
            # accelerate's own policy rounds sums of gradients, and the loss, to 16 bits.
            mixed_precision_policy=MixedPrecisionPolicy(
                param_dtype=None if dtype == torch.float32 else dtype, reduce_dtype=torch.float32
            ),
        )
    # An earlier run in this process may have had another precision, or may have been sharded.
    AcceleratorState._reset_state(reset_partial_state=True)
    launched = os.environ.get("ACCELERATE_USE_FSDP")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        mixed_precision="no" if precision == "fp32" else precision,
        # The loop accumulates by itself; else accelerate takes a number from the environment.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        fsdp_plugin=plugin,
        log_with=list(config.trackers) or None,
        project_config=ProjectConfiguration(folder, logging_dir=folder),
    )
    if launched is None:  # the plugin sets it, which the next run in this process would read
        os.environ.pop("ACCELERATE_USE_FSDP", None)
    if plugin and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # accelerate 1.15 shards on accelerators alone, though FSDP2 runs on CPUs as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = plugin
    return accelerator


def gather_weights(model: Model) -> dict[str, Any]:
    """The weights by name, whole and on the CPU, on the main process alone; all must call it."""
    return get_model_state_dict(model, options=WHOLE)


def scatter_weights(model: Model, weights: dict[str, Any]) -> None:
    """Put back what `gather_weights` gave; every process must hold it."""
    set_model_state_dict(model, weights, options=WHOLE)


def gather(model: Model, optimizer: Together) -> dict[str, Any]:
    """{"model", "optimizer"}, whole and on the CPU, on the main process alone; all must call it."""
    state = get_optimizer_state_dict(model, optimizer.parts, options=WHOLE)
    return {"model": gather_weights(model), "optimizer": state}


def scatter(model: Model, optimizer: Together, state: dict[str, Any]) -> None:
    """Put back what `gather` gave, on every process, however many there are now."""
    # In this order: an optimizer makes room for its state with a step of zero length.
    kept = [x for values in state["optimizer"]["state"].values() for x in values.values()]
    if any(isinstance(x, torch.Tensor) for x in kept):  # PyTorch fails where, as for SGD, none is
        set_optimizer_state_dict(model, optimizer.parts, state["optimizer"], options=WHOLE)
        optimizer.share_groups()
    scatter_weights(model, state["model"])


def whole_model(model: Model, blank: Callable[[], Model], *, sharded: bool, main: bool) -> Any:
    """The model with every weight whole, on the main process; None elsewhere.

    Every process must call it. blank makes another of the same shape. Sharded weights are gathered
    on the CPU, others stay where they are.
    """
    if not sharded:
        return model if main else None
    state = gather_weights(model)
    if not main:
        return None
    with hub.shapes_alone():
        copy = blank()
    copy.load_state_dict(state, assign=True)
    body = copy.model if isinstance(copy, Verifier) else copy
    if body.config.tie_embeddings and isinstance(copy, GPT):
        copy.lm_head.weight = copy.embed_tokens.weight
    body.rotary.reset("cpu")
    return copy
