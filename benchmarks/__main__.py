"""`python -m ponder.benchmarks`: every comparison that this machine can run."""

from ponder.benchmarks import kernels, sampling, train_step
from ponder.benchmarks.measure import write

for module in (kernels, train_step, sampling):
    write(module.run())
