"""``hf-muon probe MODEL --text FILE``: how order and momentum filter a model's gradients.

In: a causal language model (a folder or a Hub id) and text. Out: the readings of a stationary
probe, as a table or as JSON. The weights do not change, and no file is written.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_muon.commands.blueprint import check_exists
from hf_muon.diagnostics import stationary_probe
from hf_muon.diagnostics.gradients import muon_matrices, spread_evenly
from hf_muon.diagnostics.readings import ProbeSettings
from hf_muon.values import read_json, sentence

LAYERS = 8
"""Matrices that are probed by default; each one keeps a buffer of gradients."""
SHOWN = ("alignment", "direction", "sin_left", "sin_right")


def probe(
    model: Annotated[str, typer.Argument(help="A model folder or a model id: a causal LM.")],
    text: Annotated[list[Path], typer.Option(help="A text file; give the option for each file.")],
    layers: Annotated[
        list[str] | None,
        typer.Option(help="Regex of parameter names. Default: eight matrices, spread evenly."),
    ] = None,
    order: Annotated[
        list[str] | None, typer.Option(help="An order to replay. Default: all three.")
    ] = None,
    momentum: Annotated[
        list[float] | None, typer.Option(help="β of the momentum. Default: 0.95.")
    ] = None,
    proxy: Annotated[
        str, typer.Option(help="What stands for the signal: held_out, in_buffer or both.")
    ] = "held_out",
    rank: Annotated[int, typer.Option(help="Leading directions that count as signal.")] = 1,
    batches: Annotated[
        int, typer.Option(min=4, help="Gradients to take; one half is replayed.")
    ] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    seq_len: Annotated[int, typer.Option(min=2, help="Tokens in a sequence.")] = 128,
    seed: Annotated[int, typer.Option(help="Of the order of the sequences.")] = 0,
    device: Annotated[str, typer.Option(help="Where the model computes.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print the readings as JSON.")] = False,
) -> None:
    """Probe the gradients of a model on a text: how much of an update is signal, layer by layer."""
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    asked: dict[str, Any] = {"proxy": proxy, "rank": rank}
    asked |= {"orders": tuple(order)} if order else {}
    asked |= {"momenta": tuple(momentum)} if momentum else {}
    ProbeSettings(**asked)  # raises for wrong settings before the model is loaded
    blocks = read_blocks(model, text, batches * batch_size, seq_len, seed)
    network = load(model, device)
    most = getattr(network.config, "max_position_embeddings", None) or seq_len
    if seq_len > most:
        raise ValueError(
            f"seq_len={seq_len}: the model takes at most {most} tokens (max_position_embeddings)."
        )
    if not layers:
        some = spread_evenly(list(muon_matrices(network)), LAYERS)
        layers = [f"^{re.escape(name)}$" for name in some]
    # (batch_size, seq_len) each; the labels are the tokens themselves, which the model shifts.
    rows = torch.split(torch.tensor(blocks, device=device), batch_size)
    taken = ({"input_ids": ids, "labels": ids} for ids in rows)
    report = stationary_probe(network, taken, layers=layers, **asked)
    typer.echo(json.dumps(report.to_dict(), indent=2) if as_json else report.table(*SHOWN))
    if report.flagged and not as_json:
        typer.echo(f"{len(report.flagged)} of {len(report.readings)} readings: no signal seen.")


def read_blocks(
    model: str, files: Sequence[Path], count: int, seq_len: int, seed: int
) -> list[list[int]]:
    """Cut texts into blocks of tokens, and return a random selection without repetition.

    Args:
        model: The model whose tokenizer to use.
        files: Texts in UTF-8; invalid bytes are replaced.
        count: Number of blocks to return.
        seq_len: Tokens per block.
        seed: Seed of the selection and its order.

    Raises:
        ValueError: A file or a tokenizer cannot be read, or the texts are too short.
    """
    from transformers import AutoTokenizer

    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            raise ValueError(f"The text {str(file)!r} cannot be read: {sentence(error)}") from None
    _check_source(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=False)
    except Exception as error:  # hub, cache and validation errors have no common base
        raise ValueError(f"{model!r} gives no tokenizer: {sentence(error)}") from error
    tokens = [
        token
        for one in texts
        for token in tokenizer(one, add_special_tokens=False, verbose=False)["input_ids"]
    ]
    there = len(tokens) // seq_len
    if there < count:
        raise ValueError(
            f"The text has {len(tokens):,} tokens, {there} sequences of {seq_len}; batches × "
            f"batch_size = {count} different ones are needed. Give more text, or lower one of the "
            "three."
        )
    order = torch.randperm(there, generator=torch.Generator().manual_seed(seed)).tolist()
    return [tokens[at * seq_len : (at + 1) * seq_len] for at in order[:count]]


def load(model: str, device: str) -> Any:
    """Return the model with its weights, in float32 and without dropout.

    Raises:
        ValueError: It cannot be loaded as a causal language model, or the device is not available.
    """
    from transformers import AutoModelForCausalLM

    try:
        network: Any = AutoModelForCausalLM.from_pretrained(
            model, dtype=torch.float32, trust_remote_code=False
        )
    except Exception as error:  # hub, cache and validation errors have no common base
        raise ValueError(
            f"{model!r} gives no causal language model: {sentence(error)} Other models are "
            "probed in Python: hf_muon.diagnostics.stationary_probe takes any loss."
        ) from error
    try:
        return network.to(device).eval()
    except (RuntimeError, AssertionError) as error:  # unknown device, or torch built without it
        raise ValueError(f"device={device!r} cannot be used: {sentence(error)}") from error


def _check_source(model: str) -> None:
    """Raise for a path that does not exist, and for an adapter that names no base model."""
    check_exists(model)
    adapter = Path(model) / "adapter_config.json"
    if adapter.is_file() and not (Path(model) / "config.json").is_file():
        base = read_json(adapter).get("base_model_name_or_path")
        if not isinstance(base, str) or not base:
            raise ValueError(f"{model!r} names no base model (base_model_name_or_path).")
