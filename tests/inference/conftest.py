from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from ponder import tasks
from ponder.inference import report
from ponder.models import GPT, GPTConfig, hub
from ponder.training.tokenizer import character_tokenizer


def save_random(
    folder: Path, tokenizer: Tokenizer, *, template: str | None = None, **fields: Any
) -> Path:
    """The folder of a model with that tokenizer that was never trained."""
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=tokenizer.get_vocab_size(),
        context=64,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        head_dim=16,
        n_embd=32,
        n_inner=64,
        **fields,
    )
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    hub.save(gpt, folder, tokenizer=tokenizer, template=template)
    return folder


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A model that speaks last_digit's alphabet."""
    folder = tmp_path_factory.mktemp("models") / "random"
    return save_random(folder, character_tokenizer(tasks.get("last_digit").alphabet))


@pytest.fixture(scope="session")
def text_model(tmp_path_factory) -> Path:
    """A model with the tokenizer of a run on plain text, which has no <think>."""
    folder = tmp_path_factory.mktemp("models") / "text"
    return save_random(folder, character_tokenizer("0123456789+-*= ", thinks=False))


@pytest.fixture
def no_figures(monkeypatch):
    """Reports without their figures, which take seconds: for tests of what else they hold."""
    monkeypatch.setattr(report, "svg", lambda *_, **__: "")
    monkeypatch.setattr(report, "wide_and_narrow", lambda *_, **__: ("", ""))
    monkeypatch.setattr(report, "picture", lambda *_, **__: b"")
    monkeypatch.setattr(report, "png", lambda results: b"")
