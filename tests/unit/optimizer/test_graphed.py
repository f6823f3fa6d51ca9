"""Steps that are captured once and replayed: the same numbers as plain ones, and when there are
none. A recorder stands in for a CUDA graph."""

import copy
import warnings

import pytest
import torch

from hf_muon import Muon, MuonConfig
from hf_muon.distributed.layout import Ranks
from hf_muon.optimizer import agreement, capturable, copies, graphed
from hf_muon.polar import devices
from tests.unit.optimizer.recorded import OnOneDevice, recording

SHAPES = [(6, 9), (9, 6), (6, 9), (4, 4)]
# Plain kernels round −lr·s·U and the sum together; here the product is rounded first, by 2⁻²⁴ of a
# step of at most 0.2·√9·0.02, in each of ten steps, and later steps see the difference.
CLOSE = 1e-6


@pytest.fixture(autouse=True)
def recorders(monkeypatch):
    """A CPU that works as an accelerator and captures into recorders, which are listed."""
    found = []
    monkeypatch.setattr(devices, "is_cpu", lambda device: False)
    monkeypatch.setitem(capturable.KINDS, "cpu", recording(found))
    return found


def build(dtype=torch.float32, lr=0.02, **settings):
    torch.manual_seed(0)
    groups = [
        {"params": [torch.nn.Parameter(torch.randn(*shape).to(dtype)) for shape in SHAPES[:2]]},
        {"params": [torch.nn.Parameter(torch.randn(*shape).to(dtype)) for shape in SHAPES[2:]],
         "weight_decay": 0.0},
        {"params": [torch.nn.Parameter(torch.randn(5))], "algorithm": "adamw"},
    ]  # fmt: skip
    return Muon(groups, lr=lr, **{"weight_decay": 0.1, **settings})


def build_pairs(**settings):
    torch.manual_seed(0)
    names = [f"{n}.{factor}" for n in range(3) for factor in "AB"]
    group = {
        "params": [(name, torch.nn.Parameter(torch.randn((2, 9) if "A" in name else (6, 2))))
                   for name in names],
        "pairs": [name.translate({65: "B", 66: "A"}) for name in names],
        "factors": [name[-1] for name in names], "scalings": [1.0] * len(names),
    }  # fmt: skip
    return Muon([group], lr=0.02, **settings)


def set_gradients(optimizer, seed, skip=()):
    for group in optimizer.param_groups:
        for number, p in enumerate(group["params"]):
            generator = torch.Generator().manual_seed(100 * seed + number)
            gradient = torch.randn(p.shape, generator=generator).to(p.dtype)
            p.grad = None if (group["group_id"], number) in skip else gradient


