"""Compiled kernels, run without a GPU: PTX by a machine of some hundred instructions.

Triton's interpreter runs a kernel's Python. What a GPU runs is what Triton makes of it: layouts,
copies by cp.async and TMA, tensor cores that go on reading while the program does, or have a memory
of their own, barriers, groups of warps with their own work. `PONDER_PTX=90 python -m pytest
tests/kernels` compiles every kernel that a test launches for sm_90 (80, 100, 120), down to PTX, and
runs that.

The machine is as unkind as PTX allows. Warps run in a random order, as far as barriers let them;
programs too. An asynchronous copy or product is done at once, at the last moment, or in between;
before, shared memory and registers hold NaN. It ends at an address outside of the tensors given, at
one that is not aligned, at shared memory that the asynchronous proxy reads and nobody has fenced,
at warps that wait for one another. What it does not know: ptxas, which comes after PTX, the time
that anything takes, and rounding in the hardware's approximations and sums of products.
"""
