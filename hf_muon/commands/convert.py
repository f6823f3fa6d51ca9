"""``hf-muon convert CHECKPOINT``: switch between AdamW and Muon in the middle of a run.

In: a checkpoint folder of the Trainer, from one process or DDP, trained by AdamW or Muon. Out: a
new folder from which the other optimizer continues at the same step of the same schedule. The model
is built without weights; the original folder is not changed.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from hf_muon.commands.blueprint import build, find_adapter
from hf_muon.commands.plan import Auto, OptimArgs
from hf_muon.config import LIKE_ADAMW, MuonConfig
from hf_muon.optimizer import Muon
from hf_muon.optimizer.checkpoint import is_group
from hf_muon.optimizer.conversion import Named, keeps_average, reschedule, to_adamw, to_muon
from hf_muon.optimizer.entries import Group
from hf_muon.routing import RoutePlan, route
from hf_muon.values import near_path, require_known, sentence

TARGETS = ("muon", "adamw_torch", "adamw_torch_fused")
OPTIMIZER, SCHEDULE = "optimizer.pt", "scheduler.pt"
_REWRITTEN = (OPTIMIZER, SCHEDULE, "muon_report.json")
# Files that other launchers write in place of optimizer.pt (accelerate 1.x, DeepSpeed 0.19).
_SHARDED = ("optimizer.bin", "optimizer_[0-9]*", "pytorch_model_fsdp_*", "latest", "global_step*")


def convert(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder of the Trainer.")],
    to: Annotated[
        str, typer.Option(help=f"The optimizer to go on with: {', '.join(TARGETS)}.")
    ] = "muon",
    model: Annotated[
        str | None,
        typer.Option(
            help="A config.json, a folder, or a model id; of an adapter, its base. Default: "
            "the checkpoint's own."
        ),
    ] = None,
    optim_args: OptimArgs = "",
    auto: Auto = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write. Default: muon-checkpoint-N beside checkpoint-N."),
    ] = None,
) -> None:
    """Let another optimizer go on from a checkpoint: AdamW → Muon, or back. Keeps the schedule."""
    require_known(to, TARGETS, "to")
    source = checkpoint.resolve()
    target = out or source.with_name(f"{to.partition('_')[0]}-{source.name}")
    _check_folders(checkpoint, target)
    before, schedule = _read(checkpoint / OPTIMIZER), _read(checkpoint / SCHEDULE)
    config = _configured(before, optim_args, to)
    plan = route(_model_of(checkpoint, model, auto), config)
    decayed, others = parameters = _as_the_trainer_lists(plan)
    if to == "muon":
        optimizer = Muon(plan.param_groups(config), config=config)
        after = to_muon(before, parameters, optimizer)
    else:
        after = to_adamw(before, parameters, _settings_of_adamw(decayed, others, config, to))
    schedule = reschedule(schedule, after["param_groups"])
    _write(checkpoint, target, after, schedule)
    of_muon = (after if to == "muon" else before)["param_groups"]
    typer.echo(_kept(to, after["param_groups"], of_muon))
    typer.echo(_how_to_go_on(target, to, after["param_groups"], config, optim_args))


def _check_folders(checkpoint: Path, target: Path) -> None:
    if not checkpoint.is_dir():
        raise ValueError(f"{str(checkpoint)!r} is no folder.{near_path(checkpoint)}")
    found = [path.name for name in _SHARDED for path in sorted(checkpoint.glob(name))]
    if found and not any(checkpoint.glob("random_states_*.pkl")):  # accelerate's save_state
        raise ValueError(
            f"{str(checkpoint)!r} was written by FSDP or DeepSpeed ({found[0]}), and the state of "
            "its optimizer lies in pieces. Checkpoints of one process or DDP can be converted; "
            "of others merge the weights (zero_to_fp32.py, accelerate merge-weights) into a "
            "folder with config.json and trainer_state.json, and resume from that with the "
            "callback KeepSchedule of docs/troubleshooting.md. Momentum begins at zero then."
        )
    if (checkpoint / "modules.json").is_file():
        raise ValueError(
            f"{str(checkpoint)!r} was written by sentence-transformers (modules.json), which "
            "trains a loss with the model inside it; the names and the number of its parameters "
            "are not in the checkpoint. Start a new run from the weights."
        )
    for name in (OPTIMIZER, SCHEDULE, "trainer_state.json"):
        if not (checkpoint / name).is_file():
            raise ValueError(
                f"{str(checkpoint)!r} holds no {name}: a checkpoint folder of the Trainer is "
                "expected, such as out/checkpoint-500, saved without save_only_model."
            )
    if target.exists():
        raise ValueError(f"{str(target)!r} exists already: name another folder with --out.")
    if checkpoint.resolve() in target.resolve().parents:
        raise ValueError(f"{str(target)!r} is inside the checkpoint, which stays as it is.")


def _read(path: Path) -> dict[str, Any]:
    """Read a state dict, as data only: nothing in the file is executed."""
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # on a damaged file the unpickler can raise anything
        raise ValueError(f"{str(path)!r} cannot be read: {sentence(error)}") from error
    if not isinstance(found, dict) or (path.name == OPTIMIZER and not _has_groups(found)):
        raise ValueError(f"{str(path)!r} is damaged: it holds no state dict.")
    return found


def _has_groups(found: dict[str, Any]) -> bool:
    groups, state = found.get("param_groups"), found.get("state")
    if not (isinstance(groups, list) and groups and all(map(is_group, groups))):
        return False
    indices = [index for group in groups for index in group["params"]]
    named = all(len(g.get("param_names", g["params"])) == len(g["params"]) for g in groups)
    states = isinstance(state, dict) and all(isinstance(one, dict) for one in state.values())
    return named and states and len(set(indices)) == len(indices)


def _model_of(checkpoint: Path, named: str | None, auto: str | None) -> nn.Module:
    """Return the checkpoint's model; a name given for that of an adapter may be its base alone."""
    if named is None or (find_adapter(checkpoint) and not find_adapter(Path(named))):
        return build(str(checkpoint), auto, base=named)
    return build(named, auto)


