"""Writes down gradients, weights and rates of a run, independently of the optimizer."""

from transformers import TrainerCallback

from tests.reference.monitor import History


class Recorder(TrainerCallback):
    """Copies of whole gradients as they are clipped, and of weights before and after each step."""

    def __init__(self):
        self.weights, self.gradients, self.rates = [], [], []

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.weights.append(self._weights(model))

    def on_pre_optimizer_step(self, args, state, control, model, optimizer, **kwargs):
        named = model.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args, state, control, model, **kwargs):
        self.weights.append(self._weights(model))

    @staticmethod
    def _weights(model):
        return {name: p.detach().clone() for name, p in model.named_parameters()}

    def history(self, name, **settings):
        """What happened to one parameter."""
        return History(
            [weights[name] for weights in self.weights],
            [gradients[name] for gradients in self.gradients],
            self.rates,
            **settings,
        )


def assert_close(found, expected, tolerance):
    """Every expected number is there; angles and gaps are compared with what they come from."""
    for name, value in expected.items():
        scale = abs(value)
        if name.startswith("sin_"):
            scale = 1.0
        elif name == "gap":
            scale = expected["average_sigma_1"]
        elif name in ("signal_power", "noise_to_signal"):  # a difference of two such powers
            scale += abs(expected["noise_power"]) * (1 if name == "signal_power" else scale)
        assert abs(found[name] - value) <= tolerance * scale, (name, found[name], value)
