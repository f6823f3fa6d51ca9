"""The monitor in a stock Trainer: right numbers, in every log, and a run that is as without it."""

import json
import logging

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers.integrations import integration_utils

import hf_muon.auto  # noqa: F401
from hf_muon import Muon, SpectralMonitor
from hf_muon.diagnostics.history import read_spectra
from hf_muon.diagnostics.sampling import Sampler
from hf_muon.integrations.callback import MuonCallback
from hf_muon.integrations.report import find_muon
from tests.integration.recorder import Recorder, assert_close
from tests.integration.tiny import (
    arguments,
    largest_difference,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)
from tests.reference.monitor import sample as expected_of

ORDERS = ("pre_polar", "post_polar", "polar_only")
LAYERS = r"layers\.1\.(mlp|self_attn\.k)"
# A few words only, so that some directions stand above the noise.
DATA = [{k: row % 24 for k, row in one.items()} for one in tiny_data()]


def watched(folder, *callbacks, **overrides):
    settings = {"max_steps": 9, "data": DATA, **overrides}
    return trained(folder, trainer_settings={"callbacks": list(callbacks)}, **settings)


def monitored(folder, *callbacks, every=3, layers=LAYERS, **overrides):
    """A trained Trainer and the samples in the file."""
    monitor = SpectralMonitor(layers, every=every)
    trainer = watched(folder, *callbacks, monitor, **overrides)
    return trainer, read_spectra(folder)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_values_equal_a_recomputation_from_recorded_gradients(tmp_path, order):
    recorder = Recorder()
    settings = f"order={order},polar_dtype=float32"
    _, samples = monitored(tmp_path, recorder, optim_args=settings, max_steps=30, every=10)
    assert {sample["step"] for sample in samples} == {10, 20, 30}
    names = {sample["layer"] for sample in samples}
    assert len(names) == 4
    assert any(sample["visible_rank"] > 1 for sample in samples)
    for sample in samples:
        step = sample["step"]
        history = recorder.history(sample["layer"], order=order)
        expected = expected_of(history, step, 4, before=step - 10 if step > 10 else None)
        # float32 against float64, and weights of 0.1 whose rounding is 1e-4 of an update.
        assert_close(sample, expected, 1e-3)
        with pytest.raises(AssertionError):  # a step that is not the one asked for
            assert_close(sample, expected_of(history, step - 1, 4), 1e-3)


def test_the_momentum_that_was_chosen_is_logged(tmp_path):
    settings = {"optim_args": "momentum=auto", "max_steps": 4, "every": 2}
    trainer, samples = monitored(tmp_path, **settings)
    assert {sample["momentum"] for sample in samples} == {0.95}  # nothing else is known so early
    logged = [record for record in trainer.state.log_history if "learning_rate" in record]
    assert {record["momentum/median"] for record in logged} == {0.95}
    momenta = find_muon(trainer.optimizer).momenta()
    assert "model.layers.1.mlp.up_proj.weight" in momenta


def test_a_stack_of_matrices_and_fused_projections_are_watched_one_by_one(tmp_path):
    weight = torch.nn.Parameter(torch.randn(3, 16, 24))
    optimizer = Muon([{"params": [("stack", weight)], "matrices": [_stacked(3, 16, 24)]}], lr=1e-2)
    sampler = Sampler(optimizer, ["stack[1]"], count=2)
    for step in (1, 2):
        weight.grad = torch.randn(3, 16, 24)
        sampler.ask(step)
        optimizer.step()
    values = sampler.answer()
    assert list(values) == ["stack[1]"]
    sigma = torch.linalg.svdvals(weight.grad[1])
    assert values["stack[1]"]["gradient_sigma_1"] == pytest.approx(sigma[0].item(), rel=1e-5)


def _stacked(count, m, n):
    return tuple((i * m * n, (m, n), (n, 1), 0) for i in range(count))


def test_pairs_that_move_together_have_no_factor_and_the_log_says_so(tmp_path, caplog):
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules="all-linear"))
    _, samples = monitored(tmp_path, layers=None, model=model, optim_args="lora_update=product")
    assert len(samples) == 3 * 8
    assert not any("orthogonality_error" in sample for sample in samples)
    assert caplog.text.count("lora_update='product' applies no polar factor") == 1


