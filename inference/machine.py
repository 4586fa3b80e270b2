"""What the speakers of this machine share: its device, a model's identity, too little memory."""

import hashlib
import os
import sys
from pathlib import Path

import torch

from ..models import hub


def model_hash(folder: Path) -> str:
    """What the model is, whatever its folder is called: a hash of configuration and weights."""
    digest = hashlib.sha256()
    names = ("config.json", "tokenizer.json", hub.TEMPLATE)
    for path in sorted([folder / n for n in names] + list(folder.glob("*.safetensors"))):
        if path.exists():
            digest.update(path.name.encode())
            with open(path, "rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
    return digest.hexdigest()[:16]


def local_folder(path: str) -> Path:
    """Where the files of a loaded checkpoint lie: its folder, or the Hub's in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path, local_files_only=True))
    return folder


def device() -> str:
    """This process's GPU, made the current one, or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    number = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
    torch.cuda.set_device(number)  # where kernels are launched
    return f"cuda:{number}"


def out_of_memory(error: BaseException) -> bool:
    """Whether the machine, or its GPU, has too little memory for what was tried."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, ValueError) and error.__cause__:  # the engine's sentence about it
        return out_of_memory(error.__cause__)
    said = ("not enough memory", "out of memory", "ALLOC_FAILED")  # PyTorch, Triton, cuBLAS
    return isinstance(error, RuntimeError) and any(words in str(error) for words in said)


def halved(slots: int, least: int = 1) -> int:
    """Fewer slots for the same work, told on stderr; ValueError where there are none to spare."""
    if slots <= least:
        raise ValueError(
            f"the memory does not hold even {'one sample' if slots == 1 else f'{slots} samples'} "
            "at once; take a smaller model, a smaller --max-tokens, or bf16"
        )
    print(f"ponder: out of memory; {slots // 2} slots instead of {slots}", file=sys.stderr)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return slots // 2
