"""``hf-muon convert``: the stock Trainer goes on with another optimizer, at its step and rate."""

import hashlib
import json
import shutil
import warnings

import pytest
import torch
from typer.testing import CliRunner

import hf_muon.auto  # noqa: F401
from hf_muon.commands.cli import app
from tests.integration.tiny import TINY, tiny_llama, trained, trainer_of

STOP = 3
SETTINGS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": STOP,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
}


def convert(checkpoint, *options):
    return CliRunner().invoke(app, ["convert", str(checkpoint), *map(str, options)])


def went_on(folder, checkpoint, *args, **settings):
    """A Trainer after it went on from a checkpoint, without a warning of the optimizer."""
    trainer = trainer_of(folder, *args, **{**SETTINGS, **settings})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The checkpoint", category=UserWarning)
        trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


def logged(trainer, key="learning_rate"):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def state_of(checkpoint):
    return torch.load(checkpoint / "optimizer.pt", weights_only=True)


@pytest.fixture(scope="module")
def by_adamw(tmp_path_factory):
    """A checkpoint of the Trainer's default optimizer."""
    folder = tmp_path_factory.mktemp("adamw")
    trained(folder, optim="adamw_torch_fused", **SETTINGS)
    return folder / f"checkpoint-{STOP}"


@pytest.fixture(scope="module")
def by_muon(tmp_path_factory):
    """A checkpoint of Muon, and the Trainer that wrote it."""
    folder = tmp_path_factory.mktemp("muon")
    trainer = trained(folder, optim="muon", **SETTINGS)
    return folder / f"checkpoint-{STOP}", trainer


def test_muon_goes_on_where_adamw_stopped(by_adamw, by_muon, tmp_path):
    before = contents(by_adamw)
    done = convert(by_adamw)
    assert done.exit_code == 0, done.output
    target = by_adamw.with_name(f"muon-checkpoint-{STOP}")
    assert f"resume_from_checkpoint='{target}'" in done.output.replace("\n", "")
    assert "14 tensors of matrices begin with AdamW's first moment" in done.output
    assert contents(by_adamw) == before
    assert {n for n, one in contents(target).items() if before[n] != one} == {
        "optimizer.pt",
        "scheduler.pt",
    }

    theirs, ours = state_of(by_adamw)["state"], state_of(target)
    names = [name for group in ours["param_groups"] for name in group["param_names"]]
    decayed = [n for n, _ in tiny_llama().named_parameters() if "norm" not in n]
    for index, name in enumerate(names):
        if name in decayed:  # AdamW's first group has them in the model's order
            given = theirs[decayed.index(name)]
            kept = ours["state"][index]
            assert torch.equal(kept["exp_avg"], given["exp_avg"]), name
            assert kept.get("exp_avg_sq") is None or torch.equal(
                kept["exp_avg_sq"], given["exp_avg_sq"]
            )

    own = logged(by_muon[1])
    trainer = went_on(tmp_path, target)
    assert trainer.state.global_step == 6
    # The checkpoint's next rate is a quotient and a product away from that of the schedule.
    assert logged(trainer) == pytest.approx(own, rel=1e-12)
    assert own[STOP] != own[0]
    assert logged(trainer, "loss")[-1] != logged(by_muon[1], "loss")[-1]


def test_rates_of_the_new_run_follow_the_schedule_of_the_old_one(by_adamw, tmp_path):
    given = "lr=0.02,adamw_lr=0.003,weight_decay=0.2,split_heads=true"
    done = convert(by_adamw, "--optim-args", given, "--out", tmp_path / "new")
    assert done.exit_code == 0, done.output
    settings = {
        "learning_rate": 0.02,
        "weight_decay": 0.2,
        "optim_args": "adamw_lr=0.003,split_heads=true",
    }
    found = went_on(tmp_path / "out", tmp_path / "new", **settings)
    own = trained(tmp_path / "own", **{**SETTINGS, **settings, "save_strategy": "no"})
    for key in ("learning_rate", "adamw/lr"):
        assert logged(found, key)[-STOP:] == pytest.approx(logged(own, key)[STOP:], rel=1e-12)
    with pytest.raises(UserWarning, match=r"lr=0.02 \(not 0.01\)"):
        went_on(tmp_path / "other", tmp_path / "new", optim_args="split_heads=true")


