"""A stream of blocks goes on from its place: the same blocks, without reading the rest again."""

import json
from dataclasses import asdict
from itertools import islice
from types import SimpleNamespace

import datasets
import pytest

from tests.integration.preempted import write_stream
from tests.integration.recipes import import_recipe

recipe = import_recipe("llama_pretrain")
stream, tokenization = recipe["stream"], recipe["tokenizer"]
SEQ_LEN = 64


class Counted:
    """A tokenizer that counts the documents it is given."""

    def __init__(self, tokenizer):
        self.tokenizer, self.documents = tokenizer, 0
        self.eos_token_id = tokenizer.eos_token_id

    def __call__(self, texts, **options):
        self.documents += len(texts)
        return self.tokenizer(texts, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stream")
    write_stream(folder)
    return folder


@pytest.fixture(scope="module")
def bpe(folder, tmp_path_factory):
    texts = datasets.load_dataset(str(folder), streaming=True)["validation"]
    cache = tmp_path_factory.mktemp("cache")
    return tokenization.trained_bpe([row["text"] for row in texts], 300, cache)


@pytest.fixture
def opened(folder, bpe, monkeypatch):
    """Open the stream afresh, as another process would; documents come eight at a time."""
    monkeypatch.setattr(stream, "AT_ONCE", 8)

    def opened(skipped=0):
        rows = datasets.load_dataset(str(folder), streaming=True)["train"]
        rows = rows.skip(skipped) if skipped else rows
        return stream.BlockStream(rows, "text", Counted(bpe), SEQ_LEN)

    return opened


def read(blocks, count=None):
    return [block["input_ids"].tolist() for block in islice(blocks, count)]


@pytest.mark.parametrize("skipped", [0, 7])
@pytest.mark.parametrize("ahead", [0, 5])
@pytest.mark.parametrize("trained", [0, 1, 30, 100])
def test_the_blocks_after_a_place_are_those_that_were_not_trained_on(
    opened, trained, ahead, skipped
):
    whole = read(opened(skipped))
    assert len(whole) > 110
    before = opened(skipped)
    read(before, trained + ahead + 1)  # loaders read ahead of the training
    saved = json.loads(json.dumps(asdict(before.place(trained))))  # as a checkpoint holds it

    after = opened(skipped)
    after.go_on(stream.Bookmark(**saved), trained)
    assert read(after) == whole[trained:]
    assert read(after) == whole  # a further pass is one over all rows


def test_little_is_read_again(opened):
    before = opened()
    read(before, 101)
    place = before.place(100)
    assert 0 < place.blocks <= 100
    after = opened()
    after.go_on(place, 100)
    read(after, 1)
    assert before.tokenizer.documents > 5 * stream.AT_ONCE
    assert after.tokenizer.documents <= 2 * stream.AT_ONCE


def test_places_that_were_passed_are_forgotten(opened):
    blocks = opened()
    for trained, _ in enumerate(blocks):
        blocks.place(trained)
        assert len(blocks.bookmarks) <= 2
    assert trained > 110


def test_another_place_gives_other_blocks(opened):
    before = opened()
    read(before, 101)
    after = opened()
    after.go_on(before.place(100), 101)
    assert read(after, 20) != read(opened(), 120)[100:]


def test_a_place_is_kept_in_the_first_pass_alone(opened, tmp_path):
    """After it steps do not tell where a stream is: the last one of a pass may be short."""
    blocks, args = opened(), SimpleNamespace(output_dir=tmp_path)
    keeper = stream.KeepPlace(blocks, blocks_per_step=1)
    path = tmp_path / "checkpoint-100" / stream.FILE
    path.parent.mkdir()

    def save(step):
        keeper.on_save(args, SimpleNamespace(global_step=step, is_world_process_zero=True), None)

    read(blocks, 101)
    save(100)
    assert json.loads(path.read_text(encoding="utf8"))["trained"] == 100
    assert [each.name for each in path.parent.iterdir()] == [stream.FILE]
    read(blocks, 20)
    save(100)
    assert not path.exists()
