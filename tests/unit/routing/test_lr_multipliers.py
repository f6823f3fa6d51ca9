"""Rates by pattern: what matches, in which groups, and that schedules and checkpoints keep them."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from typer.testing import CliRunner
from zoo import ZOO

import hf_muon.auto  # noqa: F401
from hf_muon import MuonConfig, create_muon_optimizer, route
from hf_muon.commands.cli import app
from hf_muon.integrations.deepspeed import check_config
from hf_muon.integrations.report import build_report, find_muon
from tests.integration.tiny import tiny_llama, trainer_of

ARGS = r"lr_multipliers=embed_tokens:0.5|layers\.0\.:0.1|layers:2"


def rates(optimizer, key="lr"):
    return {name: group[key] for group in optimizer.param_groups for name in group["param_names"]}


def expected(name, base, adamw_base):
    adamw = any(word in name for word in ("embed", "head", "norm"))
    factor = 0.5 if "embed" in name else 0.1 if "layers.0" in name else 2 if "layers" in name else 1
    return (adamw_base if adamw else base) * factor


def test_both_halves_are_scaled_and_the_first_pattern_counts():
    config = MuonConfig.from_optim_args(f"{ARGS},adamw_lr=0.01", lr=0.1)
    optimizer = create_muon_optimizer(tiny_llama(), config)
    found = rates(optimizer)
    assert found == {name: expected(name, 0.1, 0.01) for name in found}
    assert len(set(found.values())) == 6
    assert optimizer.param_groups[0]["algorithm"] == "muon"
    halves = [group["algorithm"] for group in optimizer.param_groups]
    assert halves == sorted(halves, reverse=True)


def test_the_rate_of_the_run_comes_first_in_each_half():
    # The Trainer logs that of the first group, and we that of the first of AdamW.
    optimizer = create_muon_optimizer(
        tiny_llama(), lr=0.1, lr_multipliers={"q_proj": 0.5, "embed": 0.5, r"layers\.1\.input": 3}
    )
    first = {g["algorithm"]: g["lr"] for g in reversed(optimizer.param_groups)}
    assert first == {"muon": 0.1, "adamw": 0.1}


def test_without_patterns_nothing_is_split_or_said():
    groups = create_muon_optimizer(tiny_llama(), lr=0.1).param_groups
    assert len(groups) == 3
    assert not any("lr_multiplier" in group for group in groups)
    assert "rate" not in route(tiny_llama()).table().splitlines()[1].split()


def test_the_rule_is_that_of_a_group_with_the_scaled_rate():
    models = [tiny_llama(), tiny_llama()]
    names = [r.name for r in route(models[0]).routes]
    apart = [n for n in names if "layers.1" in n]
    by_hand = [
        {"params": [p for n, p in models[1].named_parameters() if (n in apart) == which], "lr": lr}
        for which, lr in ((True, 0.1 * 0.25), (False, 0.1))
    ]
    optimizers = [
        create_muon_optimizer(models[0], lr=0.1, lr_multipliers=(r"layers\.1\.:0.25",)),
        create_muon_optimizer(models[1], lr=0.1, groups=by_hand),
    ]
    for step in range(2):
        for model, optimizer in zip(models, optimizers, strict=True):
            torch.manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            optimizer.step()
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name
    different = create_muon_optimizer(tiny_llama(), lr=0.1)
    assert rates(different) != rates(optimizers[0])


def test_schedules_keep_the_ratios():
    optimizer = create_muon_optimizer(tiny_llama(), lr=0.1, lr_multipliers=(r"layers\.0\.:0.1",))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    for _ in range(4):
        optimizer.step()
        schedule.step()
    found = rates(optimizer)
    high, low = found["lm_head.weight"], found["model.layers.0.mlp.up_proj.weight"]
    assert low / high == pytest.approx(0.1, rel=1e-12)
    assert high < 0.1


def test_groups_of_a_clients_own_are_scaled_too():
    model = tiny_llama()
    groups = [{"params": list(model.parameters()), "lr": 0.4}]
    settings = MuonConfig(lr=0.1, lr_multipliers=("up_proj:0.5",))
    found = rates(create_muon_optimizer(model, settings, groups=groups))
    assert {found[n] for n in found if "up_proj" in n} == {0.2}
    assert {found[n] for n in found if "up_proj" not in n} == {0.4}


@pytest.mark.parametrize("momentum", [0.5, (0.9, 0.98), "auto"])
def test_momentum_of_a_mixed_group_is_muons(momentum):
    model = tiny_llama()
    groups = [{"params": list(model.parameters()), "momentum": momentum}]
    muon, *_, adamw = create_muon_optimizer(model, lr=0.1, groups=groups).param_groups
    assert muon["momentum"] == momentum
    assert adamw["betas"] == (0.9, 0.999)
    assert "momentum" not in adamw


def test_momentum_of_a_group_without_matrices_is_adamws():
    model = tiny_llama()
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1]}]
    groups.append({"params": vectors, "momentum": 0.5})
    optimizer = create_muon_optimizer(model, lr=0.1, groups=groups)
    assert optimizer.param_groups[-1]["momentum"] == 0.5


def test_a_group_whose_algorithm_is_not_that_of_its_routes_is_refused():
    model = tiny_llama()
    groups = [{"params": list(model.parameters()), "algorithm": "adamw"}]
    with pytest.raises(ValueError, match=r"algorithm='adamw', and the routes send model\.layers"):
        create_muon_optimizer(model, lr=0.1, groups=groups)


def test_groups_of_an_earlier_optimizer_are_taken_with_their_rates():
    model, settings = tiny_llama(), MuonConfig(lr=0.1, lr_multipliers=("q_proj:0.5", "embed:0"))
    groups = create_muon_optimizer(model, settings).param_groups
    again = create_muon_optimizer(model, settings, groups=groups).param_groups
    for key in ("algorithm", "lr", "weight_decay", "momentum", "betas"):
        assert [group.get(key) for group in again] == [group.get(key) for group in groups]
    without = create_muon_optimizer(model, lr=0.1, groups=groups).param_groups
    assert {group["lr"] for group in without} == {0.1}


def test_a_run_is_described_by_the_rate_without_factors(tmp_path):
    patterns = r"lr_multipliers=embed_tokens:0|layers\.0\.:0.1|layers:0.5|lm_head:0.2|norm:0.2"
    trainer = trainer_of(
        tmp_path, optim="muon", optim_args=f"{patterns},adamw_lr=0.02", learning_rate=0.01,
        max_steps=2, logging_steps=1, lr_scheduler_type="linear",
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "learning_rate" in entry]
    for name, rate in (("learning_rate", 0.01), ("adamw/lr", 0.02)):
        assert [entry[name] for entry in logs] == pytest.approx([rate, rate / 2], rel=1e-12)
    optimizer = find_muon(trainer.optimizer)
    groups = optimizer.param_groups
    assert {group["lr_multiplier"] for group in groups} == {0, 0.1, 0.2, 0.5}  # none has no factor
    text = build_report(optimizer)["optimizer"]
    assert "lr=0.01, " in text
    assert "lr=0.02 for all other" in text


def test_decay_by_layer_is_a_mapping():
    factors = {rf"layers\.{n}\.": 0.9 ** (1 - n) for n in range(2)}
    config = MuonConfig(lr=0.1, lr_multipliers={**factors, "embed_tokens": 0.9**2})
    assert config.lr_factors == {**factors, "embed_tokens": 0.9**2}
    assert MuonConfig(**config.to_dict()) == config
    found = rates(create_muon_optimizer(tiny_llama(), config))
    assert found["model.layers.0.mlp.up_proj.weight"] == 0.1 * 0.9
    assert found["model.embed_tokens.weight"] == 0.1 * 0.9**2


def test_a_json_file_may_hold_an_object(tmp_path):
    path = tmp_path / "muon.json"
    path.write_text(json.dumps({"lr_multipliers": {"(?:embed|norm)": 0.5}}))
    assert MuonConfig.from_json(path).lr_factors == {"(?:embed|norm)": 0.5}
    assert MuonConfig.from_optim_args(f"config={path}") == MuonConfig.from_json(path)


REFUSED = {
    "no factor": ("embed", "lr_multipliers holds 'embed', where PATTERN:FACTOR is expected"),
    "no pattern": (":0.5", "PATTERN:FACTOR is expected"),
    "a word": ("embed:fast", "PATTERN:FACTOR is expected"),
    "negative": ("embed:-1", "'embed:-1', which is out of range: 0 ≤ factor"),
    "infinite": ("embed:1e999", "out of range"),
    "no regex": ("(:1", r"lr_multipliers holds '\(', which is not a regular expression"),
    "twice": ("a:1|a:2", "lr_multipliers gives 'a' twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_factor_is_refused(case):
    text, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        MuonConfig.from_optim_args(f"lr_multipliers={text}")


def test_patterns_without_effect_are_errors():
    model = tiny_llama()
    with pytest.raises(ValueError, match=r"lr_multipliers holds 'embed_token\$'.*Did you mean"):
        route(model, MuonConfig(lr_multipliers=("embed_token$:0.1",)))
    model.model.embed_tokens.requires_grad_(False)
    with pytest.raises(ValueError, match=r"parameter\. model.embed_tokens.weight is frozen"):
        route(model, MuonConfig(lr_multipliers=("embed_tokens:0.1",)))
    with pytest.raises(ValueError, match=r"'q_proj', and patterns before it match every"):
        route(model, MuonConfig(lr_multipliers=("_proj:0.1", "q_proj:0.5")))
    with pytest.raises(ValueError, match=r"lm_head.weight is tied"):
        route(ZOO["gpt2"].build(), MuonConfig(lr_multipliers=("lm_head:0.5",)))


def adapted():
    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))


def test_factors_of_adapters():
    found = rates(create_muon_optimizer(adapted(), lr=0.1, lr_multipliers=("lora_B:16",)))
    assert {rate for name, rate in found.items() if "lora_B" in name} == {1.6}
    assert {rate for name, rate in found.items() if "lora_A" in name} == {0.1}
    both = MuonConfig(lr=0.1, lora_update="product", lr_multipliers=(r"layers\.0:0.5",))
    assert set(rates(create_muon_optimizer(adapted(), both)).values()) == {0.1, 0.05}
    with pytest.raises(ValueError, match=r"lora_A.* the factor 1 and .*lora_B.* 16, and lora_up"):
        route(adapted(), dataclasses.replace(both, lr_multipliers=("lora_B:16",)))


def trained(**settings):
    model = tiny_llama()
    optimizer = create_muon_optimizer(model, lr=0.1, **settings)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


def test_checkpoints_know_the_factors():
    slow = {"lr_multipliers": ("layers:0.5",)}
    saved = trained(**slow).state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = trained(**slow)
        again.load_state_dict(saved)
    assert rates(again)["model.layers.0.mlp.up_proj.weight"] == 0.05
    other = trained(lr_multipliers=("layers:0.25",))
    with pytest.warns(UserWarning, match=r"lr=0\.05 \(not 0\.025\), lr_multiplier=0\.5"):
        other.load_state_dict(saved)
    assert rates(other) == rates(again)
    with pytest.raises(ValueError, match="the same settings, lr_multipliers among them"):
        trained(lr_multipliers=("mlp:0.5",)).load_state_dict(saved)


def test_the_report_and_the_table_say_them(tmp_path):
    report = build_report(trained(lr_multipliers=("layers:0.5", "embed:3")))
    assert report["config"]["lr_multipliers"] == ("layers:0.5", "embed:3")
    assert report["optimizer"].endswith("; rates times 0.5, 3 for what lr_multipliers names")
    assert {group.get("lr_multiplier", 1) for group in report["groups"]} == {1, 0.5, 3}
    of_routes = {r["name"]: r["lr_multiplier"] for r in report["routing"]["routes"]}
    assert of_routes["model.embed_tokens.weight"] == 3
    tiny_llama().config.save_pretrained(tmp_path)
    run = CliRunner().invoke(app, ["route", str(tmp_path), "--optim-args", ARGS])
    assert run.exit_code == 0, run.output
    assert "rate" in run.output.splitlines()[1]
    row = next(line for line in run.output.splitlines() if "layers.0.mlp.up_proj" in line)
    assert "× 0.1" in row


def test_schedules_of_deepspeed_that_write_rates_are_refused():
    config = {"scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(ValueError, match=r"WarmupLR .*lr_multipliers=\('a:2',\) would be lost"):
        check_config(config, MuonConfig(lr=0.1, lr_multipliers=("a:2",)))
    check_config(config, MuonConfig(lr=0.1))
