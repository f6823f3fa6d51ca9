"""Sentences about four topics, a tokenizer of their words, and BERTs of some thousand parameters.

In: a seed, a folder. Out: rows of text, and folders that ``from_pretrained`` reads.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, PreTrainedTokenizerFast

TOPICS = {
    "animals": ["cat", "dog", "bird", "fish", "horse", "mouse"],
    "colors": ["red", "blue", "green", "white", "black", "yellow"],
    "food": ["bread", "rice", "soup", "cheese", "apple", "salad"],
    "places": ["river", "forest", "city", "hill", "harbour", "road"],
}
SPECIAL = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
SPECIAL["mask_token"] = "[MASK]"


def sentences(count, seed=0):
    """Rows ``(topic, sentence)`` of three words each."""
    draw = random.Random(seed)
    topics = [draw.choice(list(TOPICS)) for _ in range(count)]
    return [(topic, " ".join(draw.sample(TOPICS[topic], 3))) for topic in topics]


def pairs(count, seed=0):
    """Columns: two sentences, and whether they are about one topic."""
    first, second = sentences(count, seed), sentences(count, seed + 1)
    # Every other pair is about one topic.
    second = [
        (topic, " ".join(reversed(text.split()[:2]))) if number % 2 else other
        for number, ((topic, text), other) in enumerate(zip(first, second, strict=True))
    ]
    return {
        "sentence1": [text for _, text in first],
        "sentence2": [text for _, text in second],
        "label": [float(a == b) for (a, _), (b, _) in zip(first, second, strict=True)],
    }


def word_tokenizer():
    words = [word for topic in TOPICS.values() for word in topic]
    vocabulary = {word: number for number, word in enumerate([*SPECIAL.values(), *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=16, **SPECIAL)


def saved_bert(folder, kind, **more):
    """Save a BERT of two layers, of a class of transformers, with its tokenizer."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
