"""The examples of recipes/ecosystem: an unmodified script, plain PyTorch, axolotl."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import types
from itertools import chain

import pytest
import tokenizers
import torch
import torch.distributed.checkpoint as dcp
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp
from transformers import LlamaConfig, PreTrainedTokenizerFast, TrainingArguments

import hf_muon
from hf_muon.config import MuonConfig
from hf_muon.integrations.names import is_ours
from tests.distributed.launch import ON_CPU, ON_LOOPBACK, ROOT
from tests.integration import markdown
from tests.integration.tiny import TINY, largest_difference

FULL = pytest.mark.full
ECOSYSTEM = ROOT / "recipes" / "ecosystem"
RUN_CLM = "recipes/ecosystem/run_clm.py"
ON_TWO = [
    "-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/ddp.yaml",
    "--num_processes", "2", "--main_process_port", "0",
]  # fmt: skip


def run(arguments, folder, check=True):
    """Run Python at the root of the repository, offline."""
    environment = os.environ | ON_CPU | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert not check or done.returncode == 0, done.stderr[-3000:]
    return done


def options(**values):
    return list(chain(*((f"--{name}", str(value)) for name, value in values.items())))


def report_of(folder):
    return json.loads((folder / "muon_report.json").read_text())


def trained_by_muon(folder):
    return [r["name"] for r in report_of(folder)["routing"]["routes"] if r["algorithm"] == "muon"]


# An unmodified script


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    """The configuration and the tokenizer of a tiny LLaMA."""
    folder = tmp_path_factory.mktemp("model")
    bpe = tokenizers.ByteLevelBPETokenizer()
    text = (ROOT / "README.md").read_text()
    bpe.train_from_iterator([text], vocab_size=400, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>")
    tokenizer.save_pretrained(folder)
    LlamaConfig(**{**TINY, "vocab_size": 400}).save_pretrained(folder)
    return folder


class Clm:
    """Launches of run_clm.py, each made once."""

    def __init__(self, folder, model):
        self.folder, self.model = folder, model

    def arguments(self, name, batch):
        return [
            RUN_CLM, "--do_train",
            *options(
                model_name_or_path=self.model, from_scratch=True, train_file="README.md",
                block_size=32, optim="muon", learning_rate=1e-2, max_steps=4, logging_steps=1,
                # The tiny matrices are below the size from which dividing them pays. float32,
                # because bfloat16 makes of a rounding in a gradient a thousand times as much.
                optim_args="order=pre_polar,polar_dtype=float32,distribute=owner",
                per_device_train_batch_size=batch, save_strategy="no", report_to="none",
                use_cpu=True, disable_tqdm=True, output_dir=self.folder / name,
            ),
        ]  # fmt: skip

    def __call__(self, name, batch, launcher=()):
        out = self.folder / name
        if not out.exists():
            command = [*launcher, "-m", "hf_muon.run", *self.arguments(name, batch)]
            # A process that ends may abort after all is written (recipes/shared/processes.py).
            done = run(command, self.folder, check=not launcher)
            assert (out / "trainer_state.json").is_file(), done.stderr[-3000:]
        return out


@pytest.fixture(scope="module")
def clm(tmp_path_factory, model_folder):
    return Clm(tmp_path_factory.mktemp("clm"), model_folder)


def losses(out):
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return torch.tensor([entry["loss"] for entry in history if "loss" in entry])


def test_muon_trains_a_script_that_does_not_know_it(clm):
    assert "muon" not in (ROOT / RUN_CLM).read_text().lower()
    out = clm("alone", 8)
    assert report_of(out)["optimizer"].startswith("Muon (hf_muon")
    assert len(trained_by_muon(out)) == 7 * TINY["num_hidden_layers"]
    assert losses(out)[-1] < losses(out)[0] - 0.05


def test_the_script_itself_refuses_the_name(clm, tmp_path):
    done = run(clm.arguments("refused", 8), tmp_path, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'muon'" in done.stderr


@FULL
def test_two_processes_of_the_script_equal_one(clm):
    alone, two = clm("alone", 8), clm("two", 4, ON_TWO)
    assert trained_by_muon(two) == trained_by_muon(alone)
    # Gradients are averaged in another order: float32 roundings of losses around 6.
    assert (losses(two) - losses(alone)).abs().max() < 1e-5
    # Control: processes that do not meet train on batches half as large.
    assert (losses(clm("half", 4)) - losses(alone)).abs().max() > 1e-3


# A loop of plain PyTorch


def loop(processes, folder, *more, **values):
    """Run fsdp2_loop.py; return what it printed first, and its losses."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes, *ON_LOOPBACK]
    settings = {"polar_dtype": "float32", "save_every": 2, "folder": folder, **values}
    script = [ECOSYSTEM / "fsdp2_loop.py", *options(**settings), *more]
    first, *rest = run([*launcher, *script], folder.parent).stdout.splitlines()
    return first, torch.tensor([float(re.search(r"loss (\S+)", line)[1]) for line in rest])


