import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
import tyro

from ponder import cli
from ponder.models import GPT, GPTConfig
from ponder.models.flops import decode_flops, prefill_flops
from ponder.models.memory import GIB, layer_activations, parameter_count
from ponder.training import PRESETS, TrainConfig
from ponder.training.devices import DEVICES, Device, called, device
from ponder.training.hardware import PRECISION, peak_flops
from ponder.training.loop import model_config
from ponder.training.memory import check_fits
from ponder.training.plan import (
    CPU_CALLS,
    CPU_SCORE,
    MODELS,
    PlanConfig,
    _plan_sweep,
    layouts,
    plan,
    shape_of,
    step_seconds,
)
from ponder.training.plan_text import describe
from ponder.training.processes import shard_count

ONE = PlanConfig(device="h100", devices=1)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("124m", 124), ("1.3b", 1315), ("1.5b", 1558), ("7b", 6738), ("8b", 8030)],
)
def test_the_named_models_have_the_parameters_of_their_name(name, millions):
    # GPT-2 has learned positions besides; Llama 7B and 8B have 6738 and 8030 millions.
    assert parameter_count(MODELS[name]) / 1e6 == pytest.approx(millions, rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_the_plan_of_a_preset_is_of_its_own_steps(name):
    preset = PRESETS[name]()
    p = plan(ONE, name)
    assert p.steps == preset.steps and p.batch_tokens == preset.batch_size * preset.context
    longer = plan(replace(ONE, context=2 * preset.context), name)
    assert longer.steps == preset.steps and longer.batch_tokens == 2 * p.batch_tokens
    assert plan(replace(ONE, tokens=10 * p.batch_tokens), name).steps == 10


def test_a_named_size_sees_twenty_tokens_a_parameter():
    p = plan(ONE, "124m")
    assert p.batch_tokens == 524_288
    assert p.steps == round(20 * parameter_count(MODELS["124m"]) / 524_288)


def test_the_precision_is_what_the_device_has():
    found = {name: plan(replace(ONE, device=name), "124m").config.precision for name in DEVICES}
    assert found.pop("t4") == "fp16"
    assert set(found.values()) == {"bf16"}
    for bf16, precision in ((1.5, "fp32"), (4.0, "bf16")):
        cpu = replace(device("h100"), gpu=False, peak={"fp32": 1e11, "bf16": bf16 * 1e11})
        with patch("ponder.training.plan.device", return_value=cpu):
            sweep = PlanConfig(what="sweep", device="cpu")
            assert plan(sweep, "demo").config.precision == precision


def test_a_cpu_is_asked_for_its_precision_as_a_training_asks_it(monkeypatch):
    asked = []

    def pays(*shape):
        asked.append(shape)
        return len(asked) > 1

    cpu = replace(device("h100"), gpu=False, peak={"fp32": 1e11, "bf16": 4e11})
    monkeypatch.setattr("ponder.training.plan.device", lambda _: cpu)
    monkeypatch.setattr("ponder.training.hardware.bf16_pays_on_cpu", pays)
    plans = [plan(replace(ONE, device="cpu"), name) for name in ("tiny", "124m")]
    assert [p.config.precision for p in plans] == ["fp32", "bf16"]
    assert asked == [(32, 64, 8 * 64), (256, 1024, 32 * 1024)]  # a wide one would take minutes
    assert plans[1].batch_tokens == 32 * 1024  # no GPU's


def test_a_batch_that_nobody_named_is_rounded_to_what_the_devices_share():
    p = plan(replace(ONE, devices=3), "124m")
    assert p.batch_tokens == 171 * 3 * 1024 and p.batch_tokens - 524_288 < 3 * 1024
    p = plan(replace(ONE, devices=7), "gpt2")
    assert (p.batch_tokens, p.steps) == (74 * 7 * 1024, round(5000 * 512 / 518))


def test_gpt2_on_one_h100_is_a_matter_of_hours():
    p = plan(replace(ONE, tokens=2.5e9), "124m")
    assert p.layout.shards == 1 and p.devices == 1
    assert sum(p.memory.values()) < p.device.memory
    # Published speeds of this size on this chip are 378 to 575 thousand tokens a second.
    assert 300e3 < p.batch_tokens / p.step_seconds < 750e3
    assert p.steps == round(2.5e9 / 524_288)


def test_seven_billions_need_to_be_split_and_then_fit():
    with pytest.raises(ValueError, match="even with micro-batches of one sequence.*take more"):
        plan(ONE, "7b")
    p = plan(replace(ONE, devices=256, batch_tokens=4_194_304), "7b")
    assert p.layout.shards > 1
    assert sum(p.memory.values()) < p.device.memory
    assert 0.25 < p.mfu < 0.65
    text = describe(p, "7b")
    assert "accelerate launch --num_processes 256 --num_machines 32 --use_fsdp" in text
    assert "FSDP over" in text and "device-hours" in text
    assert "Muon's update, of whole matrices on every device, is" in text


def test_the_micro_batch_makes_the_step_whole():
    for devices in (1, 8, 64):
        config = replace(ONE, devices=devices)
        p = plan(config, "350m")
        spread = p.layout.rows * p.layout.accumulation * devices * 1024
        assert spread == p.batch_tokens == 524_288


def test_a_smaller_memory_takes_smaller_micro_batches():
    large, small = plan(ONE, "350m"), plan(replace(ONE, device="rtx4090"), "350m")
    assert small.layout.rows < large.layout.rows
    assert small.layout.accumulation > large.layout.accumulation
    assert sum(small.memory.values()) < 23.5 * GIB


def test_recomputing_takes_less_memory_and_a_third_more_products():
    config = replace(ONE, device="rtx4090")
    plain, again = plan(config, "350m"), plan(replace(config, recompute=True), "350m")
    assert again.layout.rows > plain.layout.rows
    assert again.seconds["matrix products"] == pytest.approx(
        4 / 3 * plain.seconds["matrix products"]
    )
    assert describe(again, "350m").endswith("(docs/mfu.md).")
    assert f"--accumulation {again.layout.accumulation} --recompute" in describe(again, "")


def test_a_plan_leaves_room_for_its_own_error():
    """The count agrees with measured peaks within 10 %: a memory filled to 99 % may not do."""
    for devices, model in ((256, "7b"), (8, "1.3b"), (1, "124m")):
        p = plan(replace(ONE, devices=devices, batch_tokens=4_194_304), model)
        assert sum(p.memory.values()) <= 0.9 * p.device.memory, model
    tight, context = plan(ONE, "1.5b"), 1024
    while sum(tight.memory.values()) <= 0.9 * tight.device.memory:  # until nothing else fits
        context += 512
        tight = plan(replace(ONE, context=context, batch_tokens=context), "1.5b")
    assert "of the memory, and the count may be 10 % off" in tight.notes[0]


def test_a_layout_can_be_asked_for():
    eight = replace(ONE, devices=8)
    assert plan(replace(eight, shards=1), "350m").layout.shards == 1
    assert plan(replace(eight, shards=8), "350m").layout.shards == 8
    four = plan(replace(eight, shards=4), "350m")
    assert "FSDP over 4, copied 2 times" in describe(four, "350m")
    with pytest.raises(ValueError, match="split over 1 device.*; take more shards, more devices"):
        plan(replace(eight, shards=1), "7b")


def test_fp32_is_planned_without_tf32():
    """Nothing in ponder asks for TF32, so a GPU's plain fp32 units compute: data sheets' FP32."""
    assert not torch.backends.cuda.matmul.allow_tf32
    fast, exact = plan(ONE, "124m"), plan(replace(ONE, precision="fp32"), "124m")
    assert exact.seconds["matrix products"] == pytest.approx(
        989 / 67 * fast.seconds["matrix products"]
    )


def test_muon_is_planned_in_fp32_where_bf16_has_no_units():
    """Emulated bf16 products, many times slower, are not what the optimizer takes."""
    h100 = device("h100")
    fp32 = h100.peak["fp32"]
    seconds = [
        step_seconds(
            shape_of("124m"),
            replace(h100, peak={"fp32": fp32, "bf16": bf16}),
            rows=8,
            precision="fp32",
        )["update"]
        for bf16 in (fp32 / 50, fp32, 2 * fp32)
    ]
    assert seconds[0] == seconds[1] > seconds[2]


def launched(p, model):
    """The words behind `ponder train` in the line that a plan prints."""
    return shlex.split(describe(p, model).split("ponder train ")[1].split("\n")[0])


@pytest.mark.parametrize("name", MODELS)
def test_a_named_model_s_command_line_has_its_shape(name):
    p = plan(PlanConfig(device="b200", devices=8, batch_tokens=8 * 4096, tokens=1e9), name)
    asked = tyro.cli(TrainConfig, args=launched(p, name))
    assert model_config(asked, int(asked.tokenizer.removeprefix("bpe:"))) == p.model
    assert asked.steps == p.steps and asked.batch_size * asked.context == p.batch_tokens
    with pytest.raises(ValueError, match="data is 'KIND:PLACE'; it must be task:NAME"):
        asked.check()


def test_a_folder_s_command_line_goes_on_from_it(tmp_path):
    folder = tmp_path / "my model"
    GPT(replace(MODELS["124m"], n_layer=1, vocab_size=100, context=64)).save_pretrained(folder)
    p = plan(replace(ONE, batch_tokens=64), str(folder))
    asked = tyro.cli(TrainConfig, args=launched(p, str(folder)))
    assert (asked.init, asked.context, asked.steps) == (str(folder), 64, p.steps)
    with pytest.raises(ValueError, match="context is 128; .*my model has one of 64"):
        plan(replace(ONE, context=128), str(folder))


def test_the_command_line_of_a_plan_is_the_plan(capsys):
    """What `ponder plan` says to launch parses, and its batch is the planned one."""
    config = replace(ONE, devices=8, optimizer="adamw")
    p = plan(config, "gpt2")
    words = launched(p, "gpt2")
    assert words[0] == "gpt2"
    asked = tyro.cli(TrainConfig, default=PRESETS["gpt2"](), args=words[1:])
    asked.check()
    assert asked.steps == p.steps
    assert asked.batch_size * asked.context == p.batch_tokens == 524_288
    assert asked.batch_size == 8 * p.layout.rows * asked.accumulation
    assert (asked.optimizer, asked.precision) == ("adamw", "bf16")


def test_a_checkpoint_of_ones_own_is_planned(tmp_path):
    shape = replace(MODELS["124m"], n_layer=3, activation="silu", gated=True)
    GPT(replace(shape, vocab_size=100, context=64)).save_pretrained(tmp_path)
    p = plan(replace(ONE, batch_tokens=64), str(tmp_path))
    assert (p.model.n_layer, p.model.vocab_size, p.model.context) == (3, 100, 64)


def test_short_steps_are_said_to_wait_for_launches():
    assert any("launched" in note for note in plan(replace(ONE, batch_tokens=2048), "tiny").notes)
    assert not plan(ONE, "124m").notes


def test_long_prompts_are_paid_for():
    """A prompt is read once for all its samples: two FLOPs a weight and token, and attention."""
    config = PlanConfig(what="sweep", samples=4, prompt_tokens=900, new_tokens=100)
    shape, h100 = MODELS["124m"], device("h100")
    read = 500 * 900 * (2 * shape.layer_weights + 2 * 12 * 768 * 901)
    seconds = plan(config, "124m").seconds
    rate = h100.peak["bf16"] * h100.matrix_efficiency
    assert seconds["prompts"] == pytest.approx(read / rate, rel=0.01)
    assert plan(replace(config, samples=8), "124m").seconds["prompts"] == pytest.approx(
        seconds["prompts"]
    )


def test_a_cpu_reads_and_computes_in_turn_and_a_gpu_at_once():
    config = PlanConfig(what="sweep", precision="fp32", slots=64, prompt_tokens=256, new_tokens=512)

    def decoding(gpu, peak, bandwidth):
        hardware = Device("own", {"fp32": peak}, bandwidth, 2**36, 1e9, gpu=gpu)
        return _plan_sweep(config, MODELS["124m"], hardware).seconds["decoding"]

    for gpu in (False, True):
        base = decoding(gpu, 1e12, 1e11)
        faster = decoding(gpu, 2e12, 1e11), decoding(gpu, 1e12, 2e11)
        assert sum(seconds < base for seconds in faster) == (1 if gpu else 2)


def test_a_cpus_step_pays_for_each_score():
    cpu = Device("own", {"fp32": 1e12}, 1e11, 2**36, 1e9, gpu=False)
    short, long = (
        step_seconds(replace(MODELS["124m"], context=n), cpu, rows=2048 // n, precision="fp32")
        for n in (256, 1024)
    )
    scores = 2048 * 12 * 12 * (1024 - 256) / 2  # tokens, layers, heads, more keys on average
    moved = (long["memory"] - short["memory"]) * 1e11 * cpu.stream_efficiency
    assert moved == pytest.approx(CPU_SCORE * scores)
    assert short["calls"] == long["calls"] == 12 * CPU_CALLS
    split = step_seconds(MODELS["124m"], cpu, rows=1, accumulation=8, precision="fp32")
    assert split["calls"] == 8 * long["calls"] and "calls" not in step_seconds(
        MODELS["124m"], device("h100"), rows=1
    )


def test_time_grows_with_what_it_is_made_of():
    shape, h100 = MODELS["124m"], device("h100")
    one = step_seconds(shape, h100, rows=8)
    two = step_seconds(shape, h100, rows=16)
    assert two["matrix products"] == pytest.approx(2 * one["matrix products"])
    assert two["update"] == one["update"]
    slow = replace(h100, bandwidth=h100.bandwidth / 2)
    assert step_seconds(shape, slow, rows=8)["memory"] == pytest.approx(2 * one["memory"])
    # Over more devices the same share of work, and then the gradients' way.
    spread = step_seconds(shape, replace(h100, network=1e9), rows=8, devices=64)
    assert spread["communication"] > 0.5 and spread["update"] == one["update"]


# A machine and a model of round numbers, and what comes of them by hand.
TOY = Device(
    "toy", {"bf16": 1000.0, "fp32": 100.0}, bandwidth=10.0, memory=1e9, link=5.0, per_node=2,
    network=1.0, matrix_efficiency=0.5, stream_efficiency=0.5,
)  # fmt: skip
SHAPE = GPTConfig(
    vocab_size=100, context=8, n_layer=2, n_head=2, n_kv_head=1, head_dim=16, n_embd=32, n_inner=64,
    gated=False, activation="relu2", qk_norm=False,
)  # fmt: skip
MATRICES = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 2 * 64 * 32)
WEIGHTS = MATRICES + 100 * 32 + 5 * 32  # the embedding, which is the head, and five norms
FLOPS = 2 * (MATRICES + 100 * 32) + 4 * 2 * 2 * 16 * 4.5  # of a token: it sees 4.5 on average
ROWS, ACCUMULATION = 3, 2
TOKENS = ROWS * ACCUMULATION * 8


def toy_step(hardware=TOY, **options):
    return step_seconds(SHAPE, hardware, rows=ROWS, accumulation=ACCUMULATION, **options)


def test_a_step_s_products_and_memory_by_hand():
    kept = 2 * layer_activations(SHAPE, "bf16", triton=True)  # a token's, of two layers
    found = toy_step(optimizer="adamw")
    assert found["matrix products"] == pytest.approx(3 * FLOPS * TOKENS / 500)
    assert found["memory"] == pytest.approx(4 * kept * TOKENS / 5)
    assert set(found) == {"matrix products", "memory", "update"}
    again = toy_step(optimizer="adamw", recompute=True)
    assert again["matrix products"] == pytest.approx(4 * FLOPS * TOKENS / 500)


def test_a_cpu_s_step_by_hand():
    cpu = replace(TOY, gpu=False)
    for precision, passes in (("fp32", 14), ("bf16", 17.5)):
        kept = 2 * layer_activations(SHAPE, precision, triton=False) + 4 * 100  # and the logits
        scores = 35 * 2 * 2 * 4.5  # bytes, of two heads in two layers
        found = toy_step(cpu, precision=precision)
        assert found["memory"] == pytest.approx((passes * kept + scores) * TOKENS / 5)
        assert found["calls"] == pytest.approx(2.5e-3 * 2 * ACCUMULATION)


def test_a_step_s_update_by_hand():
    # Weights, gradients and states read and written; the gradients' norm; a cast a micro-batch.
    casts = 6 * MATRICES * ACCUMULATION
    for optimizer, a_weight in (("adamw", 28), ("adam", 28), ("momentum", 20), ("sgd", 12)):
        expected = ((a_weight + 8) * WEIGHTS + casts) / 5
        assert toy_step(optimizer=optimizer)["update"] == pytest.approx(expected)
        split = toy_step(optimizer=optimizer, shards=4, devices=4)["update"]
        assert split == pytest.approx(expected / 4)
    # Five iterations for each matrix: n² m twice, of two multiply-adds each, and m³ once.
    square = 6 * 32**3
    narrow, tall = 4 * 32 * 16**2 + 2 * 16**3, 4 * 64 * 32**2 + 2 * 32**3
    products = 5 * 2 * 2 * (square + narrow + tall)
    states = (36 * (WEIGHTS - MATRICES) + 28 * MATRICES + casts) / 5
    assert toy_step()["update"] == pytest.approx(states + products / (1000 * 0.5 * 0.8))


@pytest.mark.parametrize(
    ("devices", "shards", "sent"),
    [
        (2, 1, 8 * WEIGHTS / 2 / 5),  # each gradient to the others and back, by the link
        (4, 1, 8 * WEIGHTS * 3 / 4 / 1),  # by the network
        (2, 2, (4 * ACCUMULATION + 4) * WEIGHTS / 2 / 5),  # weights twice, gradients once
        (4, 4, (4 * ACCUMULATION + 4) * WEIGHTS * 3 / 4 / 1),
        (4, 2, (4 * ACCUMULATION + 4) * WEIGHTS / 2 / 5 + 8 * WEIGHTS / 2 / 1),  # split, and copied
    ],
)
def test_what_devices_send_each_other_by_hand(devices, shards, sent):
    """But for what 0.7 of the backward pass, two thirds of the rest, hides."""
    quick = replace(TOY, peak={"bf16": 1e12, "fp32": 1e12}, bandwidth=1e12)
    for hardware, hides in ((quick, False), (TOY, None), (replace(TOY, bandwidth=0.1), True)):
        found = toy_step(hardware, devices=devices, shards=shards)
        hidden = 0.7 * 2 / 3 * (found["matrix products"] + found["memory"])
        assert hides is None or (hidden > sent) == hides
        assert found["communication"] == pytest.approx(max(0.0, sent - hidden), rel=1e-6)


def test_a_sweep_s_seconds_by_hand():
    """10 problems, 4 draws at 2 budgets, on 3 devices: 27 samples each, 10 at a time."""
    config = PlanConfig(
        what="sweep", problems=10, samples=3, budgets=1, devices=3, slots=10, prompt_tokens=4,
        new_tokens=4, precision="bf16",
    )  # fmt: skip
    steps = 2.7 * 4
    # Half of the new tokens of each, and a prompt for each 8 of them.
    cache = 2 * 2 * 16 * 2 * (10 * 2 + 4 * 10 / 8)
    reads = (2 * WEIGHTS + cache) / 5
    products = 10 * decode_flops(SHAPE, 4, 4) / 4
    quick = replace(TOY, peak={"bf16": 1e12, "fp32": 1.0})
    slow = replace(TOY, bandwidth=1e12)
    assert _plan_sweep(config, SHAPE, quick).seconds["decoding"] == pytest.approx(steps * reads)
    found = _plan_sweep(config, SHAPE, slow).seconds
    assert found["decoding"] == pytest.approx(steps * products / 500)
    assert found["prompts"] == pytest.approx(27 / 8 * prefill_flops(SHAPE, 4) / 500)
    on_a_cpu = _plan_sweep(config, SHAPE, replace(slow, gpu=False)).seconds
    for part, seconds in on_a_cpu.items():
        assert seconds == pytest.approx(found[part] / 0.75)
    with pytest.raises(ValueError, match="decoding 1 samples of 4 . 4 tokens"):
        _plan_sweep(replace(config, slots=0), SHAPE, replace(TOY, memory=1.0))


def test_the_largest_micro_batch_comes_first():
    config = replace(ONE, batch_tokens=12 * 8)
    assert [layout.rows for layout in layouts(config, SHAPE, TOY)] == [12, 6, 4, 3, 2, 1]


def test_a_plan_is_of_one_step_at_least_and_says_of_muon_alone_what_muon_costs():
    p = plan(replace(ONE, tokens=1.0, optimizer="adamw", batch_tokens=1024), "124m")
    assert p.steps == 1 and p.seconds["update"] > 0.25 * p.step_seconds
    assert not any("Muon" in note for note in p.notes)
    assert any("Muon" in note for note in plan(replace(ONE, batch_tokens=1024), "124m").notes)
    assert shape_of("gpt2").vocab_size == 50_257


def test_a_sweep_reads_weights_and_caches():
    config = PlanConfig(what="sweep", new_tokens=512, samples=16)
    once, twice = plan(config, "124m"), plan(replace(config, samples=32), "124m")
    assert twice.total_seconds == pytest.approx(2 * once.total_seconds, rel=0.05)
    spread = plan(replace(config, devices=4), "124m")
    assert spread.total_seconds == pytest.approx(once.total_seconds / 4, rel=0.05)
    with pytest.raises(ValueError, match="decoding 4096 samples of 256 . 512 tokens.*fewer slots"):
        plan(replace(config, slots=4096, problems=1000), "7b")


def test_a_sweep_draws_at_every_budget_and_greedily_besides():
    config = PlanConfig(what="sweep", problems=10, samples=4, budgets=2, slots=5)
    p = plan(config, "124m")
    assert p.notes == [
        "150 samples of up to 512 tokens, 5 at once: 10 problems × (4 samples + a greedy one) × "
        "(2 budgets + unlimited)"
    ]
    alone = plan(replace(config, budgets=0), "124m")
    assert p.seconds["decoding"] == pytest.approx(3 * alone.seconds["decoding"], rel=0.05)
    assert p.seconds["prompts"] == pytest.approx(alone.seconds["prompts"])  # shared by all budgets


def test_a_sweep_s_lengths_and_slots_are_what_the_model_and_the_device_take():
    demo = plan(PlanConfig(what="sweep"), "demo").config
    assert (demo.prompt_tokens, demo.new_tokens) == (21, 43)
    assert plan(PlanConfig(what="sweep", new_tokens=50), "demo").config.prompt_tokens == 14
    named = plan(PlanConfig(what="sweep"), "124m")
    assert (named.config.prompt_tokens, named.config.new_tokens) == (256, 512)
    assert "512 at once" in named.notes[0]
    assert "64 at once" in plan(PlanConfig(what="sweep"), "7b").notes[0]


def test_training_refuses_what_cannot_fit_and_says_what_would():
    shape = MODELS["124m"]
    step = dict(precision="bf16", optimizer="muon", accumulation=2)
    check_fits(shape, 79 * GIB, rows=8, **step)
    with pytest.raises(ValueError, match="a training step needs .*; --accumulation 16 would fit"):
        check_fits(shape, 6 * GIB, rows=64, **step)
    with pytest.raises(ValueError, match="there are 6.00; --recompute would fit"):
        check_fits(replace(shape, context=16_384), 6 * GIB, rows=1, **step)
    with pytest.raises(ValueError, match="take a smaller model"):
        check_fits(MODELS["7b"], 24 * GIB, rows=2, **step)


@pytest.mark.parametrize(
    "driver, key",
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA A10G", None),  # no A10
        ("NVIDIA L40", None),  # no L4
    ],
)
def test_a_driver_s_name_finds_the_data_sheet_and_its_peaks(driver, key, monkeypatch):
    if key is None:
        assert called(driver) is None
        return
    assert device(driver) is DEVICES[key]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: driver)
    for precision, peak in DEVICES[key].peak.items():
        (dtype,) = (d for d, name in PRECISION.items() if name == precision)
        peak_flops.cache_clear()
        assert peak_flops(torch.device("cuda", 0), dtype) == peak
    peak_flops.cache_clear()


