"""Whatever is given as settings makes an optimizer that steps, or is refused in a sentence."""

import json
import math
import random
import string
import time
from dataclasses import fields
from decimal import Decimal
from enum import Enum
from fractions import Fraction

import numpy as np
import torch

from hf_muon import Muon, MuonConfig

DEFAULTS = {field.name: field.default for field in fields(MuonConfig)}
NAMES = list(DEFAULTS)
WORDS = [
    "pre_polar", "post_polar", "polar_only", "auto", "newton_schulz", "gram", "svd", "quintic",
    "polar_express", "tight", "bfloat16", "float32", "match_rms_adamw", "original", "spectral",
    "none", "factor", "product", "owner", "redundant", "int8", "clip", "norm", "polargrad", "soft",
    "frobenius", "rows", "entries", "relative", "hyperball", "cosine",
]  # fmt: skip
# Settings for which a number or a word of those above would nearly always be refused.
CHOICES = {
    "momentum": [0, 0.9, "auto", (0.9, 0.98), (0.5, 0.9, 0.95), (0.9,), (0.9, 1.0)],
    "momentum_weights": [None, (0.44, 0.56), (0.5, 0.25, 0.25), (1.5, -0.5), (0.5, 0.6)],
    "momentum_start": [None, 0.5, (0.5, 0.9), "auto"],
    "momentum_end": [None, 0.5, (0.5, 0.9), 1.0],
    "prefilter": ["none", "clip", "norm"],
    "matrix_map": ["polar", "polargrad", "soft"],
    "rescale": ["none", "frobenius", "rows", "entries"],
    "step_rule": ["additive", "relative", "hyperball"],
    "momentum_schedule": ["linear", "cosine"],
    "momentum_dtype": [None, "int8", "float32", "bfloat16"],
}
# Settings that only make sense together.
TOGETHER = [
    {"momentum": (0.9, 0.98), "momentum_weights": (0.44, 0.56)},
    {"momentum": (0.5, 0.9, 0.95), "momentum_weights": (0.5, 0.25, 0.25)},
    {"momentum": (0.9, 0.98), "momentum_start": (0.5, 0.9), "momentum_warmup_steps": 3},
    {"momentum_end": 0.5, "momentum_cooldown_start": 1, "momentum_cooldown_steps": 3},
    {"momentum_start": 0.5, "momentum_warmup_steps": 3, "momentum_schedule": "cosine"},
    {"matrix_map": "soft", "map_power": 0.5},
    {"prefilter": "clip", "prefilter_threshold": 1.5},
    {"rescale": "rows", "rescale_beta": 0.5},
    {"rescale": "entries", "momentum": (0.5, 0.9)},
    {"momentum": "auto", "momentum_dtype": "int8"},
    {"momentum": "auto", "rescale": "entries"},
    {"momentum_dtype": "int8", "momentum": (0.9, 0.98)},
    {"step_rule": "hyperball", "weight_decay": 0.0},
    {"step_rule": "relative", "prefilter": "norm"},
]
SECONDS = 10.0  # a tenth of a millisecond is usual, and other processes may take the CPU away


class Name(str, Enum):  # noqa: UP042
    ORDER = "post_polar"


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


NUMBERS = [
    0, 1, -1, 2, 5, 100, 10**400, -(10**400), 10**5000, 0.0, -0.0, 0.5, 0.95, 1e-300, 5e-324, 1e300,
    1.7e308, math.inf, -math.inf, math.nan, True, False, 1j, Fraction(1, 3), Fraction(10**400),
    Decimal("0.1"), np.float32(0.5), np.float64("nan"), np.int64(3), np.bool_(True),
]  # fmt: skip
OTHERS = [
    None, b"a", {}, {"a": 1}, {1, 2}, [], (), [1, 2], (0.9, 0.99), (0.9, 0.99, 1), [None], object(),
    int, len, range(3), np.zeros(3), np.zeros((0,)), torch.zeros(2), torch.tensor(0.5), Name.ORDER,
    np.str_("svd"), nested(5), nested(100_000), ["x" * 10_000], [0.5] * 10_000, torch.float32,
]  # fmt: skip
TEXTS = [
    "", " ", "none", "None", "auto", "true", "FALSE", "yes", "1", "0", "-1", "1e3", "1e400", "nan",
    "0.9:0.95", "0.9:", ":", "a|b", "|", "(a+)+$", "a{99999999999}", "(" * 5000, "[", "\\", "é",
    "\0", "٣", "9" * 5000, "x" * 100_000, "pre_polar", "svd", "bfloat16", "owner", "a=b", "a b",
    "[|]", "\ud800", "\n", "(?P<a>b)(?P=a)*", "(?x)#)", "(?i)q_proj", "{", "$^", ".*.*",
]  # fmt: skip


def pattern(dice):
    return "".join(dice.choice("ab.*+?|()[]{}\\^$01,=! ") for _ in range(dice.randint(0, 30)))


def plausible(dice, name):
    """A value of about the right type, for settings that get further than the first check."""
    default = DEFAULTS[name]
    if name in CHOICES:
        return dice.choice([default, *CHOICES[name]])
    if isinstance(default, bool):
        return dice.random() < 0.5
    if isinstance(default, int | float) or default is None:
        return dice.choice([0, 1, 3, 5, 0.5, 0.9, 1e-3, 1e-8, 40])
    if isinstance(default, tuple):
        return (pattern(dice),) if name.endswith("params") else (0.9, dice.random())
    return dice.choice([default, dice.choice(WORDS)])