def test_multipliers_are_not_taken_for_the_rate_of_the_run(by_adamw, by_muon, tmp_path):
    factors = r"lr_multipliers=layers\.0:0.5|layers:0.25|embed:0"
    done = convert(by_adamw, "--optim-args", factors, "--out", tmp_path / "muon")
    assert f"learning_rate=0.01, weight_decay=0.1, optim_args={factors!r}" in done.output
    trainer = went_on(tmp_path / "out", tmp_path / "muon", optim_args=factors)
    assert logged(trainer, "adamw/lr")[-STOP:] == pytest.approx(logged(by_muon[1])[STOP:], rel=1e-9)

    def back(*of_adamw):
        copy = copied(by_muon[0], tmp_path / str(len(of_adamw) + 10 * bool(of_adamw[0])))
        state = state_of(copy)
        halves = [g for g in state["param_groups"] if g["algorithm"] == "adamw"]
        for group, factor in zip(halves, of_adamw, strict=False):
            group.update(lr=group["lr"] * factor, initial_lr=group["initial_lr"] * factor)
            group["lr_multiplier"] = factor
        torch.save(state, copy / "optimizer.pt")
        return convert(copy, "--to", "adamw_torch").output

    for given in ([0.3], [0.3, 0.5], [0.0, 0.0]):
        found = back(*given)
        assert "learning_rate=0.01, weight_decay=0.1" in found
        assert "All get one rate: the Trainer's AdamW has no lr_multipliers." in found


def test_adamw_goes_on_where_muon_stopped(by_muon, tmp_path):
    checkpoint, before = by_muon
    done = convert(checkpoint, "--to", "adamw_torch", "--out", tmp_path / "adamw")
    assert done.exit_code == 0, done.output
    assert "14 tensors of matrices begin with moments that follow" in done.output
    assert not (tmp_path / "adamw" / "muon_report.json").exists()
    trainer = went_on(tmp_path / "out", tmp_path / "adamw", optim="adamw_torch")
    assert logged(trainer) == pytest.approx(logged(before), rel=1e-12)
    decay, others = (group["weight_decay"] for group in trainer.optimizer.param_groups)
    assert (decay, others) == (0.1, 0.0)
    counts = {
        name: int(trainer.optimizer.state[p]["step"])
        for name, p in trainer.model.named_parameters()
    }
    # Matrices begin with the three steps of Muon, fewer than its window of twenty.
    assert set(counts.values()) == {6}


def test_what_cannot_be_known_begins_anew(by_adamw, by_muon, tmp_path):
    done = convert(by_adamw, "--optim-args", "order=polar_only", "--out", tmp_path / "muon")
    assert "14 tensors of matrices begin anew" in done.output
    went_on(tmp_path / "out", tmp_path / "muon", optim_args="order=polar_only")
    done = convert(tmp_path / "out" / "checkpoint-6", "--to", "adamw_torch")
    assert "14 tensors of matrices begin anew" in done.output
    state = state_of(tmp_path / "out" / "adamw-checkpoint-6")["state"]
    assert sorted(int(one["step"]) for one in state.values()) == [0] * 14 + [6] * 7
    assert all(one["exp_avg"].any() == (one["step"] > 0) for one in state.values())


def test_there_and_back_the_adamw_half_is_the_same(by_adamw, tmp_path):
    convert(by_adamw, "--out", tmp_path / "muon")
    done = convert(tmp_path / "muon", "--to", "adamw_torch_fused", "--out", tmp_path / "adamw")
    assert done.exit_code == 0, done.output
    first, last = state_of(by_adamw), state_of(tmp_path / "adamw")
    for mine, theirs in zip(first["param_groups"], last["param_groups"], strict=True):
        assert {key: theirs[key] for key in mine} == mine
    same = [
        all(torch.equal(one[key], last["state"][index][key]) for key in one)
        for index, one in first["state"].items()
    ]
    assert same.count(True) == 7
    schedules = [torch.load(f / "scheduler.pt") for f in (by_adamw, tmp_path / "adamw")]
    assert schedules[0] == schedules[1]


