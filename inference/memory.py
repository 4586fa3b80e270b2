"""Memory: what a run of the engine will hold at most, reckoned before it starts."""

import warnings
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..models import GPTConfig
from .request import Request

GIB = 2**30
# Linux's control groups: which ones a process is in, and where version 2 ("") and version 1 keep
# the most that one may take, what it has taken, and how that is made up.
CGROUPS, CGROUP_FILES = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
MEMORY_FILES = {
    "": ("", "memory.max", "memory.current", "inactive_file"),
    "memory": (
        "memory",
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        "total_inactive_file",
    ),
}


def available(device: torch.device) -> int | None:
    """Bytes that new tensors may take on the device; None where it does not say."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "cpu":
        import psutil  # comes with accelerate

        return min([psutil.virtual_memory().available, *_allowed()])
    return None


def _allowed() -> Iterator[int]:
    """Bytes that each limit on this process, as a container or a batch system sets, leaves it."""
    with suppress(ImportError):  # not on Windows
        import resource

        import psutil

        most = resource.getrlimit(resource.RLIMIT_AS)[0]
        if most != resource.RLIM_INFINITY:
            yield max(0, most - psutil.Process().memory_info().vms)
    with suppress(OSError):
        for line in CGROUPS.read_text().splitlines():
            _, kinds, path = line.split(":", 2)
            for kind, (root, most, used, cached) in MEMORY_FILES.items():
                if kind in kinds.split(","):
                    group = Path(path.lstrip("/"))
                    for folder in (group, *group.parents):
                        yield from _left(CGROUP_FILES / root / folder, most, used, cached)


def _left(folder: Path, most: str, used: str, cached: str) -> Iterator[int]:
    """What the limit of one control group leaves, where it has one."""
    with suppress(OSError, ValueError, KeyError):  # "max" is no number
        left = int((folder / most).read_text()) - int((folder / used).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        yield max(0, left + int(stat[cached]))  # files that were read can be forgotten


def needed(
    config: GPTConfig,
    *,
    slots: int,
    prompt: int,
    new: int,
    itemsize: int,
    block_tokens: int,
    weights: int = 0,
) -> int:
    """Bytes that `slots` samples of at most `new` tokens behind prompts of at most `prompt` take.

    itemsize: bytes of a number in the cache; block_tokens: tokens of a prefill; weights: bytes of a
    copy of the weights, where one is made. The worst case: no prompt is shared, every sample is as
    long as it may be, and a cache is copied into a larger one, keys and values in turn.
    """
    c = config
    token = 2 * c.n_layer * c.n_kv_head * c.head_dim * itemsize
    cache = slots * token * (new + 2 * prompt)  # a prompt in its prefilled block, and as a prefix
    copied = slots * token * max(new, prompt) // 2
    logits = slots * c.vocab_size * 24  # as fp32, log-probabilities, weights; their sums in fp64
    width = 4 * c.n_embd + 2 * (c.n_head + c.n_kv_head) * c.head_dim + 3 * c.n_inner
    return weights + cache + copied + logits + 4 * width * max(block_tokens, slots)


class Plan:
    """How many slots a run has, for the requests that it is to take.

    Of the numbers of slots in `choices`, from the most to the least, the first with which the
    requests fit into `free` bytes (None: any fits); a warning where that is not the first of all.
    run: what else `needed` asks for. Raises ValueError where none fits.
    """

    def __init__(
        self, requests: Iterable[Request], choices: Iterable[int], free: int | None, **run: Any
    ):
        self.free, self.run = free, run
        self.prompt = self.new = 0
        self._grow(requests)
        most, *fewer = choices
        self.slots = most
        for slots in fewer:
            if not self._lacks():
                break
            self.slots = slots
        self._check()
        if self.slots < most:
            warnings.warn(
                f"{most} slots need {self.needed(most) / GIB:.3g} GiB of memory and "
                f"{(free or 0) / GIB:.3g} GiB are free: {self.slots} slots are used",
                stacklevel=3,
            )

    def admit(self, request: Request) -> None:
        """Reckon with one more request; ValueError where the slots have no memory for it."""
        if self._grow([request]):
            self._check()

    def needed(self, slots: int) -> int:
        return needed(slots=slots, prompt=self.prompt, new=self.new, **self.run)

    def _grow(self, requests: Iterable[Request]) -> bool:
        before = self.prompt, self.new
        for request in requests:
            self.prompt = max(self.prompt, len(request.prompt))
            self.new = max(self.new, request.params.max_tokens)
        return before != (self.prompt, self.new)

    def _lacks(self) -> bool:
        return self.free is not None and self.needed(self.slots) > self.free

    def _check(self) -> None:
        if self.free is not None and self._lacks():
            raise ValueError(
                f"{self.slots} samples at a time of up to {self.new} tokens behind prompts of up "
                f"to {self.prompt} need {self.needed(self.slots) / GIB:.3g} GiB of memory and "
                f"{self.free / GIB:.3g} GiB are free; fewer slots, a smaller max_tokens or shorter "
                "prompts need less"
            )
