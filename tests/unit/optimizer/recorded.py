"""A stand-in for a CUDA graph on a CPU: operations with their tensors, done again on the same ones.

As in a graph, numbers are those of the capture, tensors keep their places, and nothing is done
while it is recorded. What would wait for a device, or copy from the host, raises.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_muon.optimizer.capturable import Graphs

FORBIDDEN = {
    "_local_scalar_dense": "a wait for the device",
    "equal": "a wait for the device",
    "nonzero": "a wait for the device",
    "lift_fresh": "numbers from the host",
}


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.tape, self._saved, self._made = [], {}, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in FORBIDDEN:
            raise RuntimeError(f"{name} in captured work: {FORBIDDEN[name]}")
        for tensor in tensors((args, kwargs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._made | self._saved.keys():
                self._saved[storage._cdata] = storage, storage.clone()
        out = func(*args, **(kwargs or {}))
        self._made |= {t.untyped_storage()._cdata for t in tensors(out)} - self._saved.keys()
        self.tape.append((func, args, kwargs or {}, out))
        return out

    def undo(self):
        for storage, before in self._saved.values():
            storage.copy_(before)

    def replay(self):
        for func, args, kwargs, out in self.tape:
            for new, old in zip(tensors(func(*args, **kwargs)), tensors(out), strict=True):
                if new.data_ptr() != old.data_ptr():
                    old.copy_(new)


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def recording(recorders):
    """The captures of a device that records; each recorder goes into a list."""

    def capture(work, device):
        with Recorder() as recorder:
            work()
        recorder.undo()
        recorder.replays = 0
        recorders.append(recorder)

        def replay():
            recorder.replays += 1
            recorder.replay()

        return replay

    return Graphs(lambda work, device: work(), capture)


class OnOneDevice(TorchDispatchMode):
    """Raises for any tensor that is elsewhere, or made from numbers of the host."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.count = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        elsewhere = {t.device.type for t in tensors((args, kwargs, out))} - {self.kind}
        if name in FORBIDDEN or elsewhere:
            raise RuntimeError(f"{name} in captured work, on {elsewhere}")
        self.count += 1
        return out