def test_tied_embeddings_are_one_parameter(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    settings = {**SETTINGS, "max_steps": STOP}
    trained(tmp_path, model, optim="adamw_torch", **settings)
    done = convert(tmp_path / f"checkpoint-{STOP}")
    assert done.exit_code == 0, done.output
    assert "AdamW's state of 6 others is kept" in done.output
    again = tiny_llama(tie_word_embeddings=True)
    went_on(tmp_path / "out", tmp_path / f"muon-checkpoint-{STOP}", again)


def test_adapters_have_no_adamw_half(tmp_path):
    peft = pytest.importorskip("peft")
    tiny_llama().save_pretrained(tmp_path / "base")

    def adapted():
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        return peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules="all-linear"))

    trained(tmp_path / "a", adapted(), optim="adamw_torch", **SETTINGS)
    done = convert(tmp_path / "a" / f"checkpoint-{STOP}", "--optim-args", "lora_update=tangent")
    assert done.exit_code == 0, done.output
    target = tmp_path / "a" / f"muon-checkpoint-{STOP}"
    trainer = went_on(tmp_path / "b", target, adapted(), optim_args="lora_update=tangent")
    done = convert(
        tmp_path / "b" / "checkpoint-6", "--to", "adamw_torch", "--out", tmp_path / "back"
    )
    assert done.exit_code == 0, done.output
    more = {"max_steps": 8, "optim": "adamw_torch"}
    last = went_on(tmp_path / "c", tmp_path / "back", adapted(), **more)
    assert (trainer.state.global_step, last.state.global_step) == (6, 8)
    assert [len(group["params"]) for group in last.optimizer.param_groups] == [28, 0]


def test_the_base_of_an_adapter_is_named(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=4, target_modules="all-linear"))
    trained(tmp_path / "a", model, optim="adamw_torch", **SETTINGS)
    checkpoint = tmp_path / "a" / f"checkpoint-{STOP}"
    assert "hf-muon convert takes it as --model" in refused(checkpoint)
    tiny_llama().config.save_pretrained(tmp_path / "base")
    done = convert(checkpoint, "--model", tmp_path / "base")
    assert done.exit_code == 0, done.output
    assert "28" in done.output


# --- what is refused ----------------------------------------------------------------------------


def refused(*arguments):
    done = convert(*arguments)
    assert done.exit_code == 2
    return " ".join(done.output.split())


def copied(checkpoint, folder):
    return shutil.copytree(checkpoint, folder / "copy")


