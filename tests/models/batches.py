"""Batches [(samples, batch)] of every kind that comes up: two alike, one as long as it is wide, a shorter last one."""

import torch
from torch.nn import functional as F

CLASSES, WORDS = 3, 23


def pictures(shape=(1, 8, 8), sizes=(5, 5, 2, 1)):
    """(inputs, classes)."""
    return [
        (size, (torch.randn(size, *shape, dtype=torch.float64), torch.randint(0, CLASSES, (size,)))) for size in sizes
    ]


def sentences(sizes=((5, 6), (5, 6), (4, 4), (1, 5))):
    """(words, classes), where word 0 is padding at the end."""
    return [(size, (_padded(size, length)[0], torch.randint(0, CLASSES, (size,)))) for size, length in sizes]


def named(labels="classes", sizes=((5, 6), (5, 6), (4, 4), (1, 5)), left=False):
    """As a tokenizer makes them: input_ids, attention_mask and labels of classes, tokens or the words themselves."""
    return [(size, _named(labels, size, length, left)) for size, length in sizes]


def _named(labels, size, length, left):
    words, mask = _padded(size, length, left)
    own = {
        "classes": torch.randint(0, CLASSES, (size,)),
        "tokens": torch.randint(0, CLASSES, (size, length)).masked_fill(mask == 0, -100),
        "words": words.masked_fill(mask == 0, -100),
    }
    return {"input_ids": words, "attention_mask": mask, "labels": own[labels]}


def _padded(size, length, left=False):
    lengths = torch.randint(max(2, length // 2), length + 1, (size, 1))
    lengths[0] = length
    mask = (torch.arange(length) < lengths).long()
    mask = mask.flip(1) if left else mask
    return torch.randint(2, WORDS, (size, length)) * mask, mask


def of_classes(model, batch):
    """Cross entropy of one class a sample."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return F.cross_entropy(model(**inputs).logits, batch["labels"], reduction="none")


def of_tokens(model, batch):
    """Each sample's mean cross entropy over its own tokens."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return _mean(model(**inputs).logits, batch["labels"])


def of_next_words(model, batch):
    """Each sample's mean cross entropy of the next word."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return _mean(model(**inputs).logits[:, :-1], batch["labels"][:, 1:])


def _mean(logits, labels):
    each = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=-100)
    return each.sum(1) / (labels != -100).sum(1)
