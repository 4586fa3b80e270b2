"""Every code block of README and of docs/*.md runs. (The tour's pages have a test of their own.)

Python blocks of a page run one after the other, in one namespace and an empty folder. Where they
name a checkpoint of the Hub they get a tiny one of the same type. Of shell blocks each `ponder`
command is parsed and its configuration checked, as far as nothing is started.
"""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest
import torch
import tyro

from ponder import cli, kernels, tasks
from ponder.models import GPT, GPTConfig
from ponder.models.verifier import Reading, Verifier, save_verifier
from ponder.training.tokenizer import character_tokenizer

from .conftest import INTERPRET

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
TINY = dict(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
)  # fmt: skip


def blocks(page: Path, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page.read_text()) if name == language]


def with_blocks(language: str) -> list:
    return [pytest.param(p, id=p.stem) for p in PAGES if blocks(p, language)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, str]:
    """Folders that stand for checkpoints of the Hub, which tests do not download."""
    import transformers as hf

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("hub")
    gpt2 = hf.GPT2Config(vocab_size=256, n_positions=128, n_embd=64, n_layer=2, n_head=2)
    shapes = {
        "Qwen/Qwen3-0.6B": hf.Qwen3Config(**TINY),
        "HuggingFaceTB/SmolLM2-135M": hf.LlamaConfig(**TINY),
        "openai-community/gpt2": gpt2,
    }
    for name, shape in shapes.items():
        hf.AutoModelForCausalLM.from_config(shape).save_pretrained(folder / name)
    return {name: str(folder / name) for name in shapes}


def verifier_at(folder: Path) -> None:
    """A verifier of random weights, where a page has trained one."""
    words = character_tokenizer(tasks.get("countdown").alphabet)
    shape = GPTConfig(
        vocab_size=words.get_vocab_size(), context=64, n_layer=1, n_head=1, n_kv_head=1,
        head_dim=16, n_embd=16, n_inner=32,
    )  # fmt: skip
    save_verifier(Verifier(GPT(shape), Reading("value", ";")), folder, tokenizer=words)


@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_runs(page, checkpoints, tmp_path, monkeypatch):
    from ponder.inference import strategies

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(strategies, "STRATEGIES", dict(strategies.STRATEGIES))
    torch.set_num_threads(1)
    if page.stem == "verifiers":
        verifier_at(tmp_path / "runs" / "verifier")
    if page.stem == "add_a_kernel" and INTERPRET:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    scope: dict = {"__name__": "__main__"}
    for number, text in enumerate(blocks(page, "python")):
        for name, folder in checkpoints.items():
            text = text.replace(name, folder)
        tops = {n.name for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import)
                for n in node.names}  # fmt: skip
        if "peft" in tops and importlib.util.find_spec("peft") is None:
            continue  # the one package that pages use and the tests do not install
        path = tmp_path / f"block_{number}.py"  # Triton reads a kernel's source from its file
        path.write_text(text)
        exec(compile(text, path, "exec"), scope)


class Parsed(BaseException):
    """A command's configuration is whole; what it would start is not started."""


def commands(text: str):
    """The words of each `ponder` command, however it is launched."""
    for line in text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|-m )ponder (\w.*)", line)
        if found:
            words = shlex.split(found[1].rstrip("'"), comments=True)
            yield words


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_shell_commands_are_whole(page, tmp_path, monkeypatch, capsys):
    parse = tyro.cli

    def stop(*arguments, **options):
        config = parse(*arguments, **options)
        if hasattr(config, "check"):
            config.check()
        raise Parsed

    monkeypatch.setattr(tyro, "cli", stop)
    for text in blocks(page, "sh"):
        for words in commands(text):
            assert words[0] in cli.COMMANDS
            if words[-1] == "...":  # the rest is as above it
                continue
            try:
                status = cli.run(words)
            except Parsed:
                continue
            except SystemExit as error:
                status = error.code
            raise AssertionError(f"ponder {shlex.join(words)}: {status}, {capsys.readouterr()}")
        for target in re.findall(r"^make (\w+)", text, re.MULTILINE):
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
        for module in re.findall(r"-m ponder\.([\w.]+)", text):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file() or (
                ROOT / module.replace(".", "/") / "__main__.py"
            ).is_file(), module


def test_commands_are_found_however_they_are_launched():
    text = "ponder plan 124m  # said\naccelerate launch \\\n -m ponder train tiny --steps 3\nls\n"
    assert list(commands(text)) == [["plan", "124m"], ["train", "tiny", "--steps", "3"]]


def test_the_reference_shows_every_kernel():
    text = (ROOT / "docs/api/kernels.md").read_text()
    # By module and function: most functions are called as their module, which would hide them.
    shown = re.findall(r"^::: ponder\.kernels\.\w+\.(\w+)$", text, re.MULTILINE)
    assert sorted(shown) == sorted(kernels.__all__)


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        prose = BLOCK.sub("", page.read_text())
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
            if "://" in target:
                continue
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
