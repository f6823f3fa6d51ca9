"""nanoGPT's benchmark: the model, the windows and the optimizers are what they are said to be."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from transformers import set_seed

from tests.integration.recipes import import_recipe
from tests.reference import nanogpt

recipe = import_recipe("nanogpt_char")
arms, compare, text, training = (recipe[n] for n in ("arms", "compare", "text", "training"))
Plan = sys.modules["study.harness"].Plan
LINES = [f"line {n}: the quick brown fox jumps over {n * n} lazy dogs\n" for n in range(400)]


@pytest.fixture
def corpus(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(LINES))
    return f"file:{path}"


def run_of(name, steps=4, seed=1, **changes):
    """A run at the start of an arm, but for changes of its point."""
    plan = Plan(name, arms.ARMS[name], {"steps": steps, "held_out": 8})
    run = plan.run(plan.start, seed)
    return replace(run, point={**run.point, **changes})


def test_a_single_file_is_cut_as_nanogpt_cuts_it(corpus):
    found = text.load(corpus)
    whole = "".join(LINES)
    cut = int(0.9 * len(whole))
    assert found.characters == "".join(sorted(set(whole)))
    decoded = [
        "".join(found.characters[n] for n in half) for half in (found.train, found.validation)
    ]
    assert decoded == [whole[:cut], whole[cut:]]
    assert found.name.startswith("lines.txt ")
    assert "/" not in found.name  # where a file lies is nothing a record depends on


def test_windows_have_the_characters_that_follow(corpus):
    data = text.load(corpus).validation
    windows = text.side_by_side(data, 64)
    assert len(windows) == (len(data) - 1) // 64
    row = windows[1]
    assert row["input_ids"].tolist() == data[64:128].tolist()
    assert row["labels"].tolist() == row["shift_labels"].tolist() == data[65:129].tolist()
    few = text.side_by_side(data, 64, 3)
    assert [few.starts[0], few.starts[2]] == [windows.starts[0], windows.starts[-1]]
    one, same, other = (text.drawn(data, 50, 64, seed).starts for seed in (1, 1, 2))
    assert one.tolist() == same.tolist() != other.tolist()
    assert min(one) >= 0
    assert max(one) + 64 < len(data)


def test_the_model_is_nanogpts():
    """4 layers of 128 with 65 characters: 0.80 M parameters without biases, as its log says."""
    set_seed(0)
    model = training.model_of(65)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(p.numel() for p in trained.values()) == 804_096
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert all(bool((p == 0).all()) for p in frozen)
    # Deviations of the weights: 0.02, and that over √(2 · layers) where a branch ends.
    for name, deviation in (("attn.c_attn", 0.02), ("mlp.c_proj", 0.02 / math.sqrt(8))):
        weight = trained[f"transformer.h.0.{name}.weight"]
        assert weight.std().item() == pytest.approx(deviation, rel=0.02)
    assert model.lm_head.weight is model.transformer.wte.weight


def test_the_loss_is_that_of_all_characters_of_a_window(corpus):
    set_seed(0)
    data = text.load(corpus)
    model = training.model_of(len(data.characters))
    row = text.side_by_side(data.validation, 64)[0]
    batch = {name: value[None] for name, value in row.items()}
    logits = model(input_ids=batch["input_ids"]).logits[0]  # (64, characters)
    loss = torch.nn.functional.cross_entropy(logits, row["labels"])
    torch.testing.assert_close(model(**batch).loss, loss)
    last = torch.nn.functional.cross_entropy(logits[:-1], row["labels"][:-1])
    assert abs(loss - last) > 1e-4  # the control: without the last character it differs


def named_as_in_nanogpt(model):
    """The trained weights under nanoGPT's names; Conv1D has them transposed."""
    found = {}
    for name, weight in model.transformer.named_parameters():
        if weight.requires_grad:
            short = name.removesuffix(".weight").removeprefix("h.")
            short = short.replace("attn.c_attn", "c_attn").replace("mlp.c_fc", "c_fc")
            is_conv = short.endswith(("c_attn", "c_proj", "c_fc"))
            found[short] = (weight.T if is_conv else weight).detach().clone().requires_grad_()
    return found


def test_the_published_arm_trains_as_nanogpt_does(corpus, monkeypatch):
    """The stock Trainer takes the steps of a loop that is written out, on the same batches."""
    data, models, batches = text.load(corpus), [], []
    collate, build = training.default_data_collator, training.model_of

    def model_of(characters):
        model = build(characters)
        models.extend([model, named_as_in_nanogpt(model), named_as_in_nanogpt(model)])
        return model

    def collated(rows):
        batch = collate(rows)
        if len(rows) == training.BATCH:
            batches.append((batch["input_ids"], batch["labels"]))
        return batch

    monkeypatch.setattr(training, "model_of", model_of)
    monkeypatch.setattr(training, "default_data_collator", collated)
    training.train(data, run_of("adamw_published", steps=20))
    model, reference, other = models
    assert len(batches) == 20
    nanogpt.train(reference, batches)
    trained = named_as_in_nanogpt(model)
    assert trained.keys() == reference.keys()
    # Both round differently, and AdamW divides by √v: 2e-5 are 2 % of one step at the peak, where
    # weights have moved by up to 20 of them. The control: the same batches the other way round.
    assert apart(trained, reference) < 2e-5
    nanogpt.train(other, batches[::-1])
    assert apart(trained, other) > 1e-3


