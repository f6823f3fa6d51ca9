"""A stream of blocks that knows its position, so that a run resumes without reading it all again.

In: rows of text, a tokenizer, the length of a block. Out: the blocks; and bookmarks, from which the
same blocks follow: how many blocks came before, where the rows were, which tokens were left over. A
checkpoint holds the last bookmark before the blocks that have not been trained on.
"""

from __future__ import annotations

import copy
import json
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

logger = logging.get_logger(__name__)

FILE = "stream.json"
AT_ONCE = 256  # documents; the tokenizer works on several in parallel


@dataclass(frozen=True)
class Bookmark:
    """A position in a stream, between two batches of documents."""

    blocks: int = 0  # number of earlier blocks
    rows: dict[str, Any] | None = None  # state of the rows; None: at the start
    left_over: list[int] = field(default_factory=list)  # tokens that did not fill a block


class BlockStream(IterableDataset):
    """The blocks of a stream of rows with a text column, read as they are needed.

    Args:
        rows: the documents.
        column: where their text is.
        tokenizer: its end-of-text token joins documents.
        seq_len: tokens of a block.
    """

    def __init__(
        self,
        rows: datasets.IterableDataset,
        column: str,
        tokenizer: PreTrainedTokenizerBase,
        seq_len: int,
    ) -> None:
        self.rows, self.column, self.tokenizer, self.seq_len = rows, column, tokenizer, seq_len
        self.start, self.skipped, self.passes = Bookmark(), 0, 0
        self.bookmarks: deque[Bookmark] = deque()

    def go_on(self, place: Bookmark, trained: int) -> None:
        """Continue after the first ``trained`` blocks; ``place`` is at or before that position."""
        self.start, self.skipped = place, trained - place.blocks

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        """Yield the blocks from the start; every further pass reads all rows again."""
        worker = get_worker_info()
        if worker is not None and worker.id > 0:
            return  # only one process reads, or every block would come twice
        self.passes += 1
        start, self.start = self.start, Bookmark()
        skipped, self.skipped = self.skipped, 0
        yield from islice(self._blocks(start), skipped, None)

    def _blocks(self, start: Bookmark) -> Iterator[dict[str, torch.Tensor]]:
        rows = copy.deepcopy(self.rows)  # a loaded state would persist (datasets 5.2)
        if start.rows is not None:
            rows.load_state_dict(start.rows)
        texts = (row[self.column] for row in rows)
        blocks, buffer = start.blocks, list(start.left_over)
        self.bookmarks = deque([start])
        while batch := list(islice(texts, AT_ONCE)):
            documents = self.tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]
            after = rows.state_dict()
            for document in documents:
                buffer += [*document, self.tokenizer.eos_token_id]
                whole = len(buffer) - len(buffer) % self.seq_len
                for begin in range(0, whole, self.seq_len):
                    blocks += 1
                    yield {"input_ids": torch.tensor(buffer[begin : begin + self.seq_len])}
                del buffer[:whole]
            self.bookmarks.append(Bookmark(blocks, after, list(buffer)))

    def place(self, trained: int) -> Bookmark:
        """Return the last bookmark that is not after ``trained`` blocks; drop earlier ones."""
        while len(self.bookmarks) > 1 and self.bookmarks[1].blocks <= trained:
            self.bookmarks.popleft()
        return self.bookmarks[0]


class KeepPlace(TrainerCallback):
    """Writes the position in a stream into each checkpoint."""

    def __init__(self, stream: BlockStream, blocks_per_step: int) -> None:
        self.stream, self.blocks_per_step = stream, blocks_per_step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop bookmarks that have been passed."""
        if self.stream.bookmarks:
            self.stream.place(state.global_step * self.blocks_per_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Write the position, from the process that reads the stream."""
        trained = state.global_step * self.blocks_per_step
        if state.is_world_process_zero and self.stream.bookmarks:
            path = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}" / FILE
            if self.stream.passes > 1:  # steps do not tell the position: a pass may end short
                path.unlink(missing_ok=True)
                logger.warning(
                    "The stream has begun again: training does not go on from %s exactly.",
                    path.parent,
                )
                return
            content = asdict(self.stream.place(trained)) | {"trained": trained}
            written = path.with_suffix(".tmp")  # the run may be killed while it writes
            written.write_text(json.dumps(content), encoding="utf8")
            written.replace(path)


def keep_place(trainer: Trainer, blocks_per_step: int, checkpoint: str | None) -> None:
    """Make a trainer save its position in a stream, and resume from that of a checkpoint.

    If the checkpoint has no position, the Trainer reads the stream again up to where it stopped.
    """
    stream = trainer.train_dataset
    if not isinstance(stream, BlockStream) or (checkpoint and trainer.args.ignore_data_skip):
        return  # no stream, or one that was asked to start over: steps do not tell its position
    trainer.add_callback(KeepPlace(stream, blocks_per_step))
    path = Path(checkpoint or "") / FILE
    if checkpoint is None or trainer.args.dataloader_num_workers or not path.is_file():
        return
    saved = json.loads(path.read_text(encoding="utf8"))
    stream.go_on(Bookmark(saved["blocks"], saved["rows"], saved["left_over"]), saved["trained"])
    trainer.args.ignore_data_skip = True  # the stream skips them itself
