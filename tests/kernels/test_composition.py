"""The kernels together, as a model uses them: compiled as one graph, recomputed, sharded."""

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

from ponder.models import GPT, GPTConfig


@pytest.fixture
def model(device) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=40, context=32, n_layer=1, n_head=2, n_kv_head=1, head_dim=16, n_embd=32
    )
    gpt = GPT(config)
    with torch.no_grad():
        for parameter in gpt.parameters():  # zero output projections would hide what is behind
            if parameter.ndim == 2:
                parameter.normal_(std=0.2)
    return gpt.to(device)


def loss_and_gradients(model, call, tokens, targets) -> list[torch.Tensor]:
    loss = call(tokens, targets)
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]


def batch(device) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(40, (1, 9), device=device)
    return tokens, torch.roll(tokens, -1, 1)


def test_the_model_is_one_graph(model, device):
    data = batch(device)
    whole = torch.compile(model, fullgraph=True, backend="aot_eager")
    eager = loss_and_gradients(model, model, *data)
    for a, b in zip(loss_and_gradients(model, whole, *data), eager, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interpret", ["0", "1"], ids=["pytorch", "kernels"])
@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shapes_are_found_without_memory(model, kind, interpret, dtype, monkeypatch):
    """By tools that plan a run: on meta tensors, or on fake ones, whose values nobody may ask."""
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    model = model.cpu().to(dtype)
    expected = torch.zeros(()), *model.parameters()
    tokens, targets = batch("cpu")
    if kind == "meta":
        with torch.device("meta"):
            model = GPT(model.config).to(dtype)
        found = loss_and_gradients(model, model, tokens.to("meta"), targets.to("meta"))
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = (mode.from_tensor(x) for x in (tokens, targets))
            found = loss_and_gradients(model, model, *fake)
    assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_recomputed_layers_give_the_same_gradients(model, device):
    data = batch(device)
    expected = loss_and_gradients(model, model, *data)
    calls = 0
    for block in model.layers:
        forward = block.forward

        def counted(*inputs, forward=forward):
            nonlocal calls
            calls += 1
            return forward(*inputs)

        block.forward = lambda *x, run=counted: checkpoint(run, *x, use_reentrant=False)
    found = loss_and_gradients(model, model, *data)
    assert calls == 2  # once forward, once more in the backward pass
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def mesh(device, tmp_path):
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(
        backend, rank=0, world_size=1, store=dist.FileStore(str(tmp_path / "s"))
    )
    yield init_device_mesh(device, (1,))
    dist.destroy_process_group()


def test_sharded_parameters_give_the_same_gradients(model, device, mesh):
    """FSDP2: parameters are DTensors outside of the forward pass, and gradients are scattered."""
    data = batch(device)
    expected = loss_and_gradients(model, model, *data)
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    loss = model(*data)
    loss.backward()
    found = [loss.detach(), *(p.grad.full_tensor() for p in model.parameters())]
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
