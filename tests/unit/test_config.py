"""MuonConfig: what it accepts, what it refuses and in which words."""

import copy
import dataclasses
import enum
import json
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch

from hf_muon import MuonConfig

# settings -> words that the message must hold: the field, the value and what is allowed.
WRONG = [
    ({"ordr": "pre_polar"}, ["'ordr'", "Did you mean 'order'"]),
    ({"learning_rate": 0.1}, ["'learning_rate'", "lr", "Allowed"]),
    ({"order": "pre"}, ["order='pre'", "'pre_polar'", "'post_polar'", "'polar_only'"]),
    ({"order": "postpolar"}, ["order='postpolar'", "Did you mean 'post_polar'"]),
    ({"momentum": 1.0}, ["momentum=1.0", "0 ≤ momentum < 1"]),
    ({"momentum": -0.1}, ["momentum=-0.1", "0 ≤ momentum < 1"]),
    ({"momentum": "0.9"}, ["momentum='0.9'", "str", "a number is expected"]),
    ({"momentum": float("nan")}, ["momentum=nan", "not finite"]),
    ({"nesterov": 1}, ["nesterov=1", "True or False"]),
    ({"match_update_rms": True}, ["match_update_rms=True", "post_polar", "'pre_polar'"]),
    ({"polar_method": "cholesky"}, ["polar_method='cholesky'", "'newton_schulz'", "'svd'"]),
    ({"coefficients": "cubic"}, ["coefficients='cubic'", "'quintic'", "'polar_express'"]),
    ({"polar_steps": 0}, ["polar_steps=0", "1 ≤ polar_steps < 100"]),
    ({"polar_steps": 5.0}, ["polar_steps=5.0", "whole number"]),
    ({"polar_steps": 9}, ["polar_steps=9", "3 to 8", "quintic"]),
    ({"polar_dtype": "fp8"}, ["polar_dtype='fp8'", "'bfloat16'", "'float32'"]),
    ({"polar_dtype": "bfloat16", "polar_method": "svd"}, ["polar_dtype='bfloat16'", "'float32'"]),
    ({"adjust_lr": "rms"}, ["adjust_lr='rms'", "'match_rms_adamw'", "'spectral'"]),
    ({"lr": -1.0}, ["lr=-1.0", "0 ≤ lr < 1e+06"]),
    ({"lr": float("inf")}, ["lr=inf", "not finite"]),
    ({"weight_decay": -0.1}, ["weight_decay=-0.1", "0 ≤ weight_decay < 1e+06"]),
    ({"adamw_betas": (0.9, 1.0)}, ["adamw_betas=(0.9, 1.0)", "0 ≤ each of adamw_betas < 1"]),
    ({"adamw_betas": (0.9,)}, ["adamw_betas=(0.9,)", "2 values"]),
    ({"adamw_betas": 0.9}, ["adamw_betas=0.9", "tuple"]),
    ({"momentum_start": 0.5}, ["momentum_start=0.5", "momentum_warmup_steps=0", "both"]),
    ({"momentum_warmup_steps": 10}, ["momentum_warmup_steps=10", "both"]),
    (
        {"momentum_start": 0.5, "momentum_warmup_steps": 9, "order": "polar_only"},
        ["momentum_start", "polar_only", "no momentum"],
    ),
    ({"momentum_dtype": "int4"}, ["momentum_dtype='int4'", "'float32'"]),
    ({"muon_params": "attn"}, ["muon_params='attn'", "tuple"]),
    ({"adamw_params": ("(",)}, ["adamw_params", "'('", "regular expression"]),
    ({"adamw_params": ("x", "")}, ["adamw_params", "empty pattern"]),
    ({"bucket_mb": 0}, ["bucket_mb=0", "1e-06 ≤ bucket_mb < 1e+06"]),
    ({"lora_update": "products"}, ["lora_update='products'", "'factor'", "Did you mean 'product'"]),
    ({"lora_update": "product", "order": "post_polar"}, ["'product'", "'pre_polar'", "'factor'"]),
    ({"lora_update": "tangent", "order": "polar_only"}, ["'tangent'", "'pre_polar'", "'factor'"]),
    (
        {"lora_update": "product", "cautious_weight_decay": True},
        ["cautious_weight_decay=True", "lora_update='product'", "remove one"],
    ),
    ({"lora_damping": 0.0}, ["lora_damping=0.0", "1e-08 ≤ lora_damping"]),
    ({"tangent_iterations": 0}, ["tangent_iterations=0", "1 ≤ tangent_iterations < 100"]),
    ({"lora_update": "tangent", "prefilter": "norm"}, ["prefilter=", "'tangent'", "'clip'"]),
    *[
        ({name: value}, [f"{name}=", "is out of range", f"{name} < "])
        for name, value in {
            "lr": 1e300,
            "adamw_lr": 1e300,
            "weight_decay": 1e300,
            "adamw_weight_decay": 1e300,
            "adamw_eps": 1e300,
            "lora_damping": 1e300,
            "bucket_mb": 1.7e308,
            "momentum_warmup_steps": 10**400,
            "tangent_iterations": 10**400,
            "tangent_balance_every": 10**400,
        }.items()
    ],
    *[
        ({name: value}, [f"{name}=", "is too large"])
        for name in ("lr", "momentum", "bucket_mb")
        for value in (10**400, Fraction(10**400))
    ],
    ({"adamw_betas": (10**400, 0.9)}, ["adamw_betas=", "is too large"]),
    *[
        ({"order": value}, ["order=", "is not one of 'pre_polar', 'post_polar', 'polar_only'"])
        for value in (np.zeros(3), torch.zeros(3), ["pre_polar"], {}, None)
    ],
    ({"lr": "1" * 5000}, ["lr='1", "a number is expected"]),
    ({"muon_params": [np.zeros(3)]}, ["muon_params=array", "a string is expected"]),
    ({"muon_params": ("a{99999999999}",)}, ["muon_params", "a{99999999999}", "not a regular"]),
    ({"muon_params": ("(" * 900 + ")" * 900,)}, ["muon_params holds '((", "1,000 characters"]),
    ({"lr_group": 2}, ["'lr_group'. Allowed"]),
    ({"x" * 5000: 2}, ["Unknown setting: 'xxx"]),
    ({"self": 2}, ["Unknown setting: 'self'"]),
    ({"cls": 2}, ["Unknown setting: 'cls'"]),
    (
        {"tangent_balance_every": -1},
        ["tangent_balance_every=-1", "0 ≤ tangent_balance_every < 1e+09"],
    ),
]