def _configured(before: dict[str, Any], optim_args: str, to: str) -> MuonConfig:
    """Return the settings to continue with.

    Settings that ``optim_args`` does not give are those of the run.
    """
    groups = before["param_groups"]
    is_muon = any("algorithm" in group for group in groups)
    if is_muon == (to == "muon"):
        other = "adamw_torch" if is_muon else "muon"
        raise ValueError(
            f"The checkpoint is {'Muon' if is_muon else 'AdamW'}'s already: nothing to convert to "
            f"{to!r}. Resume from it as it is, or go on with --to {other}."
        )
    config = MuonConfig.from_optim_args(optim_args or None, **_settings_of_run(groups))
    if config.lr is None:
        raise ValueError(
            "The rate of matrices is of another scale than AdamW's, and no other is known: give "
            '--optim-args "lr=3e-4".'
        )
    return config


def _settings_of_run(groups: list[Group]) -> dict[str, Any]:
    """Return the settings of the AdamW groups, or of the Muon groups if there are none."""
    of_adamw = [group for group in groups if group.get("algorithm", "adamw") == "adamw"]
    if not all({"betas", "eps", "lr", "weight_decay"} <= group.keys() for group in of_adamw):
        raise ValueError(
            f"The optimizer's groups hold {sorted(map(str, groups[0]))}; those of AdamW, with "
            "betas and eps, or of Muon are expected. Other optimizers cannot be converted: start a "
            "new run from the weights."
        )
    settings: dict[str, Any] = {
        "lr": _rate([*of_adamw, *filter(_has_rates_of_adamw, groups)]),
        "weight_decay": _decay(of_adamw) or _decay(groups),
    }
    if of_adamw:
        settings |= {"adamw_betas": of_adamw[0]["betas"], "adamw_eps": of_adamw[0]["eps"]}
    return settings