# --- the run is the same --------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_weights_and_state_are_bitwise_those_of_a_run_without_it(tmp_path, order):
    def run(*callbacks):
        # Dropout, so that a random number that is drawn elsewhere would change the weights.
        model = tiny_llama(attention_dropout=0.1)
        trainer = watched(tmp_path, *callbacks, model=model, optim_args=f"order={order}")
        return weights(trainer), find_muon(trainer.optimizer).state_dict()["state"]

    class Draws(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            torch.rand(1)

    plain, state = run()
    same, same_state = run(SpectralMonitor(every=1))
    assert largest_difference(plain, same) == 0
    assert state.keys() == same_state.keys()
    for index in state:
        assert state[index].keys() == same_state[index].keys()
        assert all(torch.equal(state[index][k], same_state[index][k]) for k in state[index])
    assert largest_difference(plain, run(Draws())[0]) > 0


def test_nothing_is_left_on_the_optimizer(tmp_path):
    trainer, _ = monitored(tmp_path)
    optimizer = find_muon(trainer.optimizer)
    # The Trainer's callback leaves the one that looks for parameters that are not trained.
    left = [hook.__module__ for hook in optimizer._optimizer_step_pre_hooks.values()]
    assert left == ["hf_muon.integrations.untrained"]
    assert not optimizer._optimizer_step_post_hooks


# --- where the numbers go -------------------------------------------------------------------------


def test_tensorboard_has_every_series(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    _, samples = monitored(tmp_path, report_to=["tensorboard"], logging_steps=4)
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    for sample in samples:
        for name in sample.keys() - {"step", "layer"}:
            series = events.Scalars(f"train/muon/{sample['layer']}/{name}")
            values = {event.step: event.value for event in series}
            assert values[sample["step"]] == pytest.approx(sample[name], rel=1e-6)


@pytest.mark.parametrize("reporter", ["wandb", "trackio"])
def test_reporters_get_the_values_and_the_console_does_not(tmp_path, monkeypatch, capsys, reporter):
    records = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            records.append((state.global_step, dict(logs)))

    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, reporter, Reporter)
    trainer, samples = monitored(tmp_path, report_to=[reporter], logging_steps=100)
    given = {step: logs for step, logs in records if "loss" in logs}
    assert set(given) == {3, 6, 9}  # a record for every sample, though logging is rarer
    for sample in samples:
        key = f"muon/{sample['layer']}/visible_rank"
        assert given[sample["step"]][key] == sample["visible_rank"]
        assert isinstance(given[sample["step"]][key], float)
    assert any(key in record for record in trainer.state.log_history)
    printed = capsys.readouterr().out
    assert "'loss'" in printed
    assert "visible_rank" not in printed


def test_a_trainer_without_our_callback_is_told_so(tmp_path, caplog):
    trainer = trainer_of(tmp_path, max_steps=4, trainer_settings={"callbacks": []})
    trainer.pop_callback(MuonCallback)
    trainer.add_callback(SpectralMonitor(every=2))
    trainer.train()
    assert "no reporter" in caplog.text
    assert any("muon/" in key for record in trainer.state.log_history for key in record)


def test_lines_are_json_with_flat_numbers(tmp_path):
    monitored(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "spectra.jsonl").read_text().splitlines()]
    begin, *samples = lines
    assert begin["begin"] == 0
    assert begin["every"] == 3
    assert begin["layers"]["model.layers.1.self_attn.k_proj.weight"] == [16, 32]
    assert len(samples) == 3 * 4
    for sample in samples:
        assert all(type(sample[name]) is float for name in sample.keys() - {"step", "layer"})


# --- resuming -------------------------------------------------------------------------------------


