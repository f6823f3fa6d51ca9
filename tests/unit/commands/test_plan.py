"""``hf-muon plan`` prints what a step costs each rank, from a config alone."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from typer.testing import CliRunner

from hf_muon import Muon
from hf_muon.commands.cli import app
from hf_muon.commands.counted import counting
from hf_muon.commands.hardware import Links, device_of, links_of
from hf_muon.commands.imaginary import World
from hf_muon.commands.plan import forecast
from hf_muon.config import MuonConfig
from hf_muon.polar import precision
from scripts import scaling_table
from scripts.scaling_table import Llama

SHAPE = Llama(hidden=32, inner=48, layers=2, keys=16)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    values = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    path.write_text(json.dumps(values))
    return path


@pytest.mark.parametrize(
    ("optim_args", "of_fsdp2", "of_ddp"),
    [
        ("", 0, 0),
        ("momentum=0.9:0.98", 0, 0),
        ("momentum=auto", 1, 0),
        ("prefilter=clip,step_rule=hyperball", 2, 0),
        ("rescale=rows", 1, 1),  # owners measure the whole, and say so to all
        ("rescale=rows,order=post_polar", 1, 0),
        ("rescale=entries,momentum_dtype=int8", 2, 0),
    ],
)
def test_sums_over_matrices_are_named(config, optim_args, of_fsdp2, of_ddp):
    for layout, sums in (("fsdp2", of_fsdp2), ("ddp", of_ddp)):
        asked = (config, "--ranks", 2, "--layout", layout, "--optim-args", optim_args)
        text = run(*asked).output
        assert (f"Not counted: {sums} small all-reduces" in text) is (sums > 0)
        assert json.loads(run(*asked, "--json").output)["all_reduces_per_bucket"] == sums


@pytest.mark.parametrize("optim_args", ["polar_method=svd", "matrix_map=soft"])
def test_an_svd_is_not_passed_off_as_an_iteration(config, optim_args):
    said = "an SVD takes their place"
    assert said in run(config, "--ranks", 2, "--optim-args", optim_args).output
    assert said not in run(config, "--ranks", 2).output


def run(*arguments: object):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def facts(*arguments: object):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_a_routed_model_costs_what_its_shapes_say(config):
    found = facts(config, "--ranks", 4, "--layout", "hsdp", "--replicas", 2)
    expected = forecast([SHAPE.parameters()], MuonConfig(), World("hsdp", 4, replicas=2))
    found.pop("roofline")
    assert found == expected.to_dict(tflops=400.0, links=Links(50.0, 50.0))
    assert found["matrices"] == 14
    assert [one["rank"] for one in found["per_rank"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero1", "zero2", "zero3"])
def test_every_layout_shares_out_all_matrices(config, layout):
    found = facts(config, "--ranks", 2, "--layout", layout, "--optim-args", "distribute=owner")
    assert sum(one["matrices"] for one in found["per_rank"]) == 14
    assert (
        sum(one["newton_schulz_flops"] for one in found["per_rank"])
        == (found["newton_schulz_flops"])
    )


def test_settings_and_rates_reach_the_plan(config):
    base = facts(config, "--ranks", 2)
    assert base["wire_dtype"] == "bfloat16"
    wide = facts(config, "--ranks", 2, "--optim-args", "polar_dtype=float32,polar_steps=4")
    for here, there in zip(base["per_rank"], wide["per_rank"], strict=True):
        assert there["bytes_sent"] == 2 * here["bytes_sent"]
        assert 5 * there["newton_schulz_flops"] == 4 * here["newton_schulz_flops"]
    fast = facts(config, "--ranks", 2, "--tflops", 800, "--gbps", 25)
    assert fast["polar_ms"] == pytest.approx(base["polar_ms"] / 2)
    assert fast["wire_ms"] == pytest.approx(base["wire_ms"] * 2)
    buckets = facts(config, "--ranks", 2, "--optim-args", "bucket_mb=0.001")
    assert buckets["per_rank"][0]["collectives"] > base["per_rank"][0]["collectives"] == 2


def test_inputs_travel_in_float32_and_factors_computed_in_float16_in_half_of_that(config):
    def planned(dtype):
        settings = f"polar_dtype={dtype},distribute=owner"
        placed = ("--layout", "hsdp", "--replicas", 2)
        return facts(config, "--ranks", 4, *placed, "--optim-args", settings)

    wide, narrow = planned("float32"), planned("float16")
    assert (narrow["wire_dtype"], narrow["returned_dtype"]) == ("float32", "float16")
    for key, share in (("all_to_all_bytes", 3 / 4), ("all_gather_bytes", 1 / 2)):
        here, there = (sum(one[key] for one in of["per_rank"]) for of in (narrow, wide))
        assert here == share * there > 0
    said = run(config, "--ranks", 4, "--optim-args", "polar_dtype=float16").output
    assert "float32 on the wire, float16 on the way back" in " ".join(said.split())


@pytest.mark.parametrize(("native", "shared"), [(True, 14), (False, 18)])
def test_copies_share_the_work_where_that_pays(config, monkeypatch, native, shared):
    """Matrices of width 32 are computed faster than they are sent, by GPUs and by most CPUs.

    A CPU without instructions for bfloat16 sends twice the bytes: the four 16 × 32 matrices of the
    keys and values are then computed by both ranks.
    """
    monkeypatch.setattr(precision, "has_native_bfloat16", lambda *device: native)
    on = {device: facts(config, "--ranks", 2, "--layout", "ddp", "--device", device)
          for device in ("cuda", "cpu")}  # fmt: skip
    assert [one["bytes_sent"] for one in on["cuda"]["per_rank"]] == [0, 0]
    assert [one["matrices"] for one in on["cuda"]["per_rank"]] == [14, 14]
    assert on["cuda"]["wire_dtype"] == "bfloat16"
    assert on["cpu"]["wire_dtype"] == ("bfloat16" if native else "float32")
    assert sum(one["matrices"] for one in on["cpu"]["per_rank"]) == shared


def test_ranks_with_the_same_numbers_share_a_line_unless_asked(config):
    folded, full = (run(config, "--ranks", 16, *more) for more in ((), ("--full",)))
    assert "14-15" in folded.output  # the idle ones
    assert "2 idle ranks" in folded.output
    assert len(full.output.splitlines()) == len(folded.output.splitlines()) + 16 - 4


ERRORS = {
    "unknown layout": (
        ["--layout", "fsdp"],
        "'fsdp2', 'hsdp', 'zero1', 'zero2', 'zero3'. Did you mean 'fsdp2'?",
    ),
    "no ranks": (["--ranks", "0"], "ranks=0"),
    "replicas of nothing": (["--replicas", "2"], "only for hsdp"),
    "rate": (["--gbps", "-1"], "gbps=-1.0"),
    "unknown setting": (["--optim-args", "bucket=1"], "Did you mean 'bucket_mb'?"),
    "bad suggestion": (["--optim-args", "lr_group=1"], "Unknown setting: 'lr_group'. Allowed"),
    "dtype of no use on a CPU": (
        ["--device", "cpu", "--optim-args", "polar_dtype=float16"],
        "polar_dtype (dtype of polar_factor) is float16 on a CPU",
    ),
    "unknown device": (
        ["--device", "tpu"],
        "device='tpu' is not one of 'h100', 'h200', 'b200', 'a100', 'l40s', 'l4', '4090'",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments_are_one_sentence(config, case):
    arguments, message = ERRORS[case]
    result = run(config, "--ranks", 4, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_nothing_for_muon_fails(config):
    result = run(config, "--ranks", 2, "--optim-args", "adamw_params=.")
    assert result.exit_code == 1
    assert "Nothing to train with Muon" in result.stderr


def test_the_share_of_a_training_step_is_that_of_its_parts(capsys, monkeypatch):
    command = "scaling_table.py --models 130M --ranks 8 64 --tokens-per-rank 1000 --tflops 100"
    monkeypatch.setattr(sys, "argv", command.split())
    scaling_table.main()
    head, _, *rows = capsys.readouterr().out.splitlines()
    names = [name.strip() for name in head.strip("|").split("|")]
    for line in rows:
        cells = dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        step, polar, wire = (
            float(cells[f"{part} ms"]) for part in ("training step", "polar factors", "messages")
        )
        weights = 12 * (4 * 768**2 + 3 * 768 * 2048)
        assert step == pytest.approx(6 * weights * 1000 / 100e9, rel=5e-3)  # three digits are shown
        shown = [float(cells[name].rstrip("%")) for name in ("overhead, overlapped", "in turn")]
        expected = [100 * max(polar, wire) / step, 100 * (polar + wire) / step]
        assert shown == pytest.approx(expected, rel=1e-2)
        # 84 matrices are too few for 64 ranks to share them evenly.
        assert wire < polar
        assert cells["bound by"] == {"8": "polar factors", "64": "one matrix"}[cells["ranks"]]


# --- what a device is asked to do ----------------------------------------------------------------


def test_one_rank_is_counted_from_the_step_itself(config):
    asked = facts(config, "--ranks", 1, "--device", "h100")["roofline"]
    with torch.device("meta"):
        matrices = [torch.nn.Parameter(torch.empty(p.shape)) for p in SHAPE.parameters()]
    for matrix in matrices:
        matrix.grad = torch.empty_like(matrix)
    optimizer = Muon(matrices, lr=1e-3, polar_dtype="bfloat16", polar_kernel="triton")
    with counting():
        optimizer.step()
    with counting() as counts:
        optimizer.step()
    names = ("operations", "launches", "host_waits", "flops", "bytes_touched")
    assert [asked[name] for name in names] == [
        counts.operations, counts.launches, counts.waits, counts.flop, counts.nbytes
    ]  # fmt: skip
    assert asked["peak_temporary_bytes"] == counts.peak > 0
    assert asked["held_bytes"] == 3 * sum(matrix.nbytes for matrix in matrices)


def test_settings_and_rates_reach_the_roofline(config):
    def asked(*arguments, ranks=1):
        return facts(config, "--ranks", ranks, *arguments)["roofline"]

    base = asked("--device", "a100")
    cautious = asked(
        "--device", "a100", "--optim-args", "cautious_weight_decay=true,weight_decay=0.1"
    )
    assert cautious["launches"] > base["launches"]
    assert cautious["flops"] == base["flops"]
    averages = asked("--device", "a100", "--optim-args", "rescale=entries")
    assert averages["held_bytes"] > base["held_bytes"]
    # Small products wait for memory; 10⁹ times slower ones for arithmetic.
    slow = asked("--device", "a100", "--tflops", 1e-9 * 312)
    assert slow["products_ms"] == pytest.approx(1e9 / 312e12 * base["flops"] * 1e3, rel=1e-2)
    assert slow["elementwise_ms"] == base["elementwise_ms"]
    b200 = asked("--device", "b200")
    assert b200["device_ms"] / base["device_ms"] == pytest.approx(2.039 / 7.7)
    assert "roofline" not in facts(config, "--ranks", 2, "--device", "cpu")


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero3"])
def test_ranks_share_the_work_of_one(config, layout):
    owners = ("--optim-args", "distribute=owner")
    alone, shared = (
        facts(config, "--ranks", ranks, "--layout", layout, *owners) for ranks in (1, 2)
    )
    one, two = alone["roofline"], shared["roofline"]
    assert two["peak_temporary_bytes"] is None
    # In lockstep a rank has half of the products, and no less.
    assert 0.5 * one["flops"] <= two["flops"] < 0.75 * one["flops"]
    everything = facts(
        config, "--ranks", 2, "--layout", layout, "--optim-args", "distribute=redundant"
    )
    if layout == "ddp":
        assert everything["roofline"]["flops"] == one["flops"]
        assert two["held_bytes"] == one["held_bytes"]
    else:
        assert two["held_bytes"] == one["held_bytes"] / 2


@pytest.mark.parametrize(
    "optim_args",
    ["polar_method=svd", "matrix_map=soft", "matrix_map=polargrad", "order=post_polar",
     "momentum_dtype=int8", "prefilter=clip", "step_rule=hyperball", "momentum=auto"],
)  # fmt: skip
def test_every_rule_can_be_counted(config, optim_args):
    for ranks in (1, 2):
        asked = facts(config, "--ranks", ranks, "--optim-args", optim_args)["roofline"]
        assert asked["launches"] > 0


def test_the_plan_says_what_a_device_is_asked(config):
    alone = run(config, "--ranks", 1, "--device", "h100").output
    assert "A step on H100 SXM: " in alone
    assert "of 80 GB, temporaries at most" in alone
    shared = run(config, "--ranks", 2, "--device", "h100").output
    assert "A step of the busiest rank on H100 SXM: " in shared
    assert "temporaries" not in shared
    assert "launches" not in run(config, "--ranks", 2, "--device", "cpu").output


def test_messages_inside_a_node_are_faster(config):
    def wire(*arguments):
        found = facts(config, "--ranks", 16, "--optim-args", "distribute=owner", *arguments)
        return [one["wire_ms"] for one in found["per_rank"]]

    slow, fast = wire("--gbps", 50), wire("--gbps", 400)
    mixed = wire("--nvlink-gbps", 400, "--ib-gbps", 50)
    for least, between, most in zip(fast, mixed, slow, strict=True):
        # Of 15 peers 7 are on the same node.
        assert between == pytest.approx(7 / 15 * least + 8 / 15 * most)
    one_node = wire("--nvlink-gbps", 400, "--ib-gbps", 50, "--ranks-per-node", 16)
    assert one_node == pytest.approx(fast)


def test_links_follow_the_device_unless_they_are_given():
    h100 = device_of("h100")
    assert links_of(h100) == Links(360.0, 40.0, 8)
    assert links_of(device_of("4090")) == Links(25.6, 25.6, 8)  # no faster than its slot
    assert links_of(h100, nvlink_gbps=300, ranks_per_node=4) == Links(300, 40.0, 4)
    assert links_of(device_of("cuda")) == Links(50.0, 50.0, 8)
    with pytest.raises(ValueError, match="gbps, ib_gbps are given together"):
        links_of(h100, gbps=50, ib_gbps=40)
    with pytest.raises(ValueError, match="ranks_per_node=0: a number above 0"):
        links_of(h100, ranks_per_node=0)


def test_a_rank_sends_along_its_groups():
    links = Links(100.0, 10.0, 4)
    assert links.milliseconds(10**6, 0, range(4)) == pytest.approx(0.01)
    assert links.milliseconds(10**6, 0, range(0, 16, 4)) == pytest.approx(0.1)
    assert links.milliseconds(10**6, 5, range(8)) == pytest.approx(3 / 7 * 0.01 + 4 / 7 * 0.1)
    assert links.milliseconds(10**6, 3, range(3, 4)) == 0.0