def test_this_machine_is_measured():
    cpu = device("cpu")
    assert cpu.memory > GIB and 1e8 < cpu.bandwidth < 1e13
    for load in (1.0, 3.0):
        with patch("ponder.training.plan.load", return_value=load):
            p = plan(PlanConfig(device="cpu"), "shakespeare")
        assert p.total_seconds > 0
        assert any("keep this machine busy" in note for note in p.notes) == (load > 2)


@pytest.mark.parametrize(
    ("change", "model", "message"),
    [
        (dict(device="h9000"), "124m", "no device is named 'h9000'; known are b200, h200"),
        ({}, "9t", "no model is named '9t'; there are 124m"),
        (dict(device="t4", precision="bf16"), "124m", "precision is bf16; T4 has fp16, fp32"),
        (dict(batch_tokens=1000), "124m", "batch_tokens is 1000; 1 devices share whole sequences"),
        (dict(devices=7, batch_tokens=524_288), "124m", "in multiples of 7168"),
        (dict(what="sweep", budgets=-1), "124m", "budgets is -1; it must be at least 0"),
        (dict(devices=0), "124m", "devices is 0"),
        (
            dict(devices=100),
            "124m",
            "devices is 100; a machine has 8 of them, so it must be at most",
        ),
        (dict(devices=8, shards=3), "124m", "shards is 3; it must divide devices, 8"),
        (dict(shards=-1), "124m", "shards is -1"),
        (dict(what="sweep", new_tokens=2048), "124m", "new_tokens is 2048; the context of 1024"),
        (dict(tokens=-1.0), "124m", "tokens is -1"),
        (dict(tokens=float("inf")), "124m", "tokens is inf; it must be 0 or more, and finite"),
    ],
)
def test_what_cannot_be_planned_is_named(change, model, message):
    with pytest.raises(ValueError, match=message):
        plan(replace(ONE, **change), model)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("plan 124m --device abacus", "no device is named 'abacus'"),
        ("plan 7b --devices 1", "even with micro-batches of one sequence"),
        ("scale huge", "no ladder is named 'huge'; there are tiny, cpu, gpu"),
        ("scale tiny --sizes 1x32 2x32", "sizes are 2; a fit needs at least 3"),
        ("scale tiny --data text:nowhere.txt", "there is no text file nowhere.txt"),
    ],
)
def test_the_commands_answer_bad_input_in_one_sentence(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert cli.run(words.split()) == 2
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("ponder: ") and message in error


def test_the_command_prints_the_plan(capsys):
    assert cli.run("plan 124m --device a100 --devices 8 --tokens 1e9".split()) == 0
    out = capsys.readouterr().out
    assert "124" in out and "8 × A100" in out and "DDP over 8" in out
    assert "accelerate launch --num_processes 8 --num_machines 1" in out


def test_every_device_has_a_peak_a_bandwidth_and_memory():
    for name, d in DEVICES.items():
        assert {"fp16", "fp32"} <= set(d.peak) and d.peak["fp16"] > d.peak["fp32"], name
        assert 10 < d.memory / GIB < 300 and 1e11 < d.bandwidth < 1e13, name


@pytest.mark.parametrize(
    ("launched", "shards"),
    [
        ({}, 1),
        ({"ACCELERATE_USE_FSDP": "true"}, 8),
        ({"ACCELERATE_USE_FSDP": "true", "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, 4),
    ],
)
def test_a_copied_shard_is_not_taken_for_one_over_all(launched, shards, monkeypatch):
    """What `train` refuses by: of two copies of four shards each holds a fourth, not an eighth."""
    for name, value in launched.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("PARALLELISM_CONFIG_DP_SHARD_SIZE", "4")
    assert shard_count(TrainConfig(), 8) == shards


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of the GNU C library")
def test_what_a_step_frees_the_next_one_has_without_the_system():
    """Pages that the system hands out anew, each cleared, in ten rounds of 80 MiB."""
    code = """
import psutil, resource, torch
from ponder.training.memory import keep_memory
def resident():
    return psutil.Process().memory_info().rss
def faults(rounds):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(rounds):
        tensors = [torch.ones(10 * 2**20) for _ in range(2)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults(3), print(faults(10))
with keep_memory():
    faults(3), print(faults(10))
    kept = resident()
print(kept - resident())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    without, kept, given_back = map(int, run.stdout.split())
    assert 10 * kept < without
    assert given_back > 40 * 2**20  # bytes, at the end
