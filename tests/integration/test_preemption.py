"""A run that a signal stops saves, and what goes on from there is the uninterrupted run."""

import json
import shutil
import signal
from itertools import chain

import pytest
import transformers.trainer
from safetensors.torch import load_file

from tests.integration import test_recipe_llama as llama
from tests.integration import test_recipe_lora as lora
from tests.integration.preempted import Preempt, PreemptWhileEvaluating, Record, write_stream
from tests.integration.recipes import import_recipe
from tests.integration.tiny import largest_difference

recipe = import_recipe("llama_pretrain")
launch, run, blocks = recipe["launch"], recipe["run"], recipe["stream"]
shared_cache, short_minilm = llama.shared_cache, lora.short_minilm  # fixtures
STEPS = 5
SETTINGS = {**llama.SMALL, "max_steps": STEPS, "save_strategy": "steps", "save_steps": 100}
SEQUENCES = SETTINGS["tokens_per_step"] // SETTINGS["seq_len"]


@pytest.fixture
def stream(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "AT_ONCE", 4)  # several places in a short run
    (tmp_path / "texts").mkdir()
    return write_stream(tmp_path / "texts")


@pytest.fixture(params=["memory", "stream"])
def corpus(request):
    return request.getfixturevalue("stream") if request.param == "stream" else []


def train(folder, *options, callbacks=()):
    """Run the recipe with callbacks in its Trainer, and return the sequences it was trained on."""
    words = chain.from_iterable((f"--{name}", str(value)) for name, value in SETTINGS.items())
    record = Record()
    with pytest.MonkeyPatch.context() as patch:
        watched = [*transformers.trainer.DEFAULT_CALLBACKS, record, *callbacks]
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", watched)
        run.main(["configs/tiny.yaml", *words, "--output_dir", str(folder), *options])
    return record.seen


def weights(folder):
    return load_file(folder / "model.safetensors")


def last_line(capsys):
    return capsys.readouterr().out.splitlines()[-1]


