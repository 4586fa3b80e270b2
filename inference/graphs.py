"""Graphs: a decode step captured as a CUDA graph and replayed, at the cost of one launch.

A step is a few hundred kernels, each shorter on the GPU than its launch is on the host.
"""

import functools
import warnings
from collections.abc import Callable, Hashable

import torch

Step = Callable[[], None]


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One a device for all captures: cuBLAS keeps a workspace for every stream that it has seen."""
    return torch.cuda.Stream(device)


def capture(device: torch.device, step: Step) -> Step:
    """What replays the step. It must have run before, on the shapes that it has now, so that
    everything in it is compiled and chosen; capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device):
        before = torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, stream=_stream(device)):
                step()
        except BaseException:  # a capture that fails does not always leave its stream by itself
            torch.cuda.set_stream(before)
            raise
    return graph.replay


class Graphed:
    """Runs a step many times: once as it is where its tensors are new, and from then on replayed.

    capture: what makes a replay of a step; None: never.
    """

    def __init__(self, capture: Callable[[Step], Step] | None):
        self.capture = capture
        self.key: Hashable = None
        self.replay: Step | None = None

    def __call__(self, step: Step, times: int, key: Hashable) -> None:
        """key: what the tensors that the step reads and writes are, as a replay takes no others."""
        if key != self.key:
            self.key, self.replay = key, None  # frees the old graph's memory
            step()
            times -= 1
            if self.capture is not None:
                try:
                    self.replay = self.capture(step)
                except RuntimeError as error:
                    self.capture = None
                    line = str(error).partition("\n")[0]
                    warnings.warn(f"decoding goes on without CUDA graphs: {line}", stacklevel=2)
        run = self.replay or step
        for _ in range(times):
            run()
