"""``optim="muon"``: every way in, every round trip, and a process that does not know the name."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import HfArgumentParser, TrainingArguments, trainer_optimizer
from transformers.training_args import OptimizerNames

import hf_muon
import hf_muon.auto
from hf_muon import Muon, MuonOptimizerFactory
from hf_muon.integrations import names
from tests.distributed.launch import ON_LOOPBACK
from tests.integration.tiny import (
    arguments,
    tiny_data,
    tiny_llama,
    trained,
    trainer_of,
    weights,
)

SCRIPT = """
import sys
from transformers import HfArgumentParser, TrainingArguments, Trainer
sys.path.insert(0, {root!r})
from tests.integration.tiny import tiny_data, tiny_llama
(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
trainer = Trainer(model=tiny_llama(), args=args, train_dataset=tiny_data())
trainer.train()
optimizer = trainer.optimizer.optimizer
print("TRAINED WITH", type(optimizer).__module__, optimizer.param_groups[0]["order"])
"""


def test_registering_again_changes_nothing():
    members, handlers = list(OptimizerNames), dict(trainer_optimizer._OPTIMIZER_HANDLERS)
    hf_muon.register()
    assert list(OptimizerNames) == members
    assert handlers == trainer_optimizer._OPTIMIZER_HANDLERS
    from transformers.trainer import DEFAULT_CALLBACKS

    assert sum(c.__name__ == "MuonCallback" for c in DEFAULT_CALLBACKS) == 1


@pytest.mark.parametrize("name", names.NAMES)
def test_the_name_is_a_member(name):
    member = OptimizerNames(name)
    assert OptimizerNames[name.upper()] is member
    assert getattr(OptimizerNames, name.upper()) is member
    assert member in list(OptimizerNames)
    assert member == name
    assert hash(member) == hash(name)
    assert names.is_ours(member)
    assert names.is_ours(name)
    assert not names.is_ours("adamw_torch")


def test_a_name_that_transformers_owns_is_left_alone(monkeypatch, caplog):
    monkeypatch.setattr(names, "NAMES", ("sgd",))
    monkeypatch.setitem(names.PRESETS, "sgd", {"rescale": "rows"})
    kept = trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames.SGD]
    names.add_names(lambda context: None)
    assert trainer_optimizer._OPTIMIZER_HANDLERS[OptimizerNames.SGD] is kept
    assert "ours is optim='hf_muon' with optim_args='rescale=rows'" in caplog.text


def test_a_transformers_without_handlers_is_an_error_that_names_versions(monkeypatch):
    monkeypatch.delattr(trainer_optimizer, "_OPTIMIZER_HANDLERS")
    with pytest.raises(ImportError, match=r"transformers \d.*from 5\.2.*MuonOptimizerFactory"):
        hf_muon.register()


def test_arguments_survive_every_round_trip(tmp_path):
    args = arguments(tmp_path, optim_args="order=post_polar")
    copies = {
        "replace": dataclasses.replace(args, learning_rate=1.0),
        "deepcopy": copy.deepcopy(args),
        "pickle": pickle.loads(pickle.dumps(args)),
        "json": TrainingArguments(**json.loads(args.to_json_string())),
        "dict": TrainingArguments(**args.to_dict()),
    }
    for name, other in copies.items():
        assert other.optim == "muon", name
        assert other.optim_args == "order=post_polar", name
        assert isinstance(trained_optimizer(tmp_path, other), Muon), name


def trained_optimizer(folder, args):
    trainer = trainer_of(folder)
    trainer.args = args
    return trainer.create_optimizer()


def test_set_optimizer(tmp_path):
    args = arguments(tmp_path, optim="adamw_torch")
    args.set_optimizer("muon", learning_rate=0.5, args="momentum=0.8")
    group = trained_optimizer(tmp_path, args).param_groups[0]
    assert (group["algorithm"], group["lr"], group["momentum"]) == ("muon", 0.5, 0.8)


def test_command_line(tmp_path, capsys):
    parser = HfArgumentParser(TrainingArguments)
    (args,) = parser.parse_args_into_dataclasses(["--optim", "muon", "--output_dir", str(tmp_path)])
    assert args.optim is OptimizerNames.MUON
    (args,) = parser.parse_dict({"optim": "hf_muon", "output_dir": str(tmp_path)})
    assert args.optim == "hf_muon"
    with pytest.raises(SystemExit):
        parser.parse_args_into_dataclasses(["--optim", "muo"])
    assert "muon" in capsys.readouterr().err


def run(*command, timeout=120):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=timeout
    )


@pytest.fixture
def script(tmp_path, request):
    path = tmp_path / "train.py"
    path.write_text(SCRIPT.format(root=str(request.config.rootpath)))
    return path


def script_arguments(tmp_path):
    return [
        "--output_dir", tmp_path / "out", "--optim", "muon", "--optim_args", "order=post_polar",
        "--max_steps", "1", "--use_cpu", "true", "--report_to", "none",
    ]  # fmt: skip


def test_unmodified_script(script, tmp_path):
    done = run("-m", "hf_muon.run", script, *script_arguments(tmp_path))
    assert "TRAINED WITH hf_muon.optimizer.muon post_polar" in done.stdout, done.stderr
    without = run(script, *script_arguments(tmp_path))
    assert without.returncode != 0
    assert "muon" in without.stderr


@pytest.fixture
def ignores(tmp_path):
    """A script that trains with AdamW whatever its arguments say, except `really`."""
    path = tmp_path / "ignores.py"
    path.write_text(
        "import sys, torch\nfrom hf_muon import Muon\n"
        "from torch.optim.optimizer import register_optimizer_step_pre_hook\n"
        "register_optimizer_step_pre_hook(lambda *_: print('another hook'))\n"
        "w = torch.nn.Parameter(torch.ones(2, 2))\n"
        "kind = Muon if 'really' in sys.argv else torch.optim.AdamW\n"
        "optimizer = kind([w], lr=0.1)\nw.grad = torch.ones(2, 2)\noptimizer.step()\n"
        "sys.exit(3 if 'fails' in sys.argv else None) if 'exits' in sys.argv else None\n"
    )
    return path


TOLD = "the arguments ask for Muon, and Muon trained nothing"


def test_a_script_that_ignores_its_arguments_is_told(ignores):
    assert TOLD in run("-m", "hf_muon.run", ignores, "--optim", "muon", "exits").stderr
    trained = run("-m", "hf_muon.run", ignores, "--optim", "muon", "really")
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("another hook") == 1
    assert TOLD not in trained.stderr


@pytest.mark.full
def test_it_is_told_by_any_name_unless_it_failed_or_did_not_ask(ignores):
    assert TOLD in run("-m", "hf_muon.run", ignores, "--optim", "muon").stderr
    assert TOLD in run("-m", "hf_muon.run", ignores, "--optim=normuon").stderr
    failed = run("-m", "hf_muon.run", ignores, "--optim", "muon", "exits", "fails")
    assert failed.returncode == 3
    assert TOLD not in failed.stderr
    assert TOLD not in run("-m", "hf_muon.run", ignores, "--optim", "adamw_torch").stderr


@pytest.mark.full
def test_unmodified_module(script, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(script.parent))
    done = run("-m", "hf_muon.run", "-m", "train", *script_arguments(tmp_path))
    assert "TRAINED WITH hf_muon.optimizer.muon post_polar" in done.stdout, done.stderr


@pytest.mark.full
@pytest.mark.parametrize(
    "launcher",
    [
        ["accelerate.commands.launch", "--cpu", "--num_processes", "1"],
        ["torch.distributed.run", "--nproc-per-node", "1", *ON_LOOPBACK],
    ],
    ids=["accelerate", "torchrun"],
)
def test_launchers_run_an_unmodified_script(launcher, script, tmp_path):
    done = run("-m", *launcher, "-m", "hf_muon.run", script, *script_arguments(tmp_path))
    assert "TRAINED WITH hf_muon.optimizer.muon post_polar" in done.stdout, done.stderr


def test_run_says_what_it_needs(tmp_path):
    assert run("-m", "hf_muon.run").returncode == 2
    missing = run("-m", "hf_muon.run", tmp_path / "nothing.py")
    assert "no script" in missing.stderr
    assert missing.returncode == 1
    nowhere = run("-m", "hf_muon.run", "-m", "nothing.there")
    assert "no module 'nothing.there'" in nowhere.stderr
    assert "Traceback" not in nowhere.stderr
    assert "usage" in run("-m", "hf_muon.run", "--help").stdout


def test_training_args_are_read_by_a_process_without_hf_muon(tmp_path):
    torch.save(arguments(tmp_path), tmp_path / "training_args.bin")
    code = (
        "import sys, torch\n"
        f"args = torch.load({str(tmp_path / 'training_args.bin')!r}, weights_only=False)\n"
        "print(repr(args.optim), any(m.startswith('hf_muon') for m in sys.modules))"
    )
    assert run("-c", code).stdout.split() == ["'muon'", "False"]


def test_importing_the_package_does_not_import_transformers():
    code = "import sys, hf_muon; print('transformers' in sys.modules)"
    assert run("-c", code).stdout.strip() == "False"


def test_factory_without_registration(tmp_path):
    settings = {"lr": 1e-2, "weight_decay": 0.1, "momentum": "0.9"}
    by_factory = trained(
        tmp_path,
        optim="adamw_torch",
        trainer_settings={"optimizer_cls_and_kwargs": (MuonOptimizerFactory, settings)},
    )
    by_name = trained(tmp_path, optim_args="momentum=0.9")
    a, b = weights(by_factory), weights(by_name)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert settings == {"lr": 1e-2, "weight_decay": 0.1, "momentum": "0.9"}


def test_factory_ignores_what_other_trainers_add():
    optimizer = MuonOptimizerFactory()(tiny_llama(), "arguments", lr=0.1, training_args=object())
    assert isinstance(optimizer, Muon)
    with pytest.raises(ValueError, match=r"'momentun'.*'momentum'"):
        MuonOptimizerFactory()(tiny_llama(), lr=0.1, momentun=0.9)


def test_keyword_arguments_are_fresh_for_every_optimizer(tmp_path):
    trainer = trainer_of(tmp_path)
    first = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[1]
    first.clear()
    assert trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)[1]["lr"] == 1e-2


def test_retraining_keeps_the_groups(tmp_path):
    trainer = trained(tmp_path)
    sizes = [len(group["params"]) for group in trainer.optimizer.param_groups]
    trainer.train()
    assert [len(group["params"]) for group in trainer.optimizer.param_groups] == sizes
    assert [g["algorithm"] for g in trainer.optimizer.param_groups] == ["muon", "adamw", "adamw"]


@pytest.mark.parametrize(
    ("optim_args", "message"),
    [
        ("order=prepolar", "order='prepolar'"),
        ("momentun=0.9", "Did you mean 'momentum'"),
        ("adamw_params=(", "regular expression"),
        ("adjust_lr=spectral", "adamw_lr is not set"),
        ("muon_params=nothing_here", "matches no trainable parameter"),
    ],
)
def test_wrong_optim_args_fail_when_the_trainer_is_built(tmp_path, optim_args, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, optim_args=optim_args)


def test_target_modules_choose_matrices(tmp_path):
    trainer = trainer_of(tmp_path, optim_target_modules=["lm_head"])
    optimizer = trainer.create_optimizer()
    assert "lm_head.weight" in optimizer.param_groups[0]["param_names"]
    assert "model.layers.0.mlp.up_proj.weight" in optimizer.param_groups[0]["param_names"]
    with pytest.raises(ValueError, match=r"optim_target_modules=\['nothing'\] matches no"):
        trainer_of(tmp_path, optim_target_modules=["nothing"])


def test_a_frozen_model_is_evaluated_whatever_the_settings(tmp_path):
    model = tiny_llama().requires_grad_(False)
    settings = "lora_update=tangent,lr_multipliers=lora_B:2"
    trainer = trainer_of(tmp_path, model=model, optim_args=settings)
    assert "eval_loss" in trainer.evaluate(tiny_data(2))
    with pytest.raises(ValueError, match="lora_B"):
        trainer.train()
    with pytest.raises(ValueError, match="order='prepolar'"):
        trainer_of(tmp_path, model=model, optim_args="order=prepolar")


def test_target_modules_of_a_compiled_model(tmp_path):
    model = torch.compile(tiny_llama(), backend="eager")
    optimizer = trainer_of(tmp_path, model=model, optim_target_modules=["lm_head"])
    assert "lm_head.weight" in optimizer.create_optimizer().param_groups[0]["param_names"]
