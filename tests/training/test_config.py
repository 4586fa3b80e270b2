import pytest
import tyro

from ponder.training import PRESETS, TrainConfig, preset


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid(name):
    config = tyro.cli(TrainConfig, default=preset(name), args=[])
    config.check()
    assert config == preset(name)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="no preset is named 'huge'; there are tiny, demo"):
        preset("huge")


def test_every_fault_is_named_at_once():
    config = TrainConfig(data="poem", steps=0, lr=-1, accumulation=3, decay=2, keep=0, ema=1)
    with pytest.raises(ValueError) as error:
        config.check()
    words = ["data is 'poem'", "steps is 0", "lr is -1", "accumulation is 3", "decay is 2"]
    for word in (*words, "keep is 0", "ema is 1"):
        assert word in str(error.value)


def test_rate_warms_up_stays_and_decays_to_zero():
    config = TrainConfig(steps=100, warmup=9, decay=0.5)
    rates = [config.rate(step) for step in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1.0
    assert set(rates[9:51]) == {1.0}
    assert rates[75] == pytest.approx(0.5) and rates[100] == 0
    assert all(a >= b for a, b in zip(rates[50:], rates[51:], strict=False))


@pytest.mark.parametrize(("schedule", "half"), [("linear", 0.55), ("cosine", 0.55)])
def test_other_schedules_fall_from_the_warm_up_on(schedule, half):
    config = TrainConfig(schedule=schedule, steps=109, warmup=9, floor=0.1)
    rates = [config.rate(step) for step in range(110)]
    assert rates[0] == 0.1 and rates[8] == 0.9 and rates[9] == 1.0
    assert rates[59] == pytest.approx(half) and rates[109] == pytest.approx(0.1)
    assert all(a > b for a, b in zip(rates[9:109], rates[10:], strict=True))
    quarter = 0.1 + 0.9 * (0.75 if schedule == "linear" else (1 + 0.5**0.5) / 2)
    assert rates[34] == pytest.approx(quarter)


def test_a_run_is_itself_whatever_it_runs_on():
    config = TrainConfig()
    same = TrainConfig(shard=True, recompute=True, keep=5, trackers=("wandb",), resume=True)
    assert config.identity() == same.identity()
    assert config.identity() != TrainConfig(lr=1.0).identity()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(data="jsonl:"), "data is 'jsonl:'; it must be task:NAME, text:FILE, jsonl:FILES"),
        (dict(data=()), "data is empty"),
        (dict(data=("task:permute", "poem")), "data is 'poem'"),
        (dict(weights=(1, 2)), "weights is [1, 2]; it must have a number for each of the 1 in"),
        (dict(weights=(0.0,)), "weights is [0.0]; each must be above 0"),
        (dict(weights=(float("nan"),)), "weights is [nan]; each must be above 0"),
        (dict(data_tokens=-1), "data_tokens is -1; it must be at least 0"),
        (dict(weight_decay=float("nan")), "weight_decay is nan; it must be at least 0"),
        (dict(clip=float("inf")), "clip is inf; it must be at least 0"),
        (dict(lr=float("inf")), "lr is inf; it must be above 0"),
        (dict(optimizer="lion"), "optimizer is 'lion'; it must be one of muon, adamw, adam, mom"),
        (dict(schedule="cosin"), "schedule is 'cosin'; it must be one of wsd, cosine, linear"),
        (dict(verifier="prm"), "verifier is 'prm'; it must be one of outcome, value, process"),
        (dict(trackers=("mlflow",)), "trackers is 'mlflow'; it must be one of tensorboard, wandb"),
    ],
)
def test_fields_that_cannot_be_are_named(fields, message):
    with pytest.raises(ValueError) as error:
        TrainConfig(**fields).check()
    assert message in str(error.value)


def test_data_are_one_name_or_several_on_the_command_line():
    def parsed(words: str) -> TrainConfig:
        return tyro.cli(TrainConfig, args=words.split())

    assert parsed("--data jsonl:a.jsonl --steps 3").sources == ("jsonl:a.jsonl",)
    config = parsed("--data jsonl:a.jsonl task:permute --weights 0.7 0.3 --steps 3")
    assert config.sources == ("jsonl:a.jsonl", "task:permute") and config.weights == (0.7, 0.3)
    config.check()
