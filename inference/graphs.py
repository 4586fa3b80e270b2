"""Graphs: a decode step captured as a CUDA graph and replayed, at the cost of one launch.

A step is a few hundred kernels, each shorter on the GPU than its launch is on the host.
"""

import warnings
from collections.abc import Callable, Hashable

import torch

Step = Callable[[], None]


def capture(step: Step) -> Step:
    """What replays the step. It must have run before, on the shapes that it has now, so that
    everything in it is compiled and chosen; capturing runs nothing."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Graphed:
    """Runs a step many times: as it is while its tensors are new, replayed once they stay.

    capture: what makes a replay of a step; None: never.
    """

    def __init__(self, step: Step, capture: Callable[[Step], Step] | None):
        self.step, self.capture = step, capture
        self.key: Hashable = None
        self.replay: Step | None = None

    def __call__(self, times: int, key: Hashable) -> None:
        """key: what the tensors that the step reads and writes are, as a replay takes no others."""
        if key != self.key:
            self.key, self.replay = key, None  # frees the old graph's memory
        elif self.replay is None and self.capture is not None:
            try:
                self.replay = self.capture(self.step)
            except RuntimeError as error:
                self.capture = None
                line = str(error).partition("\n")[0]
                warnings.warn(f"decoding goes on without CUDA graphs: {line}", stacklevel=2)
        run = self.replay or self.step
        for _ in range(times):
            run()