def test_a_resumed_run_goes_on_in_the_same_file(tmp_path):
    whole = tmp_path / "whole"
    _, uninterrupted = monitored(whole, save_strategy="steps", save_steps=4)
    again = tmp_path / "again"
    monitored(again, save_strategy="steps", save_steps=4)
    text = (again / "spectra.jsonl").read_text()
    # The run had gone on after the checkpoint, and was cut while it wrote.
    (again / "spectra.jsonl").write_text(text[:-30])
    model = tiny_llama(seed=1)
    trainer = Trainer(
        model=model,
        args=arguments(again, max_steps=9),
        train_dataset=DATA,
        callbacks=[SpectralMonitor(LAYERS, every=3)],
    )
    trainer.train(resume_from_checkpoint=str(again / "checkpoint-4"))
    lines = (again / "spectra.jsonl").read_text()
    assert lines.startswith(text[:-30])  # nothing was overwritten
    samples = read_spectra(again)
    assert [(s["step"], s["layer"]) for s in samples] == [
        (s["step"], s["layer"]) for s in uninterrupted
    ]
    for sample, expected in zip(samples, uninterrupted, strict=True):
        # The first sample after the resume has none before it to be compared with.
        compared = expected.keys() - ({"sin_left", "sin_right"} if sample["step"] == 6 else set())
        assert {name: sample[name] for name in compared} == {n: expected[n] for n in compared}


def test_a_new_run_in_an_old_folder_is_read_alone(tmp_path):
    monitored(tmp_path)
    _, samples = monitored(tmp_path, every=4)
    assert {sample["step"] for sample in samples} == {4, 8}


def test_an_order_without_momentum_says_why_it_waits_after_a_resume(tmp_path, caplog):
    settings = {"optim_args": "order=post_polar,momentum=0.5", "save_steps": 2}
    monitored(tmp_path, save_strategy="steps", max_steps=4, every=2, **settings)
    args = arguments(tmp_path, max_steps=12, **settings)
    trainer = Trainer(
        model=tiny_llama(),
        args=args,
        train_dataset=DATA,
        callbacks=[SpectralMonitor(LAYERS, every=2)],
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "must run in" in caplog.text
    # 0.5^5 < 0.05: five gradients after step 2.
    assert {s["step"] for s in read_spectra(tmp_path)} == {2, 8, 10, 12}


# --- what is said ---------------------------------------------------------------------------------


def test_advice_is_logged_and_not_acted_on(tmp_path, caplog):
    caplog.set_level(logging.INFO, "hf_muon")
    trainer, samples = monitored(tmp_path, max_steps=30, every=10, optim_args="momentum=0.8")
    advised = [sample for sample in samples if "suggested_momentum" in sample]
    assert advised
    assert "they ask for momentum=" in caplog.text
    assert find_muon(trainer.optimizer).param_groups[0]["momentum"] == 0.8


def test_a_run_that_diverges_is_warned_of_with_the_reason(tmp_path, caplog):
    monitor = SpectralMonitor(every=5)
    watched(tmp_path, monitor, max_steps=20, learning_rate=20.0, max_grad_norm=0.0)
    assert monitor.warnings
    assert "the loss rose" in caplog.text
    assert any("warning" in line for line in (tmp_path / "spectra.jsonl").open())
    healthy = SpectralMonitor(every=5)
    watched(tmp_path, healthy, max_steps=20)
    assert healthy.warnings == []


def test_another_optimizer_is_named_and_nothing_is_sampled(tmp_path, caplog):
    monitor = SpectralMonitor(every=1)
    trained(tmp_path, optim="adamw_torch", trainer_settings={"callbacks": [monitor]})
    assert "another optimizer trains" in caplog.text
    assert not (tmp_path / "spectra.jsonl").exists()


def test_patterns_that_match_nothing_are_an_error_that_names_near_ones(tmp_path):
    with pytest.raises(ValueError, match=r"'q_porj'.*Did you mean 'q_proj'"):
        watched(tmp_path, SpectralMonitor("q_porj"))


@pytest.mark.parametrize("bad", [{"every": 0}, {"every": 2.5}, {"singular_values": 0}])
def test_numbers_out_of_range_are_refused_at_construction(bad):
    with pytest.raises(ValueError, match=rf"{next(iter(bad))}=.*≥ 1"):
        SpectralMonitor(**bad)


def test_by_default_eight_matrices_are_spread_over_the_model(tmp_path):
    _, samples = monitored(tmp_path, layers=None, max_steps=3)
    names = [sample["layer"] for sample in samples]
    assert len(names) == 8
    assert {name.split(".")[2] for name in names} == {"0", "1"}