@pytest.mark.parametrize(("settings", "words"), WRONG, ids=lambda value: str(value)[:60])
def test_wrong_settings_name_field_value_and_what_is_allowed(settings, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words follow
        MuonConfig(**settings)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000


@pytest.mark.parametrize("name", ["polar_steps", "lr", "order", "muon_params"])
def test_a_number_that_cannot_be_shown_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=rf"{name}=<int that cannot be shown>"):
        MuonConfig(**{name: 10**5000})


WRONG_STRINGS = [
    ("order", ["'order'", "key=value"]),
    ("order=pre_polar,", ["''", "without one at the end"]),
    ("=3", ["'=3'", "key=value"]),
    ("momentum=", ["'momentum='", "key=value"]),
    ("momentum=0.9,momentum=0.8", ["'momentum'", "twice"]),
    ("momentun=0.9", ["'momentun'", "Did you mean 'momentum'"]),
    ("order=pre_polar nesterov=true", ["two settings", "order=…,nesterov=…"]),
    ("order=pre_polar;lr=0.1", ["two settings", "order=…,lr=…"]),
    ("adamw_params=x y=1 lr=0.1", ["two settings", "adamw_params=…,lr=…"]),
    ("config=runs of lr=0.1/muon.json", ["not a readable JSON file"]),
    ("momentum=high", ["momentum='high'", "a number"]),
    ("polar_steps=2.5", ["polar_steps='2.5'", "whole number"]),
    ("nesterov=maybe", ["nesterov='maybe'", "true or false"]),
    ("adamw_betas=0.9:b", ["adamw_betas='b'", "a number"]),
    ({"momentum": 0.9}, ["{'momentum': 0.9}", "dict", "key=value"]),
    ("muon_params=q_proj|", ["muon_params", "empty pattern"]),
    ("config=nowhere.json", ["'nowhere.json'", "not a readable JSON file"]),
    ("config=" + "x" * 5000, ["config='xxx", "not a readable JSON file"]),
    ("x" * 5000, ["'xxx", "key=value"]),
    ("polar_steps=" + "9" * 5000, ["polar_steps='999", "whole number"]),
    ("lr=1e400", ["lr=inf", "not finite"]),
    ("polar_dtype=bfloat 16", ["polar_dtype='bfloat 16'", "Did you mean 'bfloat16'"]),
]


