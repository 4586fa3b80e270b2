from pathlib import Path

import pytest
import torch

from ponder import tasks
from ponder.models import GPT, GPTConfig, hub
from ponder.training.tokenizer import character_tokenizer


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model that was never trained, but speaks last_digit's alphabet."""
    folder = tmp_path_factory.mktemp("models") / "random"
    torch.manual_seed(0)
    tokenizer = character_tokenizer(tasks.get("last_digit").alphabet)
    config = GPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        context=64,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        head_dim=16,
        n_embd=32,
        n_inner=64,
    )
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    hub.save(gpt, folder, tokenizer=tokenizer)
    return folder
