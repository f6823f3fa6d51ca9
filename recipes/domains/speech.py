"""Recognition of nine speakers by two Japanese vowels: 12 coefficients in up to 29 frames.

In: aeon's file (by path). Out: a domain with the published split, 270 and 370 utterances.
M. Kudo, J. Toyama, M. Shimbo, Pattern Recognition Letters 20 (1999) 1103-1111.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from domain import Domain, Rows, accuracy
from shared.assets import package_folder
from torch import Tensor, nn

FRAMES, COEFFICIENTS, SPEAKERS, WIDTH = 29, 12, 9, 64


class Speaker(nn.Module):
    """A transformer over frames; the mean of its outputs predicts the speaker."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(COEFFICIENTS, WIDTH)
        self.position_embeddings = nn.Embedding(FRAMES, WIDTH)
        layer = nn.TransformerEncoderLayer(
            WIDTH, 4, 2 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(WIDTH)
        self.classifier = nn.Linear(WIDTH, SPEAKERS)

    def forward(self, frames: Tensor) -> Tensor:
        """Return the logits of utterances (b, frames, coefficients) that are padded with NaN."""
        beyond = frames[..., 0].isnan()
        x = self.embed(frames.nan_to_num(0.0)) + self.position_embeddings.weight
        x = self.layers(x, src_key_padding_mask=beyond).masked_fill(beyond[..., None], 0.0)
        return self.classifier(self.norm(x.sum(1) / (~beyond).sum(1, keepdim=True)))


def utterances(file: Path) -> Rows:
    """Return the utterances in a file of the UEA archive, padded with NaN, and their speakers."""
    text = file.read_text("utf8").partition("@data")[2]
    rows, speakers = [], []
    for line in text.split():
        *channels, speaker = line.split(":")
        values = torch.tensor([[float(v) for v in channel.split(",")] for channel in channels])
        rows.append(F.pad(values.T, (0, 0, 0, FRAMES - values.shape[1]), value=torch.nan))
        speakers.append(int(speaker) - 1)
    return torch.stack(rows), torch.tensor(speakers)


def vowels() -> Domain:
    """Return the domain."""
    folder = package_folder("aeon", "vowels") / "datasets" / "data" / "JapaneseVowels"
    return Domain(
        train=utterances(folder / "JapaneseVowels_TRAIN.ts"),
        held_out=utterances(folder / "JapaneseVowels_TEST.ts"),
        model=Speaker,
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        steps=200,
        batch=64,
    )
