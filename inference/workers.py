"""Workers: pieces of work side by side on a CPU, each on a thread of its own.

A decode step is hundreds of short operations, too short to be divided among threads: a second one
brought nothing. Whole blocks of rows side by side keep every core busy, as PyTorch holds Python's
lock only between operations.
"""

import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

MOST = 8  # more threads would wait for Python's lock; PyTorch's own take the cores that are left

T = TypeVar("T")
R = TypeVar("R")


class Workers:
    """`run` applies a function to many things, up to `pieces` at a time.

    The threads share PyTorch's setting among them (`torch.get_num_threads`); one of them is none:
    the caller's then does the work. A context manager, that ends the threads.
    """

    def __init__(self, pieces: int):
        threads = torch.get_num_threads()
        count = max(1, min(pieces, threads, MOST))
        self.pool = None
        if count > 1:
            started = threading.Barrier(count + 1)

            def begin() -> None:
                torch.get_num_threads()  # else the first operation would set the process's number
                torch.set_num_threads(threads // count)
                started.wait()

            self.pool = ThreadPoolExecutor(count, initializer=begin)
            for _ in range(count):
                self.pool.submit(int)
            started.wait()
            torch.set_num_threads(threads)  # what threads to come begin with is the process's

    def run(self, work: Callable[[T], R], things: Iterable[T], *, alike: bool = False) -> list[R]:
        """work(thing) of each, in their order; the first exception is raised.

        One thing alone has all of PyTorch's threads; with `alike` as many as each of several, so
        that what rounds otherwise on another number of threads does not show its companions.
        """
        things = list(things)
        if self.pool is None or (len(things) < 2 and not alike):
            return [work(thing) for thing in things]
        return list(self.pool.map(work, things))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self.pool is not None:
            self.pool.shutdown()
