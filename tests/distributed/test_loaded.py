"""A model that transformers cuts for tensor parallelism while loading trains like a whole one."""

import pytest
import torch

from tests.distributed import loaded, training
from tests.distributed.launch import launch


@pytest.mark.full
def test_tensor_parallel_loading_equals_one_process(tmp_path):
    training.tiny_llama().save_pretrained(tmp_path / "model")
    launch("loaded", 2, tmp_path / "model", tmp_path / "out.pt")
    results = torch.load(tmp_path / "out.pt")
    for order in loaded.ORDERS:
        expected = loaded.train(training.tiny_llama(), order)
        assert any("q_proj" in name for name in results[order]["sharded"])
        assert any("down_proj" in name for name in results[order]["sharded"])
        for name, weight in results[order]["weights"].items():
            assert torch.equal(weight, expected[name]), name
