"""What tests of preemption need: a signal in a step, a record of what was trained on, a stream.

Put ``Preempt`` into ``transformers.trainer.DEFAULT_CALLBACKS``: the recipes build their Trainer
themselves.
"""

import json
import os
import signal

from transformers import TrainerCallback


class Preempt(TrainerCallback):
    """Sends this process a signal in the middle of a step."""

    def __init__(self, step, number=signal.SIGTERM, process=os.getpid):
        self.step, self.number, self.process = step, number, process

    def on_pre_optimizer_step(self, args, state, control, **_):
        if state.global_step + 1 == self.step:
            os.kill(self.process(), self.number)


class PreemptWhileEvaluating(Preempt):
    """Sends the signal in the middle of the evaluation after a step."""

    def on_pre_optimizer_step(self, args, state, control, **_):
        """Nothing during the step."""

    def on_prediction_step(self, args, state, control, **_):
        if state.global_step == self.step:
            os.kill(self.process(), self.number)


class Record(TrainerCallback):
    """Keeps the sequences that the model was trained on, in order."""

    def __init__(self):
        self.seen = []

    def on_train_begin(self, args, state, control, model=None, **_):
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, model, args, kwargs):
        if model.training:
            self.seen += [tuple(row.tolist()) for row in kwargs["input_ids"]]


def write_stream(folder):
    """Write a dataset that is streamed by the name of its folder, and return the options for it."""
    texts = [{"text": f"line {n}: {n * n} lazy dogs, {n**3} quick foxes\n" * 3} for n in range(400)]
    parts = {"train-0": texts[:150], "train-1": texts[150:300], "validation": texts[300:]}
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ["--corpus", str(folder), "--holdout_documents", "20", "--tokenizer_documents", "50"]