def apart(weights, others):
    return max(float((weights[name] - others[name]).detach().abs().max()) for name in weights)


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_has_three_rates(name):
    model = training.model_of(65)
    run = run_of(name, rate=0.5, embedding_rate=0.25, rest_rate=0.125, weight_decay=0.3)
    optimizer = training.optimizer_of(model, run)
    names = {id(p): n for n, p in model.named_parameters()}
    rates, decays = {}, {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            rates[names[id(parameter)]] = group["lr"]
            decays[names[id(parameter)]] = group["weight_decay"]
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert rates.keys() == trained
    for parameter, rate in rates.items():
        kinds = {"ln_": 0.125, ".wte.": 0.25, ".wpe.": 0.25}
        assert rate == next((at for kind, at in kinds.items() if kind in parameter), 0.5)
        assert decays[parameter] == (0.0 if "ln_" in parameter else 0.3)
    is_adamw = isinstance(optimizer, torch.optim.AdamW)
    assert is_adamw == name.startswith("adamw")


def test_momentum_is_that_of_the_matrices():
    model = training.model_of(65)
    adamw, muon = (
        training.optimizer_of(model, run_of(name, momentum=0.8)) for name in ("adamw", "muon")
    )
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.99)}
    first, *others = muon.param_groups
    assert first["momentum"] == 0.8
    assert {group["betas"] for group in others} == {(0.9, 0.99)}


def test_rates_warm_up_and_fall_to_a_tenth(tmp_path):
    run = run_of("adamw_published", steps=2000)
    args = training.arguments(str(tmp_path), run, 2000)
    args.eval_strategy = "no"
    optimizer = training.optimizer_of(training.model_of(65), run)
    trainer = training.Trainer(model=training.model_of(65), args=args, optimizers=(optimizer, None))
    factor = trainer.create_scheduler(2000, optimizer).lr_lambdas[0]
    assert [factor(0), factor(50), factor(100)] == [0, 0.5, 1]
    halfway = 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 950 / 1900))
    assert factor(1050) == pytest.approx(halfway)
    assert factor(2000) == pytest.approx(0.1)


def test_a_training_is_repeatable_and_seeds_pair_the_arms(corpus):
    data = text.load(corpus)
    found, again = (training.train(data, run_of("muon")) for _ in range(2))
    assert found["loss"] == again["loss"]
    assert len(found["curve"]) == 4
    assert found["loss"] < math.log(len(data.characters))
    frozen = {"rate": 0.0, "embedding_rate": 0.0, "rest_rate": 0.0}
    losses = {
        (name, seed): training.train(data, run_of(name, seed=seed, **frozen))["loss"]
        for name in ("adamw", "muon")
        for seed in (1, 2)
    }
    assert losses["adamw", 1] == losses["muon", 1] != losses["muon", 2]  # the same first weights


@pytest.mark.full
def test_the_quick_study_trains_reports_and_goes_on(corpus, tmp_path, capsys):
    out = ["--out", str(tmp_path / "runs.jsonl"), "--arms", "adamw_published", "muon"]
    options = ["run", "--quick", "--corpus", corpus, "--seeds", "1", "2", *out]
    compare.main(options)
    assert capsys.readouterr().out.count("\n") == 2 + 2 + 2
    compare.main(options)
    assert capsys.readouterr().out == ""
    compare.main(["report", *out, "--budget", "2", "--figure", str(tmp_path / "study.png")])
    *_, published, muon = capsys.readouterr().out.splitlines()
    assert published.startswith("| adamw_published | rate 0.001, ")
    assert "| 2 of at most 2, not settled | " in muon
    assert (tmp_path / "study.png").is_file()


def test_a_run_that_diverges_is_a_loss_that_is_not_there(corpus, monkeypatch):
    def raises(*_, **__):
        raise FloatingPointError("gradients hold NaN")

    monkeypatch.setattr(training.Trainer, "train", raises)
    assert training.train(text.load(corpus), run_of("muon"))["loss"] is None


def test_a_text_that_is_not_there_is_named(tmp_path, capsys):
    with pytest.raises(compare.RecipeError, match=r"there is no file or folder .*gone\.txt"):
        compare.main(["run", "--corpus", "file:gone.txt", "--out", str(tmp_path / "x")])
    with pytest.raises(SystemExit):
        compare.main(["--help"])
    assert "tinyshakespeare/input.txt" in capsys.readouterr().out