def settings(dice):
    """A few settings: plausible ones, broken ones, unknown names."""
    made = dict(dice.choice(TOGETHER)) if dice.random() < 0.2 else {}
    for _ in range(dice.choice([1, 1, 2, 3, 6])):
        name = dice.choice(NAMES)
        kind = dice.random()
        if kind < 0.05:
            name = dice.choice(
                ["self", "cls", "lr_scale", "", "x" * 50_000, "é", name + "s", "config"]
            )
        made[name] = (
            plausible(dice, name)
            if kind > 0.4 and name in DEFAULTS
            else dice.choice([*NUMBERS, *OTHERS, *TEXTS, pattern(dice)])
        )
    return made


def text(dice):
    """An ``optim_args`` string: most pairs plausible, some broken, some torn apart."""
    pairs = []
    for name in dice.sample(NAMES, dice.randint(1, 3)):
        written = joined(plausible(dice, name))
        if dice.random() < 0.4:
            written = dice.choice([*TEXTS, pattern(dice)])
        equals = dice.choice(["=", "=", " = ", "==", " "])
        pairs.append(f"{name}{equals}{written}")
    whole = dice.choice([",", ", ", " , ", ",,"]).join(pairs)
    torn = dice.sample(whole[:200], len(whole[:200]))
    return whole if dice.random() < 0.9 else "".join(torn)


def document(dice):
    """The text of a JSON file: an object, one with a key twice, cut, deep, or anything."""
    plain = {name: value for name, value in settings(dice).items() if written(value)}
    whole = json.dumps(plain)
    return dice.choice(
        [
            whole,
            whole,
            whole[: dice.randrange(len(whole))],
            whole[:-1] + ("," if plain else "") + f'"lr": 1, "lr": {dice.random()}}}',
            '{"lr":' * dice.choice([2, 100_000]) + "1",
            "".join(dice.choice(string.printable) for _ in range(40)),
            "\ufeff" + whole,
        ]
    )


def written(value):
    try:
        return json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return None


def outcome(build, given):
    """What is built, or the words in which it was refused."""
    began = time.perf_counter()
    try:
        return build(given)
    except (TypeError, ValueError) as error:
        return str(error)
    finally:
        assert time.perf_counter() - began < SECONDS, given


def judged(build, given):
    """What is built, or None for a refusal in a short sentence."""
    found = outcome(build, given)
    if isinstance(found, str):
        assert 10 < len(found) < 1000, found
        return None
    return found


ALLOWED = [
    "expected", "allowed", "Allowed", "one of", "not finite", "too large", "needs", "no effect",
    "both", "empty", "regular expression",
]  # fmt: skip


def from_keywords(given):
    return MuonConfig(**given)


def test_every_setting_is_accepted_or_refused_in_a_sentence():
    dice = random.Random(0)
    accepted = [judged(from_keywords, settings(dice)) for _ in range(1500)]
    assert 200 < sum(config is not None for config in accepted) < 1300
    for config in filter(None, accepted):
        assert MuonConfig(**json.loads(json.dumps(config.to_dict()))) == config


def test_a_refusal_names_the_setting_and_what_is_allowed():
    for name in NAMES:
        for value in [*NUMBERS, *OTHERS, *TEXTS]:
            found = outcome(from_keywords, {name: value})
            if isinstance(found, str):
                assert name in found
                assert any(words in found for words in ALLOWED), found


def test_every_optim_args_is_accepted_or_refused_in_a_sentence():
    dice = random.Random(1)
    accepted = [judged(MuonConfig.from_optim_args, text(dice)) for _ in range(1000)]
    assert 50 < sum(config is not None for config in accepted) < 950
    for value in [*NUMBERS, *OTHERS]:
        judged(MuonConfig.from_optim_args, value)


def test_every_file_is_accepted_or_refused_in_a_sentence(tmp_path):
    dice = random.Random(2)
    path = tmp_path / "muon.json"
    accepted = 0
    for _ in range(500):
        path.write_bytes(document(dice).encode("utf-8", "surrogatepass"))
        accepted += judged(MuonConfig.from_json, path) is not None
    assert 20 < accepted < 480
    for value in ["", "\0", "x" * 10_000, tmp_path, 3, None]:
        assert judged(MuonConfig.from_json, value) is None


def test_accepted_settings_train():
    """One step on a matrix: finite, or refused before the weights change."""
    dice = random.Random(3)
    trained = 0
    for _ in range(300):
        given = {name: plausible(dice, name) for name in dice.sample(NAMES, 3)}
        given |= dice.choice([{}, *TOGETHER]) | {"lr": 0.01}
        given.pop("compile", None)  # takes seconds
        if judged(from_keywords, given) is None:
            continue
        weight = torch.nn.Parameter(torch.ones(2, 3))
        weight.grad = torch.arange(6.0).reshape(2, 3)
        stepped = outcome(lambda given: Muon([weight], **given).step() or given, given)  # noqa: B023
        if isinstance(stepped, str):
            assert len(stepped) < 1000
            assert torch.equal(weight, torch.ones(2, 3))
            continue
        trained += 1
        assert weight.isfinite().all(), given
        assert not torch.equal(weight, torch.ones(2, 3)), given
    assert trained > 50


def test_settings_that_belong_together_are_accepted():
    reached = {name: set() for name in CHOICES}
    for given in TOGETHER:
        config = MuonConfig(**given)
        text = ",".join(f"{name}={joined(value)}" for name, value in given.items())
        assert MuonConfig.from_optim_args(text) == config
        assert MuonConfig(**json.loads(json.dumps(config.to_dict()))) == config
        for name in reached.keys() & given.keys():
            reached[name].add(given[name])
    assert all(reached.values())


def joined(value):
    """A value as ``optim_args`` has it."""
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value)