@pytest.mark.parametrize(("text", "words"), WRONG_STRINGS, ids=lambda value: str(value)[:60])
def test_wrong_optim_args_say_what_is_expected(text, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words follow
        MuonConfig.from_optim_args(text)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000


def test_optim_args_grammar():
    config = MuonConfig.from_optim_args(
        "order=post_polar, momentum=0.9, nesterov=false, polar_steps=6, adamw_betas=0.9:0.95,"
        "adamw_params=score|(q|k)_proj|[|]x, momentum_dtype=none, adamw_lr=3e-4",
        lr=1e-3,
        momentum=0.5,
    )
    assert config == MuonConfig(
        order="post_polar",
        momentum=0.9,
        nesterov=False,
        polar_steps=6,
        adamw_betas=(0.9, 0.95),
        adamw_params=("score", "(q|k)_proj", "[|]x"),
        adamw_lr=3e-4,
        lr=1e-3,
    )


def test_spaces_inside_a_value_belong_to_it(tmp_path):
    path = tmp_path / "a file.json"
    path.write_text('{"momentum": 0.8}')
    (tmp_path / "afile.json").write_text('{"momentum": 0.7}')
    config = MuonConfig.from_optim_args(f" config = {path} ,\n lr = 0.1,muon_params=a b | [ ]c")
    assert (config.momentum, config.lr) == (0.8, 0.1)
    assert config.muon_params == ("a b", "[ ]c")


@pytest.mark.parametrize("empty", [None, "", " "])
def test_empty_optim_args_leave_the_defaults(empty):
    assert MuonConfig.from_optim_args(empty, lr=0.1) == MuonConfig(lr=0.1)


def test_escaped_brackets_do_not_count():
    config = MuonConfig.from_optim_args(r"adamw_params=a b=\(c")
    assert config.adamw_params == (r"a b=\(c",)  # b is no setting
    config = MuonConfig.from_optim_args(r"adamw_params=a\(b|c")
    assert config.adamw_params == (r"a\(b", "c")


def test_json_is_overridden_by_inline_keys_and_overrides_defaults(tmp_path):
    path = tmp_path / "muon.json"
    path.write_text(json.dumps({"momentum": 0.8, "adamw_betas": [0.8, 0.9], "lr": 2}))
    assert MuonConfig.from_json(path) == MuonConfig(momentum=0.8, adamw_betas=(0.8, 0.9), lr=2.0)
    config = MuonConfig.from_optim_args(f"config={path},momentum=0.7", lr=1.0, weight_decay=0.1)
    assert (config.momentum, config.lr, config.weight_decay) == (0.7, 2.0, 0.1)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"lr": 0.1, "momentum": 0.9, "lr": 0.2}', ["gives 'lr' twice"]),
        ('{"lr": ' + "[" * 100_000 + "]" * 100_000 + "}", ["recursion"]),
        ('{"lr": ' + "1" * 5000 + "}", ["digits"]),
        ('["' + "x" * 5000 + '"]', ["holds ['xxx", "object"]),
    ],
    ids=["twice", "deep", "digits", "long"],
)
def test_wrong_json_is_one_short_sentence(tmp_path, text, words):
    path = tmp_path / "muon.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"muon\.json") as error:
        MuonConfig.from_json(path)
    for word in words:
        assert word in str(error.value)
    assert len(str(error.value)) < 1000


FOREVER = ["(a+)+$", "(a|a)*$", "(?:x*y?)*z", "((a?)b){9}", "(a|ab)+", ".*.*.*.*x", "a+" * 21]
ANSWERING = [
    r"layers\.\d+\..*(q|k|v)_proj",
    "(a|b)?c",
    "[(a+)]+",
    r"(?:\(a\+)+",
    "(?i)(a)+",
    "[]|a]",
]


@pytest.mark.parametrize("pattern", FOREVER)
def test_patterns_that_may_never_answer_are_refused(pattern):
    with pytest.raises(ValueError, match=r"muon_params holds .* may take forever"):
        MuonConfig(muon_params=(pattern,))


@pytest.mark.parametrize("pattern", ANSWERING)
def test_patterns_that_answer_are_not(pattern):
    assert MuonConfig(adamw_params=(pattern,)).adamw_params == (pattern,)


