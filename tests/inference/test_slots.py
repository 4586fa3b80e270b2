"""What the engine is built of: groups of rows that share a prompt, graphs, the plan."""

import gc
import random
import weakref
from functools import partial
from unittest.mock import patch

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ponder.inference.engine import LocalEngine, Request, SamplingParams
from ponder.inference.graphs import Graphed
from ponder.inference.prompts import Groups, Place, Prompts
from ponder.inference.slots import Slots
from ponder.models import GPTConfig, KVCache, Prefix, memory
from ponder.models.decoder import Decoder
from ponder.models.memory import GIB, available, sampling_memory

from ..models import tiny

EOS = 0
gpt = partial(tiny.gpt, context=256)


def requests(count=40, prompts=5, max_tokens=20) -> list[Request]:
    draw = random.Random(0)
    known = [tuple(draw.choices(range(2, 21), k=draw.choice((1, 7, 33)))) for _ in range(prompts)]
    return [
        Request(known[i % prompts], SamplingParams(max_tokens=1 + i % max_tokens), 3, i, key=i)
        for i in range(count)
    ]


def results(engine: LocalEngine, asked: list[Request]) -> dict:
    return {s.request.key: (s.tokens, s.logprob) for s in engine.generate(asked)}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_every_row_finds_its_prompt(data, width):
    """Rows come and go at random; after each change all of them see their own prompt's keys."""
    config, rows = GPTConfig(99, 128, 1, 1, 1, 16), 8
    groups = Groups(Prefix(config, rows, 32, width))
    here: dict[int, tuple[int, ...]] = {}
    for _ in range(data.draw(st.integers(1, 12))):
        for row in data.draw(st.sets(st.sampled_from(sorted(here)))) if here else ():
            groups.remove(row, here.pop(row))
        for row in data.draw(st.sets(st.sampled_from(range(rows)))) - set(here):
            kind = data.draw(st.integers(0, 4))
            here[row] = (kind,) * (1 + 20 * kind)
            block = KVCache(config, 2, 128)
            block.keys[:, 1] = block.values[:, 1] = kind + 1
            groups.add(row, here[row], Place(block, 1))
        groups.update()
        prefix = groups.prefix
        assert prefix.taken.sum() == len(here)
        assert prefix.groups <= rows
        for row, prompt in here.items():
            place = int(prefix.place[row])
            group, n = place // width, len(prompt) - 1
            assert prefix.order[place] == row and prefix.taken[place]
            assert prefix.lengths[group] == n
            for x in (prefix.keys, prefix.values):
                assert (x[0, group, 0, :n] == prompt[0] + 1).all()


def test_samples_of_a_prompt_share_the_time_of_its_reading(monkeypatch):
    clock = iter([0.0, 6.0])
    monkeypatch.setattr("ponder.inference.engine.fits", lambda *_: False)
    monkeypatch.setattr("ponder.inference.prompts.time.perf_counter", lambda: next(clock))
    engine = LocalEngine(gpt(), slots=8, eos=EOS)
    prompts = Prompts(engine, engine.network())
    known = [(2, 3), (2, 3), (4, 5), (5,) * 40]  # two of one block, and one of twice its width
    asked = [Request(p, SamplingParams(max_tokens=2), 0, i) for i, p in enumerate(known)]
    for prompt in known:
        prompts.expect(prompt)
    prompts.prefill(asked, [])
    assert [prompts.take(prompt)[1] for prompt in known] == pytest.approx([0.5, 0.5, 1, 4])
    assert not prompts.ready and not prompts.owed and not prompts.waiting  # nobody needs them


