"""Prediction of the film that a person rates next: MovieLens-100k for a small GPT-2 over films.

In: recbole's copy of the ratings (by path). Out: a domain with a row for each of the 943 people,
whose last film is held out. The data may not be used commercially or redistributed without
permission (https://files.grouplens.org/datasets/movielens/ml-100k-README.txt).
F. M. Harper, J. A. Konstan, ACM Transactions on Interactive Intelligent Systems 5 (2015) 19.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from domain import Domain
from shared.assets import package_folder
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

LENGTH, NONE = 50, 0
"""Films of a row; what stands where there is none."""


class Films(nn.Module):
    """A GPT-2 whose tokens are films, numbered from one."""

    def __init__(self, films: int) -> None:
        super().__init__()
        config = GPT2Config(
            vocab_size=films + 1,
            n_positions=LENGTH,
            n_embd=64,
            n_layer=2,
            n_head=2,
            resid_pdrop=0.2,
            embd_pdrop=0.2,
            attn_pdrop=0.2,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.gpt = GPT2LMHeadModel(config)

    def forward(self, films: Tensor) -> Tensor:
        """Return the logits of the film that follows each film, (b, LENGTH, films + 1)."""
        return self.gpt(input_ids=films).logits


def histories() -> list[list[int]]:
    """Return the films of each person in the order in which they were rated."""
    file = package_folder("recbole", "movielens") / "dataset_example" / "ml-100k" / "ml-100k.inter"
    rated: dict[str, list[tuple[float, int]]] = {}
    for line in file.read_text("utf8").splitlines()[1:]:
        person, film, _, time = line.split("\t")
        rated.setdefault(person, []).append((float(time), int(film)))
    return [[film for _, film in sorted(of_person)] for of_person in rated.values()]


def row(films: list[int]) -> list[int]:
    """Return films as a row of LENGTH + 1, so that the first LENGTH places have a next one."""
    return [*films, *[NONE] * (LENGTH + 1 - len(films))]


def movielens() -> Domain:
    """Return the domain."""
    people = histories()
    pieces = [
        row(films[start:-1][: LENGTH + 1])
        for films in people
        for start in range(0, len(films) - 2, LENGTH)
    ]
    train = torch.tensor(pieces)
    known = torch.tensor([row(films[-LENGTH - 1 : -1])[:-1] for films in people])
    films = torch.tensor([row(films[-LENGTH - 1 :])[1:] for films in people])
    is_last = (films != NONE) & (F.pad(films[:, 1:], (0, 1), value=NONE) == NONE)
    return Domain(
        train=(train[:, :-1], train[:, 1:]),
        held_out=(known, films.masked_fill(~is_last, NONE)),
        model=lambda: Films(max(map(max, people))),
        loss=loss,
        metrics={"hit rate at 10": hits},
        steps=1000,
        batch=64,
    )


def loss(logits: Tensor, films: Tensor) -> Tensor:
    """Return the mean loss over places that have a next film, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), films.flatten(), ignore_index=NONE)


def hits(logits: Tensor, films: Tensor) -> Tensor:
    """Return the hit rate at 10: how often the next film is among the ten likeliest ones."""
    asked = films != NONE
    told = logits[asked].topk(10).indices == films[asked][:, None]
    return told.any(-1).float().mean()
