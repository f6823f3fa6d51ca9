"""Kernels of convolutions: AdamW's, or flattened where the user says so."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import (
    ResNetConfig,
    ResNetForImageClassification,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hf_muon import MuonConfig, create_muon_optimizer, route
from hf_muon.commands.cli import app

FLATTEN = MuonConfig(conv="flatten")
EXACT = {"polar_method": "svd", "polar_dtype": "float64"}


def resnet():
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=10
    )
    return ResNetForImageClassification(config)


def vit():
    config = ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        image_size=16, patch_size=4, num_labels=10,
    )  # fmt: skip
    return ViTForImageClassification(config)


def shapes(found):
    return [m.shape for m in found.matrices]


def test_a_resnet_is_trained_by_muon_but_for_its_head():
    with pytest.raises(ValueError, match="conv='flatten' gives it all of them"):
        create_muon_optimizer(resnet(), lr=0.1)
    plan = route(resnet(), FLATTEN)
    assert {r.name for r in plan.muon} == {r.name for r in plan.routes if len(r.shape) == 4}
    assert {r.kind for r in plan.muon} == {"conv"}
    assert {r.kind for r in plan.adamw} == {"vector", "head"}
    found = {r.name: shapes(r) for r in plan.muon}
    assert found["resnet.embedder.embedder.convolution.weight"] == [(8, 3 * 7 * 7)]
    assert found["resnet.encoder.stages.1.layers.0.shortcut.convolution.weight"] == [(16, 8)]


def test_a_patch_embedding_is_a_kernel_as_any_other():
    name = "vit.embeddings.patch_embeddings.projection.weight"
    assert name not in {r.name for r in route(vit()).muon}
    plans = [
        route(vit(), FLATTEN),
        route(vit(), dataclasses.replace(FLATTEN, adamw_params=(name,))),
    ]
    assert [shapes(r) for r in plans[0].muon if r.name == name] == [[(32, 3 * 4 * 4)]]
    assert name not in {r.name for r in plans[1].muon}
    assert plans[0].fingerprint != plans[1].fingerprint == route(vit()).fingerprint


@pytest.mark.parametrize(
    ("layer", "expected", "fan_out"),
    [
        (nn.Conv2d(3, 8, 5), [(8, 75)], 0),
        (nn.Conv2d(6, 8, 1), [(8, 6)], 0),
        (nn.Conv2d(6, 8, (3, 1)), [(8, 18)], 0),
        (nn.Conv1d(4, 6, 3, groups=2), [(3, 6)] * 2, 0),
        (nn.Conv2d(4, 8, 3, groups=4), [(2, 9)] * 4, 0),  # two filters for each channel
        (nn.Conv3d(2, 4, 3), [(4, 54)], 0),
        (nn.ConvTranspose2d(4, 6, 3), [(4, 54)], 1),
        (nn.ConvTranspose1d(4, 6, 3, groups=2), [(2, 9)] * 2, 1),
    ],
)
def test_kernels_are_matrices_of_each_group(layer, expected, fan_out):
    found = route(nn.Sequential(layer, nn.Linear(8, 8)), FLATTEN).routes[0]
    assert (found.algorithm, shapes(found)) == ("muon", expected)
    assert {m.fan_out_dim for m in found.matrices} == {fan_out}


@pytest.mark.parametrize(
    "layer", [nn.Conv2d(8, 8, 3, groups=8), nn.Conv1d(8, 1, 3), nn.ConvTranspose2d(1, 8, 3)]
)
def test_kernels_of_vectors_stay_with_adamw(layer):
    found = route(nn.Sequential(layer, nn.Linear(8, 8)), FLATTEN).routes[0]
    assert (found.algorithm, found.reason) == ("adamw", "conv, a vector for each group")


def test_heads_that_convolve_and_kernels_in_parts_stay_with_adamw():
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16],
        num_attention_heads=[1, 2], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
        decoder_hidden_size=16,
    )  # fmt: skip
    with torch.device("meta"):
        plan = route(SegformerForSemanticSegmentation(config), FLATTEN)
    found = {r.name: r for r in plan.routes}
    assert found["decode_head.classifier.weight"].kind == "head"
    assert {r.reason for r in plan.routes if "dwconv.dwconv.weight" in r.name} == {
        "conv, a vector for each group"
    }
    normed = nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3))
    assert {r.algorithm for r in route(nn.Sequential(normed), FLATTEN).routes} == {"adamw"}


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(3, 8, 3), nn.Conv2d(4, 8, 3, groups=2), nn.ConvTranspose2d(4, 6, 3)],
)
@pytest.mark.parametrize("adjust_lr", ["match_rms_adamw", "spectral"])
def test_the_step_is_that_of_the_flattened_gradient(layer, adjust_lr):
    torch.manual_seed(0)
    model = nn.Sequential(layer).double()
    settings = {"adjust_lr": adjust_lr, "nesterov": False, "adamw_lr": 0.1, **EXACT}
    optimizer = create_muon_optimizer(model, lr=0.1, conv="flatten", **settings)
    before, gradient = layer.weight.detach().clone(), torch.randn_like(layer.weight)
    layer.weight.grad = gradient
    optimizer.step()
    groups = layer.groups
    expected = before.flatten(1).clone()
    for old, flat in zip(expected.chunk(groups), gradient.flatten(1).chunk(groups), strict=True):
        m, n = flat.shape
        if adjust_lr == "spectral":  # from n inputs to m outputs; transposed kernels hold (in, out)
            scale = (n / m if isinstance(layer, nn.ConvTranspose2d) else m / n) ** 0.5
        else:
            scale = 0.2 * max(m, n) ** 0.5
        u, _, vh = torch.linalg.svd(flat, full_matrices=False)
        old -= 0.1 * scale * u @ vh
    # float64 and an SVD on both sides.
    assert (layer.weight.flatten(1) - expected).abs().max() < 1e-12
    assert (layer.weight - before).abs().max() > 1e-3


def test_hf_muon_route_shows_them(tmp_path):
    resnet().config.save_pretrained(tmp_path)
    run = CliRunner().invoke(app, ["route", str(tmp_path), "--auto", "image-classification",
                                   "--optim-args", "conv=flatten"])  # fmt: skip
    assert run.exit_code == 0, run.output
    assert "conv, flattened" in run.output
    assert "1 of 8 × 147" in run.output
