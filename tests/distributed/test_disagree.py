"""Ranks that do not train the same stop together and say what differs, in seconds."""

import pytest
import torch

from tests.distributed.launch import launch

NAMED = {
    "order": r"order of muon group 0: 'pre_polar' on rank 0, 'post_polar' on rank 1",
    "lr": "lr of muon group 0: 0.02 on rank 0, 0.03 on rank 1",
    "weight_decay": "weight_decay of muon group 0: 0.1 on rank 0, 0.2 on rank 1",
    "bucket_mb": "bucket_mb of muon group 0: 'auto' on rank 0, 0.01 on rank 1",
    "distribute": "distribute of muon group 0: 'auto' on rank 0, 'redundant' on rank 1",
    "polar_dtype": "polar_dtype of muon group 0: 'float32' on rank 0, 'bfloat16' on rank 1",
    "matrices": "matrices and owners of muon group 0",
    "parameters": "parameters of muon group 0: 23 on rank 0, 22 on rank 1",
    "more": "parameters of adamw group 1: 2 on rank 0, 3 on rank 1",
    "hardware": "wire dtype of muon group 0: ['float32'] on rank 0, ['bfloat16'] on rank 1",
    "steps": "earlier steps of muon group 0: [0] on rank 0, [1] on rank 1",
    "one rank has more": "lr of muon group 2: None on rank 0, 0.02 on rank 1",
    "copies beside shards": "copies of the model but different gradients, of norm",
    "lr, later": "lr of muon group 0: 0.02 on rank 0, 0.01 on rank 1",
}

# What the second rank alone knows; the first one hears of it.
ALONE = {
    "copies or not": "Several ranks train plain tensors",
    "broken state": "'step' in the state of",
}
FINE = ("one rank compares", "equal copies beside shards")  # controls: both ranks step


@pytest.mark.parametrize("kind", ["ddp", "fsdp", "zero"])
def test_every_rank_says_what_differs_and_nothing_changes(kind, tmp_path):
    launch("disagree", 2, kind, tmp_path / "results.pt", timeout=150)
    results = torch.load(tmp_path / "results.pt")
    for (layout, case), found in results.items():
        if case == "svd, after it":
            assert found == [True]
            continue
        if case in FINE:
            assert [message for message, _, _ in found] == [None, None], (layout, case)
            assert not any(same for _, _, same in found), (layout, case)
            continue
        for message, seconds, same in found:
            assert message is not None, (layout, case)
            assert same, (layout, case)
            assert seconds < 20, (layout, case)
            if case in NAMED:
                assert NAMED[case] in message, (layout, case)
                assert "No parameter and no state was changed" in message
    for (_, case), found in results.items():
        said = [message for message, _, _ in found] if case in ALONE or case == "svd" else []
        if case in ALONE:
            assert "Another rank cannot step" in said[0]
            assert ALONE[case] in said[1]
        if case == "svd":
            assert "could not be mapped on another rank" in said[0]
            assert "LinAlgError" in said[1]
