"""What the LLaMA recipe says about speed: operations per token, and the log of every step."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from tests.integration.recipes import import_recipe
from tests.integration.tiny import tiny_llama

recipe = import_recipe("llama_pretrain")
plan, speed = recipe["plan"], recipe["speed"]


@pytest.mark.parametrize("tied", [False, True])
def test_operations_per_token_are_those_that_are_counted(tied):
    model = tiny_llama(attn_implementation="eager", tie_word_embeddings=tied)
    batch, seq_len = 2, 24
    ids = torch.randint(model.config.vocab_size, (batch, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    counted = counter.get_total_flops() / (batch * seq_len)
    # The formula counts norms, which are no products of matrices: under 1 % of the weights.
    assert speed.flops_per_token(model, seq_len) == pytest.approx(counted, rel=0.01)
    assert speed.flops_per_token(model, 2 * seq_len) != pytest.approx(counted, rel=0.01)


def test_utilisation_is_a_share_of_the_peak():
    rates = speed.Rates(tokens_per_step=1000, flops_per_token=10**9, peak_tflops=8.0)
    assert rates.at(2.0) == {"tokens_per_second": 2000.0, "model_flops_utilisation": 0.25}
    unknown = speed.Rates(1000, 10**9, None)
    assert unknown.at(2.0) == {"tokens_per_second": 2000.0}


def test_a_log_has_the_speed_since_the_one_before():
    clock = SimpleNamespace(steps=3, step_seconds=4.0)  # two steps: the first is not timed
    log = speed.LogSpeed(clock, speed.Rates(100, 1, None))
    first, second, third, validation = {"loss": 1.0}, {"loss": 1.0}, {"loss": 1.0}, {"eval_loss": 1}
    log.on_log(None, None, None, logs=first)
    clock.steps, clock.step_seconds = 4, 4.5
    log.on_log(None, None, None, logs=validation)
    log.on_log(None, None, None, logs=second)
    log.on_log(None, None, None, logs=third)  # no step since
    assert first["tokens_per_second"] == 50
    assert second["tokens_per_second"] == 200
    assert third == {"loss": 1.0}
    assert validation == {"eval_loss": 1}


@pytest.mark.parametrize(
    ("name", "peak"), [("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 PCIe", 756), ("unknown", None)]
)
def test_peaks_are_found_by_the_devices_name(name, peak, monkeypatch):
    monkeypatch.setattr(speed.torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_tflops(torch.device("cuda")) == peak
    assert speed.peak_tflops(torch.device("cpu")) is None


def test_a_plan_needs_a_configuration_and_no_weights(capsys):
    with pytest.raises(SystemExit) as ended:
        plan.main(["configs/7b.yaml", "--ranks", "64"])
    assert not ended.value.code
    assert "224 polar factors" in capsys.readouterr().out
    with pytest.raises(plan.RecipeError, match="Say which model"):
        plan.main(["--ranks", "64"])
    for wrong in ("--rank", "64"), ("--ranks", "64", "--layout", "fsdp"):
        with pytest.raises(SystemExit) as ended:
            plan.main(["configs/7b.yaml", *wrong])
        assert ended.value.code == 2