def test_what_is_no_checkpoint_is_said(by_adamw, tmp_path):
    assert "is no folder" in refused(tmp_path / "none")
    assert "optimizer.pt' is no folder. It is a file." in refused(by_adamw / "optimizer.pt")
    assert "holds no optimizer.pt: a checkpoint folder" in refused(tmp_path)
    assert "exists already: name another" in refused(by_adamw, "--out", tmp_path)
    assert "is inside the checkpoint" in refused(by_adamw, "--out", by_adamw / "muon")
    assert "Did you mean 'adamw_torch'" in refused(by_adamw, "--to", "adam_torch")
    whole = (by_adamw / "optimizer.pt").read_bytes()
    for name, content in (
        ("optimizer.pt", b"no"),
        ("optimizer.pt", b"\x80\x02."),
        ("optimizer.pt", whole[: len(whole) // 2]),
        ("scheduler.pt", b""),
    ):
        copy = copied(by_adamw, tmp_path / f"{name} {len(content)}")
        (copy / name).write_bytes(content)
        assert f"{name}' cannot be read" in refused(copy)
        torch.save([1], copy / name)
        assert "is damaged" in refused(copy)
    assert not list(tmp_path.glob("**/muon-*"))


def test_the_folder_that_one_stands_in_can_be_converted(by_adamw, tmp_path, monkeypatch):
    monkeypatch.chdir(copied(by_adamw, tmp_path))
    assert convert(".").exit_code == 0
    assert (tmp_path / "muon-copy" / "optimizer.pt").is_file()


def test_models_inside_losses_are_refused(by_adamw, tmp_path):
    # sentence-transformers names parameters by its loss, which a config.json does not know.
    copy = copied(by_adamw, tmp_path)
    (copy / "modules.json").write_text("[]")
    assert "was written by sentence-transformers (modules.json)" in refused(copy)


@pytest.mark.parametrize("name", ["optimizer_0", "optimizer.bin", "global_step3", "latest"])
def test_sharded_checkpoints_are_told_from_damaged_ones(name, tmp_path):
    (tmp_path / name).touch()
    found = refused(tmp_path)
    assert f"was written by FSDP or DeepSpeed ({name})" in found
    assert "KeepSchedule" in found


def test_the_state_of_a_loop_with_accelerate_is_no_checkpoint(tmp_path):
    for name in ("optimizer.bin", "random_states_0.pkl"):
        (tmp_path / name).touch()
    assert "holds no optimizer.pt: a checkpoint folder of the Trainer" in refused(tmp_path)


def group(number=0, **values):
    return lambda state: state["param_groups"][number].update(values)


def buffer(key, change):
    return lambda state: state["state"][0].update({key: change(state["state"][0][key])})


NONE = "is damaged: it holds no state dict"
NAN = "holds NaN or infinity"
DAMAGES = {
    "lists for numbers": ("adamw", group(params=[[1]] * 16), NONE),
    "a parameter twice": ("adamw", group(params=[0] * 16), NONE),
    "a list for a state": ("adamw", lambda state: state["state"].update({0: [1]}), NONE),
    "NaN": ("adamw", buffer("exp_avg", lambda m: m / 0), NAN),
    "integers": ("adamw", buffer("exp_avg", lambda m: m.long()), "tensor of torch.int64"),
    "two counts": ("adamw", buffer("step", lambda t: t.expand(2)), "a number ≥ 0 is expected"),
    "NaN of Muon": ("muon", buffer("exp_avg", lambda m: m / 0), NAN),
    "no momentum": ("muon", lambda state: state["state"][0].pop("exp_avg"), "has no 'exp_avg'"),
    "too few names": ("muon", group(param_names=["one"]), NONE),
    "no β": ("muon", group(momentum="x"), "momentum='x': a number"),
    "a β of one": ("muon", group(momentum=1.0), "momentum=1.0 is out of range"),
    "no algorithm": (
        "muon",
        lambda state: state["param_groups"][0].pop("algorithm"),
        "or of Muon are expected",
    ),
    "an unknown one": ("muon", group(algorithm="x"), NONE),
}


@pytest.mark.parametrize(("of", "damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_and_divergent_state_is_refused(of, damage, message, by_adamw, by_muon, tmp_path):
    copy = copied(by_adamw if of == "adamw" else by_muon[0], tmp_path)
    state = state_of(copy)
    damage(state)
    torch.save(state, copy / "optimizer.pt")
    assert message in refused(copy, "--to", "muon" if of == "adamw" else "adamw_torch")


@pytest.mark.parametrize("rates", [["a", "b"], 0.1, None])
def test_a_schedule_without_rates_is_refused(rates, by_adamw, tmp_path):
    copy = copied(by_adamw, tmp_path)
    schedule = torch.load(copy / "scheduler.pt")
    torch.save({**schedule, "base_lrs": rates}, copy / "scheduler.pt")
    assert "does not hold a schedule that multiplies" in refused(copy)


def test_what_need_not_or_cannot_be_converted_is_said(by_adamw, by_muon, tmp_path):
    checkpoint, _ = by_muon
    assert "is AdamW's already: nothing" in refused(by_adamw, "--to", "adamw_torch")
    assert "is Muon's already: nothing" in refused(checkpoint, "--out", tmp_path / "x")
    other = {**TINY, "model_type": "llama", "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(other))
    found = refused(by_adamw, "--model", tmp_path, "--out", tmp_path / "x")
    assert "the checkpoint is of another model. Name its own with --model." in found
    deeper = {**other, "num_hidden_layers": 3}
    (tmp_path / "config.json").write_text(json.dumps(deeper))
    found = refused(by_adamw, "--model", tmp_path, "--out", tmp_path / "x")
    assert "The optimizer's groups have [16, 5] parameters" in found
    found = refused(checkpoint, "--to", "adamw_torch", "--model", tmp_path, "--out", "x")
    assert "do not train the same parameters: model.layers.2." in found


def test_other_optimizers_are_refused(by_adamw, tmp_path):
    copy = copied(by_adamw, tmp_path)
    optimizer = torch.optim.SGD([torch.ones(1)], lr=0.1, momentum=0.9)
    torch.save(optimizer.state_dict(), copy / "optimizer.pt")
    assert "those of AdamW, with betas and eps, or of Muon are expected" in refused(copy)
    for groups in ([], [1], {"params": []}):
        torch.save({"state": {}, "param_groups": groups}, copy / "optimizer.pt")
        assert "is damaged: it holds no state dict" in refused(copy)


def test_rates_of_another_scale_are_asked_for(by_muon, tmp_path):
    copy = copied(by_muon[0], tmp_path)
    state = state_of(copy)
    state["param_groups"] = [{**state["param_groups"][0], "adjust_lr": "original"}]
    torch.save(state, copy / "optimizer.pt")
    found = refused(copy, "--to", "adamw_torch")
    assert 'give --optim-args "lr=3e-4"' in found