def _has_rates_of_adamw(group: Group) -> bool:
    """Return whether a group of matrices has a learning rate on the scale of AdamW's."""
    return (
        group.get("adjust_lr") == "match_rms_adamw"
        and (group.get("step_rule", "additive"), group.get("matrix_map", "polar")) in LIKE_ADAMW
    )


def _rate(groups: list[Group]) -> Any:
    """Return the run's learning rate, before any schedule and without ``lr_multipliers``."""
    for group in sorted(groups, key=lambda group: "lr_multiplier" in group):
        rate, factor = group.get("initial_lr", group.get("lr")), group.get("lr_multiplier", 1.0)
        if factor:
            return rate if factor == 1 else rate / factor
    return None


def _decay(groups: list[Group]) -> float:
    """Return the weight decay of the groups that have one; 0 if none has."""
    return max((float(group.get("weight_decay", 0.0)) for group in groups), default=0.0)


def _as_the_trainer_lists(plan: RoutePlan) -> tuple[Named, Named]:
    """Return the trainable parameters with weight decay under the Trainer, then the others.

    Both lists are in the model's order.
    """
    both = list(zip(plan.routes, plan.parameters, strict=True))
    return (
        [(one.name, parameter) for one, parameter in both if one.decay],
        [(one.name, parameter) for one, parameter in both if not one.decay],
    )


def _settings_of_adamw(
    decayed: Named, others: Named, config: MuonConfig, to: str
) -> list[dict[str, Any]]:
    """Return the settings of the Trainer's two groups, as its AdamW saves them."""
    groups = [
        {"params": [p for _, p in members], **config.adamw_group(decay)}
        for members, decay in ((decayed, True), (others, False))
    ]
    optimizer = torch.optim.AdamW(groups)
    return [
        {k: v for k, v in group.items() if k != "algorithm"} | {"fused": to.endswith("fused")}
        for group in optimizer.state_dict()["param_groups"]
    ]


def _write(checkpoint: Path, target: Path, after: dict[str, Any], schedule: dict[str, Any]) -> None:
    """Write the new folder; it appears under its name only once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".converting-") as temporary:
        folder = Path(temporary, target.name)
        shutil.copytree(checkpoint, folder, ignore=shutil.ignore_patterns(*_REWRITTEN))
        torch.save(after, folder / OPTIMIZER)
        torch.save(schedule, folder / SCHEDULE)
        folder.rename(target)


def _kept(to: str, groups: list[Group], of_muon: list[Group]) -> str:
    """Describe how the new groups of ``to`` were made; Muon's are among the old or the new ones."""
    tensors = sum(len(group["params"]) for group in of_muon if group["algorithm"] == "muon")
    others = sum(len(group["params"]) for group in groups) - tensors
    if not keeps_average(of_muon[0]):
        begins = "begin anew, as the rule keeps no average of gradients"
    elif to == "muon":
        begins = "begin with AdamW's first moment as momentum"
    else:
        begins = "begin with moments that follow from Muon's momentum"
    text = f"{tensors} tensors of matrices {begins}; AdamW's state of {others} others is kept."
    if to != "muon" and any("lr_multiplier" in group for group in of_muon):
        text += " All get one rate: the Trainer's AdamW has no lr_multipliers."
    return text


def _how_to_go_on(
    target: Path, to: str, groups: list[Group], config: MuonConfig, given: str
) -> str:
    """Return the next learning rate and the training arguments for the new run, as text."""
    half = config.muon_group() if to == "muon" else config.adamw_group()
    rate, decay = half["lr"], half["weight_decay"]
    shares = [group["lr"] / group["initial_lr"] for group in groups if group["initial_lr"]]
    upcoming = rate * (shares[0] if shares else 1)
    optim_args = f", optim_args={given!r}" if to == "muon" and given else ""
    return (
        f"The next rate is {upcoming:.6g}, of {rate:g}.\n"
        f'Go on with optim="{to}", learning_rate={rate!r}, weight_decay={decay!r}{optim_args}\n'
        f"and train(resume_from_checkpoint={str(target)!r})."
    )
