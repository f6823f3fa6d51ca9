"""The steps of Muons that no index has as a package, with the state that they keep.

Written after their code, in the dtype of the weights where that casts to bfloat16.
"""

import torch


def quintic(x, steps=5):
    """Jordan's iteration, as all of them have it."""
    x = x.mT if (tall := x.size(0) > x.size(1)) else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Moonlight(torch.optim.Optimizer):
    """https://github.com/MoonshotAI/Moonlight, examples/toy_train.py, commit c2ad5b2."""

    def __init__(self, matrices, others, lr, wd=0.1):
        settings = {"lr": lr, "wd": wd, "momentum": 0.95, "nesterov": True, "ns_steps": 5}
        settings |= {"adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
        super().__init__([*matrices, *others], settings)
        for p in matrices:
            self.state[p]["use_muon"] = True
        for p in others:
            self.state[p]["use_muon"] = False

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr, wd, mu = group["lr"], group["wd"], group["momentum"]
        beta1, beta2 = group["adamw_betas"]
        for p in group["params"]:
            state = self.state[p]
            if state["use_muon"]:
                total = state.setdefault("momentum_buffer", torch.zeros_like(p))
                total.mul_(mu).add_(p.grad)
                update = quintic(p.grad.add(total, alpha=mu))
                p.mul_(1 - lr * wd)
                p.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)
                continue
            step = state["step"] = state.get("step", 0) + 1
            first = state.setdefault("moment1", torch.zeros_like(p))
            second = state.setdefault("moment2", torch.zeros_like(p))
            first.lerp_(p.grad, 1 - beta1)
            second.lerp_(p.grad.square(), 1 - beta2)
            scale = (1 - beta1**step) / (1 - beta2**step) ** 0.5
            p.mul_(1 - lr * wd)
            p.add_(first / (group["adamw_eps"] + second.sqrt()), alpha=-lr / scale)


class Dion(torch.optim.Optimizer):
    """https://github.com/microsoft/dion, dion/muon.py, commit 0a059a4, with rms_norm.

    ``Muon`` there. Earlier versions count AdamW's steps in the group only.
    """

    def __init__(self, matrices, others, lr, weight_decay=0.1, nesterov=False, counts_each=True):
        settings = {"lr": lr, "mu": 0.95, "beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8}
        settings |= {"weight_decay": weight_decay, "nesterov": nesterov, "step": 0}
        groups = [
            {"params": matrices, "algorithm": "muon"},
            {"params": others, "algorithm": "adamw"},
        ]
        super().__init__(groups, settings)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["momentum"] = torch.zeros_like(p)
                if group["algorithm"] == "adamw":
                    self.state[p]["variance"] = torch.zeros_like(p)
                    if counts_each:
                        self.state[p]["step_dev"] = torch.zeros(())

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] += 1
            for p in group["params"]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                run = self._muon if group["algorithm"] == "muon" else self._adamw
                run(p, self.state[p], group)

    def _muon(self, p, state, group):
        total = state["momentum"].mul_(group["mu"]).add_(p.grad)
        update = quintic(total * group["mu"] + p.grad if group["nesterov"] else total)
        p.add_(update, alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)

    def _adamw(self, p, state, group):
        if "step_dev" in state:
            state["step_dev"] += 1
        state["momentum"].lerp_(p.grad, 1 - group["beta1"])
        state["variance"].lerp_(p.grad.square(), 1 - group["beta2"])
        first = state["momentum"] / (1 - group["beta1"] ** group["step"])
        second = state["variance"] / (1 - group["beta2"] ** group["step"])
        p.add_(first / (second.sqrt() + group["epsilon"]), alpha=-group["lr"])