def test_full_groups_hold_as_many_rows_as_they_have_places():
    groups = Groups(Prefix(GPTConfig(99, 64, 1, 1, 1, 16), 32, 32, 4))
    block = KVCache(GPTConfig(99, 64, 1, 1, 1, 16), 1, 32)
    for row in range(32):
        groups.add(row, (row // 16, 5), Place(block, 0))
    groups.update()
    assert groups.prefix.groups == 8 and groups.prefix.taken.all()
    assert groups.prefix.order.tolist() == list(range(32))


@pytest.mark.parametrize("kind", ["modules", "decoder fp32", "decoder bf16"])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (8, 1)])
def test_a_shared_prompt_is_as_if_it_were_the_rows_own(kind, heads):
    """Rows of unlike prompts and lengths, some groups half empty, against full forward passes."""
    model = gpt(n_head=heads[0], n_kv_head=heads[1])
    c, dtype = model.config, torch.bfloat16 if "bf16" in kind else torch.float32
    network = model if kind == "modules" else Decoder(model, dtype)
    draw = torch.Generator().manual_seed(0)
    sequences = torch.randint(21, (8, 240), generator=draw)
    prompts = [5, 5, 5, 5, 5, 209, 209, 1]  # tokens; the rows of equals share theirs
    sequences[:5, :5], sequences[5:7, :209] = sequences[0, :5], sequences[5, :209]
    with torch.inference_mode():
        wanted = model(sequences)
        cache = KVCache(c, 8, 32, dtype=dtype)
        cache.prefix, cache.empty = Prefix(c, 8, 32, 4, dtype=dtype), False
        groups = Groups(cache.prefix)
        for row, n in enumerate(prompts):
            block = KVCache(c, 1, 256, dtype=dtype)
            network.hidden(sequences[row : row + 1, :n], block)
            groups.add(row, tuple(sequences[row, :n].tolist()), Place(block, 0))
        groups.update()
        assert cache.prefix.groups == 4  # of 4, 1, 2 and 1 rows
        at = torch.tensor(prompts) - 1
        for _ in range(6):
            here = torch.arange(8), at + cache.lengths
            found = network.logits(network.hidden(sequences[here][:, None], cache))[:, 0]
            tolerance = 0.25 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(found, wanted[here], rtol=0, atol=tolerance)
            cache.lengths += 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(4, 2), (2, 2), (8, 1)])
def test_shapes_of_a_cache_do_not_show(dtype, heads):
    """The number of groups, and the capacities of prefix and cache: not a bit of the logits."""
    model = gpt(n_head=heads[0], n_kv_head=heads[1])
    c, decoder = model.config, Decoder(model, dtype)
    keys, values, own_keys, own_values = torch.randn(4, c.n_layer, 1, c.n_kv_head, 64, c.head_dim)
    found = []
    with torch.inference_mode():
        for own, capacity, n in (
            (32, 32, 8),
            (64, 64, 8),
            (224, 32, 9),
            (32, 448, 20),
            (64, 224, 32),
        ):
            cache = KVCache(c, 32, own, dtype=dtype)
            cache.keys[:, :, :, :20] = own_keys[..., :20, :]
            cache.values[:, :, :, :20] = own_values[..., :20, :]
            cache.lengths += 20
            cache.prefix, cache.empty = Prefix(c, 32, 32, 4, dtype=dtype), False
            cache.prefix.resize(n, capacity)
            cache.prefix.keys[:, :, :, :30] = keys[..., :30, :]
            cache.prefix.values[:, :, :, :30] = values[..., :30, :]
            cache.prefix.lengths += 30
            places = torch.randperm(n * 4)[:32]
            cache.prefix.place.copy_(places)
            cache.prefix.order[places] = torch.arange(32)
            found.append(decoder.logits(decoder.hidden(torch.full((32, 1), 5), cache)))
    for logits in found:
        assert (logits == found[0][:1]).all()


def test_a_step_runs_once_on_new_tensors_and_is_replayed_from_then_on():
    log = []
    graphed = Graphed(lambda step: lambda: log.append("replay"))
    for key in "aab":
        graphed(lambda: log.append("step"), 2, key)
    assert log == ["step", "replay", "replay", "replay", "step", "replay"]


def test_a_capture_that_fails_is_told_once():
    def fail(step):
        raise RuntimeError("no such thing\ndetails")

    log = []
    graphed = Graphed(fail)
    step = partial(log.append, 1)
    with pytest.warns(UserWarning, match="without CUDA graphs: no such thing$"):
        graphed(step, 2, "a")
    graphed(step, 1, "a"), graphed(step, 2, "b")
    assert len(log) == 5