def checkpoint(folder, step):
    """The whole weights, and in how many parts each of them and of its momentum is saved."""
    saved = folder / f"step-{step:06d}"
    dcp_to_torch_save(saved, folder / "whole.pt")
    metadata = dcp.FileSystemReader(saved).read_metadata().state_dict_metadata
    parts = {
        len(item.chunks)
        for name, item in metadata.items()
        if name.startswith("model.") or name.endswith(".exp_avg")
    }
    return torch.load(folder / "whole.pt", weights_only=True)["model"], parts


@pytest.fixture(scope="module")
def two_of_four(tmp_path_factory):
    """Two processes, four steps, with a checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("loops") / "two"
    return folder, *loop(2, folder, steps=4)


@FULL
def test_the_loop_on_two_processes_equals_one(two_of_four, tmp_path):
    folder, said, two = two_of_four
    alone, one = loop(1, tmp_path / "one", steps=4)
    numbers = "DTensors: 20 of 20 parameters; trained by Muon: 14"
    assert (said, alone) == (f"processes: 2; {numbers}", f"processes: 1; {numbers}")
    weights, parts = checkpoint(folder, 4)
    whole, one_part = checkpoint(tmp_path / "one", 4)
    assert (parts, one_part) == ({2}, {1})
    # Gradients are averaged in another order; losses are printed with six digits.
    assert (two - one).abs().max() < 2e-5
    assert largest_difference(weights, whole) < 1e-4
    # Control: another order of momentum and polar factor.
    other = loop(2, tmp_path / "other", steps=4, order="post_polar")[1]
    assert (two - other).abs().max() > 1e-2


@FULL
@pytest.mark.parametrize(("processes", "tolerance"), [(1, 1e-4), (2, 1e-5)])
def test_the_loop_goes_on_from_its_checkpoint(two_of_four, processes, tolerance, tmp_path):
    folder, _, uninterrupted = two_of_four
    parts = tmp_path / "parts"
    loop(2, parts, steps=2)
    losses = loop(processes, parts, "--resume", steps=4)[1]
    assert len(losses) == 2
    # On one process to the rounding of averaged gradients, as above. On two nearly always bit by
    # bit: of some twenty runs on a busy CPU, one ended with three last places in another weight.
    assert (losses - uninterrupted[2:]).abs().max() < 2e-5
    end, expected = checkpoint(parts, 4)[0], checkpoint(folder, 4)[0]
    assert largest_difference(end, expected) < tolerance
    # Control: the momentum matters; two steps from the same weights without it end elsewhere.
    without_state(parts, step=2)
    loop(processes, parts, "--resume", steps=4)
    assert largest_difference(checkpoint(parts, 4)[0], expected) > 1e-3


def without_state(folder, step):
    """Set the moments in a checkpoint to zero, and forget the later ones."""
    saved = folder / f"step-{step:06d}"
    dcp_to_torch_save(saved, folder / "whole.pt")
    content = torch.load(folder / "whole.pt", weights_only=True)
    for state in content["optimizer"]["state"].values():
        for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
            state[name].zero_()
    torch.save(content, folder / "whole.pt")
    for path in folder.glob("step-*"):
        shutil.rmtree(path)
    torch_save_to_dcp(folder / "whole.pt", saved)


# A Trainer subclass, accelerate, Lightning


@pytest.fixture
def script(monkeypatch):
    """Import a script of the folder, with small batches."""
    monkeypatch.syspath_prepend(str(ECOSYSTEM))

    def named(name):
        data = importlib.import_module("bytes_llama")
        monkeypatch.setattr(data, "LENGTH", 32)
        monkeypatch.setattr(data, "BATCH", 4)
        return importlib.import_module(name)

    yield named
    for name in ("bytes_llama", "layerwise", "accelerate_loop", "lightning_module"):
        sys.modules.pop(name, None)


def test_a_trainer_subclass_with_rates_by_layer(script, tmp_path):
    layerwise, optimizers = script("layerwise"), []

    class Seen(layerwise.LayerwiseTrainer):
        def create_optimizer(self, model=None):
            optimizers.append(super().create_optimizer(model))
            return optimizers[-1]

    layerwise.LayerwiseTrainer = Seen
    words = ["--output_dir", str(tmp_path), "--use_cpu", "true", "--disable_tqdm", "true"]
    before, after = layerwise.main([*words, "--max_steps", "12"])
    assert after < before - 0.5
    rates = {}
    for group in optimizers[0].param_groups:
        for name in group["param_names"]:
            rates[name] = group["initial_lr"]
    for name, rate in rates.items():
        assert rate == pytest.approx(4e-3 if "layers.0." in name else 5e-3), name
    assert len(trained_by_muon(tmp_path)) == 14


@pytest.mark.parametrize("name", ["accelerate_loop", "lightning_module"])
def test_a_loop_of_another_library_learns_and_resumes_bit_by_bit(name, script, tmp_path):
    if name == "lightning_module":
        pytest.importorskip("lightning", reason="pip install lightning")
    main = script(name).main

    def run(folder, *more):
        return main(["--steps", "6", "--folder", str(tmp_path / folder), *more])

    before, after = run("whole")
    assert after < before - 0.3
    assert run("parts", "--stop_at", "3")[1] != after
    assert run("parts", "--resume")[1] == after


# axolotl and LLaMA-Factory: neither can be installed beside the tested versions


class BasePlugin:
    """Stands in for ``axolotl.integrations.base.BasePlugin`` (0.19)."""

    def register(self, cfg):
        raise NotImplementedError


@pytest.fixture
def plugin(monkeypatch):
    """The plugin, as axolotl finds it: by the names of its module and class in the file."""
    for name in ("axolotl", "axolotl.integrations", "axolotl.integrations.base"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["axolotl.integrations.base"].BasePlugin = BasePlugin
    monkeypatch.syspath_prepend(str(ECOSYSTEM))
    (path,) = settings("axolotl")["plugins"]
    module, name = path.rsplit(".", 1)
    monkeypatch.delitem(sys.modules, module, raising=False)
    found = getattr(importlib.import_module(module), name)()
    monkeypatch.delitem(sys.modules, module)
    return found


def settings(name):
    return yaml.safe_load((ECOSYSTEM / f"{name}.yaml").read_text())


def test_the_plugin_registers_before_axolotl_makes_its_arguments(plugin, monkeypatch):
    calls = []
    monkeypatch.setattr(hf_muon, "register", lambda: calls.append("registered"))
    plugin.register(settings("axolotl"))
    assert calls == ["registered"]
    assert isinstance(plugin, BasePlugin)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "muon"}, "Set optimizer: hf_muon"),
        ({"embedding_lr": 1e-4}, "^embedding_lr would"),
        ({"lr_groups": [], "loraplus_lr_ratio": 16}, "^loraplus_lr_ratio, lr_groups would"),
    ],
)
def test_the_plugin_refuses_what_would_bypass_the_routes(plugin, changes, message):
    with pytest.raises(ValueError, match=message):
        plugin.register(settings("axolotl") | changes)


@pytest.mark.parametrize(("file", "key"), [("axolotl", "optimizer"), ("llamafactory", "optim")])
def test_the_files_of_both_frameworks_choose_our_optimizer(file, key, tmp_path):
    hf_muon.register()
    given = settings(file)
    args = TrainingArguments(tmp_path, optim=given[key], optim_args=given["optim_args"])
    assert is_ours(args.optim)
    assert MuonConfig.from_optim_args(args.optim_args).lora_update == "tangent"
    assert "use_muon" not in given


def test_the_page_on_trainers_says_what_the_files_say():
    found = [b for b in markdown.blocks(ROOT / "docs" / "trainers.md") if b.language == "yaml"]
    for block, file in zip(found, ("axolotl", "llamafactory"), strict=True):
        assert yaml.safe_load(block.code).items() <= settings(file).items()