class Order(str, enum.Enum):  # noqa: UP042
    POST = "post_polar"


def test_values_become_plain():
    """Checkpoints that are read with ``weights_only=True`` hold nothing else."""
    given = {
        "lr": np.float64(0.1),
        "polar_steps": np.int64(4),
        "adamw_betas": [np.float64(0.9)] * 2,
    }
    for order in (Order.POST, np.str_("post_polar")):
        config = MuonConfig(order=order, muon_params=(np.str_("a"),), **given)
        values = [config.order, config.lr, config.polar_steps, *config.adamw_betas]
        assert [type(value) for value in values] == [str, float, int, float, float]
        assert type(config.muon_params[0]) is str


def test_json_must_be_text(tmp_path):
    path = tmp_path / "muon.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="not a readable JSON file"):
        MuonConfig.from_json(path)


def test_json_must_hold_an_object(tmp_path):
    path = tmp_path / "muon.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"\[1\].*object"):
        MuonConfig.from_json(path)


def test_strings_from_launchers_are_converted():
    settings = {"momentum": "0.9", "nesterov": "False", "order": "polar_only", "lr": 0.1}
    expected = MuonConfig(momentum=0.9, nesterov=False, order="polar_only", lr=0.1)
    assert MuonConfig.from_mapping(settings) == expected


def test_round_trips():
    config = MuonConfig(lr=1, muon_params=["a", "b"], momentum_start=0.8, momentum_warmup_steps=5)
    assert config.lr == 1.0
    assert isinstance(config.lr, float)
    assert config.muon_params == ("a", "b")
    assert MuonConfig(**config.to_dict()) == config
    assert MuonConfig(**json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == config
    assert copy.deepcopy(config) == config
    assert dataclasses.replace(config, momentum=0.9).momentum == 0.9


def test_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MuonConfig().momentum = 0.5
    with pytest.raises(TypeError):
        MuonConfig("pre_polar")


@pytest.mark.parametrize("one", [np.float64(1e-3), np.float32(1e-3), 1, np.int64(1)])
def test_numpy_numbers_are_numbers(one):
    config = MuonConfig(lr=one)
    assert type(config.lr) is float
    assert config.lr == float(one)
    with pytest.raises(ValueError, match="lr=True is of type bool"):
        MuonConfig(lr=True)


def test_adamw_needs_its_own_rate_unless_the_update_matches_adamw():
    config = MuonConfig(lr=0.02, adjust_lr="original")
    assert config.muon_group()["lr"] == 0.02
    with pytest.raises(ValueError, match=r"adamw_lr is not set.*'original'"):
        config.adamw_group()
    assert dataclasses.replace(config, adamw_lr=3e-4).adamw_group()["lr"] == 3e-4
    assert MuonConfig(lr=1e-3).adamw_group()["lr"] == 1e-3


def test_lr_is_required_for_groups():
    with pytest.raises(ValueError, match="lr is not set"):
        MuonConfig().muon_group()


def test_group_values_are_plain():
    config = MuonConfig(lr=1e-3)
    for group in (config.muon_group(), config.adamw_group(decay=False)):
        assert all(isinstance(value, str | int | float | bool | tuple) for value in group.values())


def test_values_of_other_libraries_become_plain():
    given = {
        "order": np.str_("post_polar"),
        "momentum": np.float32(0.5),
        "polar_steps": np.int64(4),
        "nesterov": np.bool_(False),
        "lr": torch.tensor([0.25]),
        "adamw_betas": [np.float64(0.5), torch.tensor(0.75)],
    }
    plain = {**given, "order": "post_polar", "momentum": 0.5, "polar_steps": 4, "nesterov": False}
    config = MuonConfig(**given)
    assert config == MuonConfig(**{**plain, "lr": 0.25, "adamw_betas": (0.5, 0.75)})
    flat = [*config.to_dict().values(), *config.adamw_betas]
    assert {type(value) for value in flat} <= {str, float, int, bool, tuple, type(None)}


def test_a_schedule_without_steps_is_one_short_sentence():
    with pytest.raises(
        ValueError, match="momentum_cooldown_steps=0 go together: set both"
    ) as found:
        MuonConfig(lr=1e-3, momentum=(0.5,) * 9999, momentum_end=(0.5,) * 9999)
    assert len(str(found.value)) < 500