def test_a_stopped_run_goes_on_as_if_it_had_not_been(corpus, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    before = signal.getsignal(signal.SIGUSR1)
    expected = train(whole, *corpus)
    assert len(set(expected)) == STEPS * SEQUENCES  # a repetition would be seen

    seen = train(parts, *corpus, callbacks=[Preempt(2)])
    assert last_line(capsys).startswith(
        f"stopped by SIGTERM after step 2 of {STEPS}; saved {parts}"
    )
    assert not (parts / "results.json").exists()
    again = ["--resume_from_checkpoint", "last"]
    seen += train(parts, *corpus, *again, callbacks=[Preempt(3, signal.SIGUSR1)])
    assert last_line(capsys).startswith(f"stopped by SIGUSR1 after step 3 of {STEPS}")
    assert signal.getsignal(signal.SIGUSR1) is before

    seen += train(parts, *corpus, *again)
    assert seen == expected
    assert largest_difference(weights(parts), weights(whole)) == 0


def test_a_checkpoint_holds_the_place_in_the_stream(stream, tmp_path):
    parts = tmp_path / "parts"
    train(parts, *stream, callbacks=[Preempt(3)])
    place = json.loads((parts / "checkpoint-3" / blocks.FILE).read_text())
    assert place["trained"] == 3 * SEQUENCES
    assert 0 < place["blocks"] <= place["trained"]
    (parts / "checkpoint-3" / blocks.FILE).unlink()  # then the stream is read again up to there
    train(parts, *stream, "--resume_from_checkpoint", "last")
    train(tmp_path / "whole", *stream)
    assert largest_difference(weights(parts), weights(tmp_path / "whole")) == 0


def test_a_run_that_goes_on_elsewhere_in_the_stream_is_another_run(stream, tmp_path):
    whole = train(tmp_path / "whole", *stream)
    parts = train(tmp_path / "parts", *stream, callbacks=[Preempt(2)])
    again = ["--resume_from_checkpoint", "last", "--ignore_data_skip", "true"]
    parts += train(tmp_path / "parts", *stream, *again)
    assert len(parts) == len(whole)
    assert parts != whole
    assert largest_difference(weights(tmp_path / "parts"), weights(tmp_path / "whole")) > 1e-4


@pytest.mark.parametrize(("evaluated", "stopped"), [(0, 1), (2, 2)])
def test_an_evaluation_ends_and_no_step_follows_it(evaluated, stopped, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(whole)
    seen = train(parts, callbacks=[PreemptWhileEvaluating(evaluated)])
    assert last_line(capsys).startswith(f"stopped by SIGTERM after step {stopped} of {STEPS}")
    assert (parts / f"checkpoint-{stopped}" / "trainer_state.json").is_file()
    seen += train(parts, "--resume_from_checkpoint", "last")
    assert seen == expected
    curves = [json.loads((f / "results.json").read_text())["eval_curve"] for f in (whole, parts)]
    assert curves[0] == curves[1]
    assert largest_difference(weights(parts), weights(whole)) == 0


def test_an_evaluation_that_is_not_the_best_is_saved_too(tmp_path, capsys):
    """Here the loss is to rise, and falls."""
    best = ["--save_strategy", "best", "--metric_for_best_model", "loss"]
    best += ["--greater_is_better", "true", "--eval_strategy", "steps", "--eval_steps", "1"]
    train(tmp_path, *best, callbacks=[PreemptWhileEvaluating(2)])
    assert last_line(capsys).startswith(f"stopped by SIGTERM after step 2 of {STEPS}")
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").is_file()


def test_the_checkpoint_of_the_stop_is_kept_beside_the_best(tmp_path):
    often = {"eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}
    options = {**often, "load_best_model_at_end": True, "metric_for_best_model": "loss"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    train(tmp_path / "parts", *words, callbacks=[Preempt(3)])
    kept = {folder.name for folder in (tmp_path / "parts").glob("checkpoint-*")}
    assert kept == {"checkpoint-2", "checkpoint-3"}


def test_a_stop_at_the_end_of_an_epoch_saves_once(tmp_path, monkeypatch):
    saved = []
    original = transformers.Trainer._save_checkpoint
    monkeypatch.setattr(
        transformers.Trainer,
        "_save_checkpoint",
        lambda self, *given: saved.append(self.state.global_step) or original(self, *given),
    )
    train(tmp_path, "--save_strategy", "epoch", callbacks=[Preempt(2)])
    assert saved == [2]


def test_no_step_follows_the_last_one(tmp_path):
    folder = tmp_path / "out"
    train(folder, callbacks=[Preempt(STEPS)])  # a signal during the last step changes nothing
    results = json.loads((folder / "results.json").read_text())
    trained = weights(folder)
    (folder / "results.json").unlink()  # as if it had been ended in the last evaluation

    assert train(folder, "--resume_from_checkpoint", "auto") == []
    again = json.loads((folder / "results.json").read_text())
    assert again["final_validation_loss"] == results["final_validation_loss"]
    assert largest_difference(weights(folder), trained) == 0


def test_a_job_begins_and_goes_on_with_one_command(tmp_path, capsys):
    folder, auto = tmp_path / "out", ["--resume_from_checkpoint", "auto"]
    first = train(folder, *auto, callbacks=[Preempt(1)])
    assert len(first) == SEQUENCES
    interrupted = folder / "checkpoint-4"  # ended while it was written
    interrupted.mkdir()
    (interrupted / "model.safetensors").write_bytes(b"")
    for step, content in ((2, '{"global_step": 2, "log_hist'), (3, ""), (5, "[]"), (6, "{}")):
        shutil.copytree(folder / "checkpoint-1", folder / f"checkpoint-{step}")
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(content)
    for name in ("checkpoint-best", "checkpoint-1-copy-9"):  # copies of a user's own
        shutil.copytree(folder / "checkpoint-1", folder / name)
    capsys.readouterr()
    rest = train(folder, *auto)
    said = capsys.readouterr().out
    assert [f"checkpoint-{n} is damaged" in said for n in range(1, 7)] == [0, 1, 1, 0, 1, 1]
    assert len(rest) == (STEPS - 1) * SEQUENCES
    assert (folder / "results.json").is_file()


def test_a_study_does_not_take_a_stopped_run_for_a_finished_one(tmp_path, monkeypatch):
    monkeypatch.setattr(launch.Run, "command", lambda self: ["true"])
    with pytest.raises(RuntimeError, match="stopped by a signal"):
        launch.run_quietly(launch.Run(tmp_path, "configs/tiny.yaml"))


@lora.needs_assets
def test_adapters_go_on_as_if_they_had_not_been_stopped(short_minilm, tmp_path, capsys):
    def adapter(name):
        return load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")

    options = ["--model", short_minilm, "--lora_dropout", "0.1"]
    whole = lora.train("minilm_sentiment", tmp_path / "whole", *options)
    with pytest.MonkeyPatch.context() as patch:
        watched = [*transformers.trainer.DEFAULT_CALLBACKS, Preempt(2)]
        patch.setattr(transformers.trainer, "DEFAULT_CALLBACKS", watched)
        with pytest.raises(FileNotFoundError):  # there are no results yet
            lora.train("minilm_sentiment", tmp_path / "parts", *options)
    assert last_line(capsys).startswith("stopped by SIGTERM after step 2 of 4")
    options += ["--resume_from_checkpoint", "last"]
    parts = lora.train("minilm_sentiment", tmp_path / "parts", *options)
    assert largest_difference(adapter("parts"), adapter("whole")) == 0
    assert parts["validation_loss"] == whole["validation_loss"]
