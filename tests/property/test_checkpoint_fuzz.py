"""Damaged checkpoints: a load that works, or an error that is short and changes nothing."""

import copy
import io
import random
import warnings

import pytest
import torch

from tests.unit.optimizer.test_loading import everything, same, trained
from tests.unit.optimizer.test_loading import train as train_on

CASES = 120  # of each kind
LONGEST_MESSAGE = 1000

HOSTILE = [
    None, True, -1, 0, 3, 2**70, 10**400, 0.5, -0.5, float("nan"), float("inf"), 1j, "", "x" * 5000,
    b"bytes", [], [[]], [1, "a", None], (), (0.9, 0.99), ((((),),),), {}, {"step": 1}, {1: {2: 3}},
    torch.tensor(2.0), torch.tensor(float("nan")), torch.zeros(0), torch.zeros(3, 3),
    torch.zeros(2, 2, dtype=torch.int64), torch.zeros(8, dtype=torch.complex64),
    torch.zeros(8, 6).to_sparse(), torch.zeros(8, 6, dtype=torch.bool), torch.full((8, 6), -1e38),
    torch.empty(8, 6, device="meta"), torch.Size([8, 6]), torch.float32, torch.device("cpu"),
]  # fmt: skip


def places(tree, path=()):
    """The paths to every value of nested dicts and lists."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in list(items):
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from places(value, (*path, key))


def reshaped(tensor, chance):
    """The tensor in another shape, dtype or layout, or with a value that it cannot hold."""
    changes = [
        lambda t: t.flatten(),
        lambda t: t.t() if t.ndim == 2 else t[None],
        lambda t: t[:-1] if t.ndim else t[None],
        lambda t: torch.cat([t, t]) if t.ndim else -t,
        lambda t: t.to(chance.choice([torch.float16, torch.float64, torch.int8, torch.complex64])),
        lambda t: t.unsqueeze(-1).expand(*t.shape, 2)[..., 0],
        lambda t: torch.where(torch.rand(t.shape) < 0.1, chance.choice([torch.nan, torch.inf]), t),
        lambda t: -t - 1,
    ]
    return chance.choice(changes)(tensor)


def changed(saved, chance):
    """One to three values replaced, removed, added, moved or reshaped."""
    for _ in range(chance.randint(1, 3)):
        *path, last = chance.choice(list(places(saved)))
        parent = saved
        for key in path:
            parent = parent[key]
        kind = chance.choice(["replace", "replace", "remove", "add", "reshape", "swap"])
        if kind == "remove":
            del parent[last]
        elif kind == "add" and isinstance(parent, dict):
            key = chance.choice(["x", 99, "exp_avg", "params"])
            parent[key] = copy.deepcopy(chance.choice(HOSTILE))
        elif kind == "reshape" and isinstance(parent[last], torch.Tensor):
            parent[last] = reshaped(parent[last], chance)
        elif kind == "swap":
            other = chance.choice(list(parent)) if isinstance(parent, dict) else 0
            parent[last], parent[other] = parent[other], parent[last]
        else:
            parent[last] = copy.deepcopy(chance.choice(HOSTILE))
        if not saved:
            break
    return written(saved)


def written(saved, zipped=True):
    file = io.BytesIO()
    torch.save(saved, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()


def truncated(saved, chance):
    data = written(saved, chance.random() < 0.5)
    return data[: chance.randrange(len(data))]


def flipped(saved, chance):
    """One to four bits, anywhere or in the header; the older format has no checksums."""
    data = bytearray(written(saved, chance.random() < 0.3))
    end = chance.choice([len(data), 2000])
    for _ in range(chance.randint(1, 4)):
        data[chance.randrange(min(end, len(data)))] ^= 1 << chance.randrange(8)
    return bytes(data)


@pytest.mark.parametrize("damage", [changed, truncated, flipped])
@pytest.mark.filterwarnings("ignore")
def test_damaged_checkpoints_load_or_are_refused(damage):
    chance = random.Random(0)
    torch.manual_seed(0)
    net, optimizer = trained(steps=2)
    good = copy.deepcopy(optimizer.state_dict())
    train_on(net, optimizer, 1, seed=2)
    results = {"unreadable": 0, "refused": 0, "loaded": 0}
    before = everything(net, optimizer)
    for _ in range(CASES):
        data = damage(copy.deepcopy(good), chance)
        try:
            saved = torch.load(io.BytesIO(data), weights_only=True)
        except Exception:  # torch's own
            results["unreadable"] += 1
            continue
        refusal = refused(optimizer, saved)
        if refusal is not None:
            assert len(refusal) < LONGEST_MESSAGE
            assert same(before, everything(net, optimizer))
            results["refused"] += 1
            continue
        results["loaded"] += 1
        assert_sound(optimizer)
        if damage is changed:
            train_on(net, optimizer, 1, seed=3)  # what was loaded can be trained with
            assert all(p.isfinite().all() for p in net.parameters())
        restored(net, optimizer, before)
        assert same(before, everything(net, optimizer))
    train_on(net, optimizer, 1, seed=3)
    assert sum(results.values()) == CASES
    reached = {"unreadable"} if damage is truncated else {"refused", "loaded"}
    assert all(results[kind] for kind in reached), results


def refused(optimizer, saved):
    """The message of the error, if there is one; errors of other kinds are faults."""
    try:
        optimizer.load_state_dict(saved)
    except ValueError as error:
        return str(error)
    except TypeError as error:
        if isinstance(saved, dict):
            raise
        return str(error)
    return None


def assert_sound(optimizer):
    for group in optimizer.param_groups:
        assert 0 <= group["lr"] < float("inf")
        buffers = ("exp_avg", "exp_avg_sq")[: 2 if group["algorithm"] == "adamw" else 1]
        for p in group["params"]:
            state = optimizer.state.get(p)
            if state:
                assert all(state[key].shape == p.shape for key in buffers)
                assert all(state[key].isfinite().all() for key in ("step", *buffers))


def restored(net, optimizer, before):
    weights, state, groups = copy.deepcopy(before)
    net.load_state_dict(weights)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = {int(key): value for key, value in state.items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        for key in group.keys() - kept.keys() - {"params"}:
            del group[key]
