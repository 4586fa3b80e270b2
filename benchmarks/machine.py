"""What there is to measure with: the GPU, versions, the ceilings, and which peers are missing.

`python -m ponder.benchmarks.machine`. A peer that is missing is left out of its comparisons.
"""

import argparse
import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch

from ponder.benchmarks.comparison import copy_ceiling, matmul_ceiling
from ponder.benchmarks.measure import DEVICE, machine
from ponder.training.hardware import has_bf16_products

# module: (package, what cannot be done without it)
PACKAGES = {
    "liger_kernel": ("liger-kernel", "Liger's kernels as a peer"),
    "cut_cross_entropy": ("cut-cross-entropy", "its loss as a peer"),
    "flash_attn": ("flash-attn", "FlashAttention 2 as a peer"),
    "flash_attn_interface": ("flash-attn-3", "FlashAttention 3 as a peer"),
    "flash_attn.cute": ("flash-attn-4", "FlashAttention 4 as a peer"),
    "transformers": ("transformers", "sampling, the whole step and patched models"),
    "accelerate": ("accelerate", "training: the demo"),
    "tyro": ("tyro", "the command `ponder`: the demo, many tests"),
    "datasets": ("datasets", "the tests of data from files of its own kind"),
    "tqdm": ("tqdm", "training"),
    "jinja2": ("jinja2", "the report: the demo"),
    "matplotlib": ("matplotlib", "figures"),
    "scipy": ("scipy", "the report: the demo"),
    "pytest": ("pytest", "all tests"),
    "pytest_timeout": ("pytest-timeout", "a time limit for each test"),
    "hypothesis": ("hypothesis", "the tests of random configurations"),
}


def found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package around it
        return False


def main() -> None:
    argparse.ArgumentParser().parse_known_args()
    print(f"Python {platform.python_version()}")
    for name, value in machine().items():
        print(f"{name}: {value}")
    if DEVICE == "cuda":
        facts = torch.cuda.get_device_properties(0)
        print(f"{facts.multi_processor_count} processors, {facts.total_memory / 2**30:.0f} GiB")
    if has_bf16_products(torch.device(DEVICE)):
        print(f"matrix product, bf16: {matmul_ceiling() / 1e12:.1f} TFLOP/s")
    print(f"copy: {copy_ceiling() / 1e9:.0f} GB/s")
    for module, (package, purpose) in PACKAGES.items():
        if found(module):
            try:
                print(f"{package} {version(package)}")
            except PackageNotFoundError:
                print(f"{package}, of unknown version")
        else:
            print(f"MISSING {package}: {purpose}")


if __name__ == "__main__":
    main()