def train(optimizer, steps=10, first=0, change=lambda optimizer, step: None):
    for step in range(first, first + steps):
        set_gradients(optimizer, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 / (step + 1)
        change(optimizer, step)
        optimizer.step()
    return optimizer


def weights(optimizer):
    return [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]


def furthest(first, second):
    both = zip(weights(first), weights(second), strict=True)
    return max(float((a - b).abs().max()) for a, b in both)


def replays(recorders):
    return [recorder.replays for recorder in recorders]


SETTINGS = {
    "defaults": {},
    "post_polar": {"order": "post_polar"},
    "polar_only": {"order": "polar_only"},
    "kernel": {"momentum": (0.9, 0.98)},
    "cautious": {"cautious_weight_decay": True},
    "clip": {"prefilter": "clip"},
    "polargrad": {"matrix_map": "polargrad", "lr": 1e-3},
    "rows": {"rescale": "rows"},
    "matched": {"order": "post_polar", "match_update_rms": True},
    "bytes": {"momentum_dtype": "int8"},
    "wide": {"momentum_dtype": "float64", "polar_dtype": "float64"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_replays_are_plain_steps_to_rounding_under_any_schedule_of_the_rate(settings, recorders):
    plain, graph = train(build(**settings)), train(build(**settings, cuda_graph=True))
    assert replays(recorders) == [10 - graphed.WARM_UP]
    assert furthest(plain, graph) < CLOSE
    assert furthest(plain, train(build(**settings), 9)) > 10 * CLOSE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_weights_of_other_dtypes_are_rounded_as_plain_ones_or_once_less(dtype, recorders):
    settings = {"momentum_dtype": "float32", "polar_dtype": "float32", "dtype": dtype}
    plain, graph = train(build(**settings)), train(build(**settings, cuda_graph=True))
    assert replays(recorders) == [7]
    # Plain steps round to 8 bits twice, after the decay and in the end.
    apart = 10 * 2 * 4 * 2**-9 if dtype == torch.bfloat16 else CLOSE
    assert furthest(plain, graph) < apart


@pytest.mark.parametrize("update", ["product", "tangent"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_pairs_are_replayed_but_where_they_are_balanced(update, weight_decay, recorders):
    settings = {"lora_update": update, "weight_decay": weight_decay, "tangent_balance_every": 6}
    runs = [train(build_pairs(**settings, cuda_graph=graph)) for graph in (False, True)]
    assert replays(recorders) == [6 if update == "tangent" else 7]
    # Gram matrices and roots pass errors of rounding on.
    assert furthest(*runs) < 10 * CLOSE
    assert furthest(runs[0], train(runs[1], 1)) > 100 * CLOSE


def test_another_setting_is_captured_anew(recorders):
    def change(optimizer, step):
        if step >= 5:
            optimizer.param_groups[0]["weight_decay"] = 0.5

    plain = train(build(), 12, change=change)
    graph = train(build(cuda_graph=True), 12, change=change)
    assert replays(recorders) == [2, 4]
    assert furthest(plain, graph) < CLOSE


def test_other_trained_tensors_are_captured_anew(recorders):
    def change(optimizer, step):
        if step >= 5:
            set_gradients(optimizer, step, skip={(0, 1)})

    plain = train(build(), 12, change=change)
    graph = train(build(cuda_graph=True), 12, change=change)
    assert replays(recorders) == [2, 4]
    assert furthest(plain, graph) < CLOSE


def test_a_gradient_that_is_not_finite_raises_and_changes_nothing(recorders):
    plain, graph = train(build(), 6), train(build(cuda_graph=True), 6)
    before = weights(graph), copy.deepcopy(graph.state_dict()["state"])
    set_gradients(graph, 6)
    graph.param_groups[1]["params"][0].grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="NaN or infinity in parameter 0"):
        graph.step()
    assert all(map(torch.equal, weights(graph), before[0]))
    for old, new in zip(before[1].values(), graph.state_dict()["state"].values(), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    assert furthest(train(plain, 3, first=7), train(graph, 3, first=7)) < CLOSE
    assert replays(recorders) == [6]


def test_a_checkpoint_can_be_loaded_between_replays(recorders):
    runs = []
    for cuda_graph in (False, True):
        optimizer = train(build(cuda_graph=cuda_graph), 5)
        saved, kept = copy.deepcopy(optimizer.state_dict()), weights(optimizer)
        train(optimizer, 2, first=5)
        optimizer.load_state_dict(saved)
        flat = [p for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for p, old in zip(flat, kept, strict=True):
                p.copy_(old)
        runs.append(train(optimizer, 5, first=7))
    assert furthest(*runs) < CLOSE
    assert replays(recorders) == [4, 2]


def test_a_group_can_be_added_between_replays(recorders):
    runs = []
    for cuda_graph in (False, True):
        optimizer = train(build(cuda_graph=cuda_graph), 5)
        torch.manual_seed(1)
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.randn(7, 3))]})
        runs.append(train(optimizer, 5, first=5))
    assert furthest(*runs) < CLOSE
    assert replays(recorders) == [2, 2]


def test_a_copy_captures_for_itself(recorders):
    graph = train(build(cuda_graph=True), 5)
    other = copy.deepcopy(graph)
    train(other, 5, first=5)
    assert replays(recorders) == [2, 2]
    assert furthest(train(build(), 10), other) < CLOSE
    assert furthest(train(build(), 5), graph) < CLOSE


def said(run):
    """What a run says of graphs, once each."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run()
    return [str(w.message) for w in caught if "without a graph" in str(w.message)], found


def test_momentum_that_changes_is_waited_for(recorders):
    settings = {"momentum_start": 0.5, "momentum_warmup_steps": 4}
    messages, graph = said(lambda: train(build(**settings, cuda_graph=True), 12))
    assert len(messages) == 1
    assert "momentum changes from this step to the next" in messages[0]
    assert replays(recorders) == [12 - 4 - graphed.WARM_UP]
    assert furthest(train(build(**settings), 12), graph) < CLOSE


def test_what_changes_at_every_step_ends_the_attempts(recorders):
    def cycle(optimizer, step):
        optimizer.param_groups[0]["momentum"] = 0.9 + step / 1000

    messages, graph = said(lambda: train(build(cuda_graph=True), 20, change=cycle))
    assert len(messages) == 1
    assert "momentum changed 8 times" in messages[0]
    assert replays(recorders) == []
    assert furthest(train(build(), 20, change=cycle), graph) < CLOSE


def test_a_device_that_cannot_capture_leaves_plain_steps(monkeypatch):
    def refuse(work, device):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    kind = capturable.KINDS["cpu"]._replace(capture=refuse)
    monkeypatch.setitem(capturable.KINDS, "cpu", kind)
    messages, graph = said(lambda: train(build(cuda_graph=True)))
    assert len(messages) == 1
    assert "cannot capture the work (operation not permitted" in messages[0]
    assert furthest(train(build()), graph) < CLOSE


def test_work_that_waits_for_the_device_is_not_captured(monkeypatch):
    def waits(*given, **settings):
        return real(*given, **settings) * float(given[0].norm() > 0)

    real = graphed.bucket_step.__globals__["orthogonalize"]
    monkeypatch.setitem(graphed.bucket_step.__globals__, "orthogonalize", waits)
    messages, _ = said(lambda: train(build(cuda_graph=True, matrix_map="polargrad")))
    assert "_local_scalar_dense in captured work: a wait" in messages[0]


def test_elsewhere_than_on_a_cuda_device_steps_are_plain(monkeypatch):
    monkeypatch.delitem(capturable.KINDS, "cpu")
    messages, graph = said(lambda: train(build(cuda_graph=True)))
    assert len(messages) == 1
    assert "matrices are on cpu, and a CUDA device is needed" in messages[0]
    assert all(map(torch.equal, weights(graph), weights(train(build()))))


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": "auto"},
        {"rescale": "entries"},
        {"step_rule": "relative"},
        {"skip_zero_gradients": True},
        {"polar_method": "svd"},
        {"matrix_map": "soft", "map_power": 0.5},
    ],
    ids=str,
)
def test_what_asks_the_host_at_every_step_is_refused(settings):
    [name] = settings.keys() - {"map_power"}
    with pytest.raises(ValueError, match=rf"cuda_graph=True with {name}={settings[name]!r}"):
        MuonConfig(lr=0.1, cuda_graph=True, **settings)
    assert MuonConfig(lr=0.1, **settings) != MuonConfig(lr=0.1, cuda_graph=True)
    optimizer = build(cuda_graph=True)
    with pytest.raises(ValueError, match="leave one of them"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(3, 2))], **settings})


@pytest.mark.parametrize(
    "settings",
    [*SETTINGS.values(), {"lora_update": "product"}, {"lora_update": "tangent"}],
    ids=[*SETTINGS, "product", "tangent"],
)
def test_captured_work_leaves_the_device_for_nothing(settings, monkeypatch):
    counted = []

    def capture(work, device):
        with OnOneDevice("meta") as seen:
            work()
        counted.append(seen.count)
        return lambda: None

    monkeypatch.setitem(
        capturable.KINDS, "meta", capturable.Graphs(lambda work, device: work(), capture)
    )
    monkeypatch.setattr(agreement, "_read", lambda flags: [True] * len(flags))
    with torch.device("meta"):
        make = build_pairs if "lora_update" in settings else build
        optimizer = make(**settings, cuda_graph=True)
        for _ in range(graphed.WARM_UP + 2):
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.empty_like(p)
            optimizer.step()
    assert counted[0] > 20
    with pytest.raises(RuntimeError, match=r"in captured work, on \{'cpu'\}"), OnOneDevice("meta"):
        torch.zeros(2, device="cpu")


def test_with_other_ranks_steps_are_plain(recorders, monkeypatch):
    """One that could not capture would round the same weights otherwise."""
    optimizer = build(cuda_graph=True)
    both = Ranks((0, 1))
    monkeypatch.setattr(Muon, "_members", lambda self, groups: [both])
    for module in (agreement, copies):
        monkeypatch.setattr(module, "agreed", lambda flags, members: flags)
    with pytest.warns(UserWarning, match="several ranks train together"):
        train(optimizer, steps=graphed.WARM_UP + 2)
    assert not recorders


def test_what_is_given_up_holds_no_gradients():
    optimizer = build(cuda_graph=True)

    def change(optimizer, step):
        for group in optimizer.param_groups[:2]:
            group["weight_decay"] = 0.1 / (step + 1)

    with pytest.warns(UserWarning, match="weight_decay changed"):
        train(optimizer, steps=graphed.IN_VAIN + 3, change=change)
    assert optimizer._graphed._captured is None
