"""Classification as a conversation: a causal model answers with the label.

In: settings. Out: a stock ``Trainer``, and facts about model and rows. Only the answer has labels;
the prompt is masked. Accuracy compares the log-probabilities of the label tokens at the end of the
prompt, so it needs no generation and is defined even before training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import adapters
import datasets
import torch
from classification import by_length
from peft import get_peft_model
from settings import DataSettings, ModelSettings
from shared import tweets
from shared.arguments import RecipeError
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    EvalPrediction,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)

QUESTION = "Is the sentiment of this tweet negative, neutral or positive? Answer with one word."
IGNORED = -100


def build(
    model: ModelSettings, data: DataSettings, args: TrainingArguments
) -> tuple[Trainer, dict[str, Any]]:
    """Return the Trainer, and facts about model and rows."""
    tokenizer = adapters.tokenizer_of(model)
    answers = label_tokens(tokenizer)
    split = data.split()
    network = adapters.base_model(AutoModelForCausalLM, model, dtype=torch.float32)
    network = get_peft_model(network, adapters.lora_config(model, "CAUSAL_LM"))
    trainer = Trainer(
        model=network,
        args=args,
        train_dataset=encoded(split.train, tokenizer, data.max_tokens),
        eval_dataset=by_length(encoded(split.validation, tokenizer, data.max_tokens)),
        data_collator=Padding(tokenizer.pad_token_id),
        compute_metrics=Accuracy(answers),
        preprocess_logits_for_metrics=LabelScores(answers),
        processing_class=tokenizer,
        optimizers=(adapters.loraplus(model.loraplus_ratio, network, args), None),
    )
    return trainer, adapters.sizes(network) | tweets.facts(split)


def label_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the token of each label.

    Raises:
        RecipeError: the tokenizer has no chat template, or splits a label into several tokens.
    """
    if tokenizer.chat_template is None:
        raise RecipeError(
            "The model's tokenizer has no chat template, so the task 'chat' cannot ask it "
            "anything. Choose a model that was tuned to chat."
        )
    tokens = tokenizer(list(tweets.LABELS), add_special_tokens=False)["input_ids"]
    if any(len(ids) != 1 for ids in tokens):
        raise RecipeError(
            f"The model's tokenizer splits a label of {', '.join(tweets.LABELS)} into several "
            "tokens, whose probabilities cannot be compared. Choose another model."
        )
    return [ids[0] for ids in tokens]


def encoded(
    rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> datasets.Dataset:
    """Return each row's question, tweet and answer as tokens: the prompt, the label, the end."""
    answers = label_tokens(tokenizer)
    texts = shortened(rows["text"][:], tokenizer, max_tokens)
    prompts = tokenizer.apply_chat_template(
        [
            [{"role": "system", "content": QUESTION}, {"role": "user", "content": text}]
            for text in texts
        ],
        add_generation_prompt=True,
        return_dict=True,
    )["input_ids"]
    end = tokenizer.eos_token_id
    whole = [
        [*prompt, answers[label], end]
        for prompt, label in zip(prompts, rows["label"][:], strict=True)
    ]
    return datasets.Dataset.from_dict({"input_ids": whole})


def shortened(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[str]:
    """Return texts of at most ``max_tokens`` tokens; a cut prompt would lose its end."""
    tokens = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return tokenizer.batch_decode([ids[:max_tokens] for ids in tokens])


@dataclass(frozen=True)
class Padding:
    """Collator that pads on the left, so that a batch's answers are in the same columns.

    With its argument ``logits_to_keep``, the model then computes logits only for the three columns
    that predict the answers. A vocabulary of 49,152 for every token of the prompt would cost a
    fifth of the step.
    """

    token: int

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Any]:
        """Return the batch: tokens, mask (batch, length) and labels (batch, 3)."""
        ids = [row["input_ids"] for row in rows]
        longest = max(map(len, ids))
        padded = torch.tensor([[self.token] * (longest - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in ids])
        labels = padded[:, -3:].clone()  # end of the prompt, label, end of the answer
        labels[:, 0] = IGNORED
        return {"input_ids": padded, "attention_mask": mask, "labels": labels, "logits_to_keep": 3}


@dataclass(frozen=True)
class LabelScores:
    """Reduces the logits to what the metric needs, so that evaluation stores little."""

    answers: Sequence[int]

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the log-probability of each label as the answer's first token (batch, 3)."""
        return logits[:, 0].float().log_softmax(-1)[:, self.answers]  # column 0 predicts column 1


@dataclass(frozen=True)
class Accuracy:
    """The share of rows whose label is the most probable of the three."""

    answers: Sequence[int]

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Return the metric from label scores (rows, 3) and labels (rows, 3)."""
        chosen = torch.tensor(self.answers)[prediction.predictions.argmax(-1)]
        return {"accuracy": float((chosen.numpy() == prediction.label_ids[:, 1]).mean())}
