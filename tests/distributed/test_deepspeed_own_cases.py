"""What DeepSpeed's own tests ask of its Muon holds for ours, through DeepSpeed, on two ranks.

Not here: tensor parallelism by AutoTP, which is refused, and `optimizer` sections, which bypass
ours (tests/integration/test_deepspeed_config.py); stage 0 in bfloat16 (test_zero_bfloat16.py);
offload (test_trainer_launches.py, test_training.py); which weights have heads
(tests/unit/routing/test_split_heads.py); a CPU against a GPU (tests/gpu).
"""

import pytest
import torch

from tests.distributed import deepspeed_cases as cases
from tests.distributed import training
from tests.distributed.launch import launch
from tests.integration.tiny import largest_difference

MATRICES = 7 * cases.LAYERS
# Of queries, keys and values one matrix for each head; the output projection is not split.
PER_HEAD = cases.LAYERS * (cases.HEADS + 2 * cases.KEY_VALUE_HEADS + 1 + 3)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    out = tmp_path_factory.mktemp("cases") / "results.pt"
    launch("deepspeed_cases", 2, out, timeout=280)
    return torch.load(out)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("stage", cases.STAGES)
def test_half_precision_goes_on_from_a_checkpoint_with_its_momentum(results, stage, dtype):
    found = results["resumed", stage, dtype]
    assert found["kept"]
    assert largest_difference(found["resumed"], found["straight"]) == 0


@pytest.mark.parametrize("stage", cases.STAGES)
def test_a_step_that_the_loss_scaler_discards_leaves_momentum_as_it_was(results, stage):
    found = results["overflow", stage]
    assert {True, False} == {discarded for discarded, _ in found["kept"]}
    assert all(discarded == is_same for discarded, is_same in found["kept"])
    assert found["finite"]
    assert found["losses"][-1] < found["losses"][0] - 1
    for name, before in found["before"].items():
        assert not torch.equal(found["after"][name], before), name


@pytest.mark.parametrize("stage", cases.STAGES)
def test_heads_are_orthogonalized_one_by_one_where_asked_for(results, stage):
    whole, per_head = results["whole", stage], results["per head", stage]
    assert (whole["a step"], per_head["a step"]) == (MATRICES, PER_HEAD)
    for found in (whole, per_head):
        assert found["losses"][-1] < found["losses"][0] - 1
    assert largest_difference(whole["weights"], per_head["weights"]) > 1e-3


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_matrices_are_orthogonalized_where_nothing_wraps_the_optimizer(results, dtype):
    found = results["stage 0", dtype]
    assert found["a step"] == MATRICES
    assert found["losses"][1] < found["losses"][0]


def test_bfloat16_with_gradients_in_float32_trains(results):
    found = results["accumulated"]
    assert found["a step"] == MATRICES
    assert found["losses"][-1] < found["losses"][0] - 1


@pytest.mark.parametrize("part", cases.PARTS)
def test_part_of_a_model_is_trained_and_the_rest_is_not(results, part):
    found, trains = results["part", part], cases.PARTS[part]
    names = {name for name, _ in training.tiny_llama().named_parameters()}
    assert found["moved"] == {name for name in names if trains(name)}
    assert found["losses"][-1] < found["losses"][0]


def test_a_model_of_which_only_the_embeddings_are_trained_is_refused(results):
    # DeepSpeed's trains them by AdamW.
    assert "Nothing to train with Muon: all 7 trainable parameters" in results["refused"]