def test_what_a_run_held_is_free_at_its_end():
    """Without a search for cycles: a GPU's memory is wanted at once by what comes next."""
    engine, alive = LocalEngine(gpt(), slots=8, eos=EOS), weakref.WeakSet()
    start = Slots.__init__

    def init(self, *args):
        start(self, *args)
        alive.add(self)

    gc.disable()
    try:
        with patch.object(Slots, "__init__", init):
            assert len(results(engine, requests())) == 40
        assert not alive
    finally:
        gc.enable()


def test_a_gpu_s_groups_are_as_wide_as_prompts_have_samples():
    model = gpt(n_head=4, n_kv_head=2)
    engine = LocalEngine(model, slots=8, eos=EOS, device="cuda")
    asked = requests(count=3, prompts=3)  # a sample of each
    assert engine.group_of(asked) == 1
    assert engine.group_of([*asked, *asked, asked[0]]) == 4  # of three
    assert engine.group_of(asked * 99) == engine.group == 32
    assert LocalEngine(model, slots=8, eos=EOS).group_of(asked) == 32


def test_a_replay_meets_the_tensors_that_it_was_captured_with(monkeypatch):
    """As a graph would: what is captured holds on to the tensors that it saw, not to the names."""
    replays = 0

    def capture(step):
        slots = step.__self__
        names = [(slots.cache, "keys"), (slots.cache, "values"), (slots, "tokens")]
        names += [(slots.prefix, n) for n in ("keys", "values", "lengths", "order", "taken")]
        seen = [getattr(*name) for name in names]

        def replay():
            nonlocal replays
            replays += 1
            assert all(getattr(*name) is x for name, x in zip(names, seen, strict=True))
            step()

        return replay

    engine = LocalEngine(gpt(), slots=8, eos=EOS)
    wanted = results(engine, requests())
    start = Slots.__init__

    def init(self, *args):
        start(self, *args)
        self.decode.capture = capture

    monkeypatch.setattr(Slots, "__init__", init)
    engine.steps_per_look = 4
    assert results(engine, requests()) == wanted
    assert replays >= 20  # more than half of the steps


