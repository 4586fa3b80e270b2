"""Every speed claim of the project: side by side in one process, written to benchmarks/results/."""