@pytest.mark.parametrize("half, new, rounded", [(40, 150, (96, 160)), (2, 32, (32, 64))])
def test_the_plan_covers_what_is_held(half, new, rounded):
    """The tensors of a run of the worst kind: no prompt shared, every sample as long as allowed."""
    model = gpt(n_layer=4)
    engine = LocalEngine(model, slots=32, eos=EOS)
    asked = [
        Request((2 + i % 9, 3 + i // 9) * half, SamplingParams(max_tokens=new), 0, i)
        for i in range(32)
    ]
    network = engine.network()
    prompts, slots = Prompts(engine, network), Slots(engine, network, 32, engine.group)
    for request in asked:
        prompts.expect(request.prompt)
    prompts.prefill(asked, [])
    blocks = {place.block for place in prompts.ready.values()}
    slots.fill(asked, prompts, 0.0)
    while slots.cache.capacity < rounded[1] and not slots.done.all():
        slots.step()
    held = [slots.cache, slots.prefix, *blocks]
    held = sum(x.keys.nbytes + x.values.nbytes for x in held)
    reckoned = engine.plan(asked).needed(32)
    prompt, new = rounded
    parts = sampling_memory(
        model.config, slots=32, prompt=prompt, new=new, itemsize=4, triton=False
    )
    weights = 4 * sum(p.numel() for p in model.parameters())  # laid out for the CPU, with the head
    assert reckoned == sum(parts.values()) + 4 * model.config.vocab_size * model.config.n_embd
    assert parts["weights"] == weights
    assert held <= parts["KV cache"] < 2 * held


@pytest.mark.parametrize("slots, fit", [(128, 64), (5, 1)])
def test_fewer_slots_where_memory_is_short(slots, fit, monkeypatch):
    model, asked = gpt(), requests(70)
    engine = LocalEngine(model, slots=slots, eos=EOS)
    if fit < 8 and not engine.native:
        pytest.skip("PyTorch has 8 rows at least")
    wanted = results(engine, asked)
    free = engine.plan(asked).needed(fit)
    monkeypatch.setattr("ponder.inference.engine.available", lambda device: free)
    says = f"{slots} slots need .* GiB .* are free: {fit} slots are used"
    with pytest.warns(UserWarning, match=says):
        assert results(engine, asked) == wanted
    assert engine.slots == slots


def test_requests_that_cannot_fit_are_told_before_anything_is_sampled(monkeypatch):
    engine = LocalEngine(gpt(), slots=64, eos=EOS)
    small = Request((2,), SamplingParams(max_tokens=2), 0, 0)
    large = Request((2,) * 100, SamplingParams(max_tokens=150), 0, 0)
    free = engine.plan([small]).needed(64)
    monkeypatch.setattr("ponder.inference.engine.available", lambda device: free)
    asked = [small] * 128 + [large]
    samples = []
    with pytest.raises(ValueError, match="64 samples .* 150 tokens .* 100 needs .* fewer slots"):
        samples.extend(engine.generate(asked))
    monkeypatch.setattr("ponder.inference.engine.available", lambda device: 1000)
    with pytest.raises(ValueError, match="^drawing [18] samples at a time of up to 2 tok"):
        next(engine.generate([small]))


def test_memory_that_runs_out_is_a_sentence(monkeypatch):
    engine = LocalEngine(gpt(), slots=8, eos=EOS)

    def step(self):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Slots, "step", step)
    with pytest.raises(ValueError, match="memory ran out with 8 slots"):
        next(engine.generate(requests(1)))


def test_memory_is_known_here():
    free = available(torch.device("cpu"))
    assert free is not None and GIB / 64 < free < 2**50
    assert available(torch.device("meta")) is None


@pytest.fixture
def cgroups(tmp_path, monkeypatch):
    """Writes a control group's files, in a machine whose process is in the groups a/b."""

    def write(kinds: str, group: str, **values: str) -> None:
        monkeypatch.setattr(memory, "CGROUPS", tmp_path / "cgroups")
        monkeypatch.setattr(memory, "CGROUP_FILES", tmp_path)
        (tmp_path / "cgroups").write_text(f"3:cpu,{kinds}:/a/b\n7:name=systemd:/\n")
        if not kinds:
            (tmp_path / "cgroups").write_text("0::/a/b\n")
        folder = tmp_path / kinds / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in values.items():
            (folder / name.replace("__", ".")).write_text(text + "\n")

    return write


MIB = 2**20


def test_a_container_may_have_less_memory_than_its_machine(cgroups):
    cpu = torch.device("cpu")
    cgroups("", "a/b", memory__max="max", memory__current=f"{70 * MIB}")
    free = available(cpu)
    assert free is not None and free > 100 * MIB
    stat = f"anon 5\ninactive_file {10 * MIB}\nslab 3"  # what a file's cache holds can be taken
    cgroups("", "a", memory__max=f"{90 * MIB}", memory__current=f"{70 * MIB}", memory__stat=stat)
    assert available(cpu) == 30 * MIB
    cgroups("", "", memory__max=f"{50 * MIB}", memory__current=f"{70 * MIB}", memory__stat=stat)
    assert available(cpu) == 0


def test_a_container_of_the_first_version_of_control_groups_too(cgroups):
    cgroups(
        "memory",
        "a/b",
        memory__limit_in_bytes=f"{90 * MIB}",
        memory__usage_in_bytes=f"{70 * MIB}",
        memory__stat=f"inactive_file 0\ntotal_inactive_file {5 * MIB}",
    )
    assert available(torch.device("cpu")) == 25 * MIB


def test_a_limit_on_the_process_counts():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (taken + 900 * MIB, before[1]))
    try:
        free = available(torch.device("cpu"))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert free is not None and 700 * MIB < free <= 901 * MIB
