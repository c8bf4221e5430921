"""Prompts of open-vocabulary detectors as token ids, by the model's tokenizer or given by the user."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import UsageError
from foveate_vit.prompts import Prompts, open_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

    from foveate_vit.loading import Loaded

CLS, SEP, STOP = 101, 102, 1012
"""BERT's [CLS], [SEP] and full stop: what Grounding DINO cuts its text by (fixed in its code)."""


def read_prompts(prompts: Sequence[str] | Path | str | None) -> tuple[str, ...]:
    """Labels from a list or a file with one a line. Raises UsageError where there are none."""
    if prompts is None:
        raise UsageError("an open-vocabulary detector needs to know what to look for", remedy='prompts=["a cat"]')
    return Prompts.read(prompts).labels


def clip_ids(loaded: Loaded, labels: Sequence[str], given: Sequence[Sequence[int]] | None) -> Tensor:
    """Token ids of each prompt, (prompt, token), padded as OWLv2's processor does."""
    if given is not None:
        return _table(given, labels)
    config: Any = loaded.model.config
    length = int(config.text_config.max_position_embeddings)
    encoded = open_tokenizer(loaded)(list(labels), padding="max_length", max_length=length, truncation=True)
    return torch.as_tensor(encoded["input_ids"], dtype=torch.long)


def phrase_ids(
    loaded: Loaded, labels: Sequence[str], given: Sequence[Sequence[int]] | None
) -> tuple[list[int], list[list[int]], tuple[str, ...]]:
    """One text "a cat. a dog.": its token ids, each prompt's positions in it, and the words of its tokens."""
    if given is not None:
        _table(given, labels)
        phrases, words = [list(map(int, ids)) for ids in given], None
    else:
        words = open_tokenizer(loaded)
        phrases = [words(label.lower().strip(". "), add_special_tokens=False)["input_ids"] for label in labels]
    ids, spans = [CLS], []
    for phrase in phrases:
        spans.append(list(range(len(ids), len(ids) + len(phrase))))
        ids += [*phrase, STOP]
    ids.append(SEP)
    names = words.convert_ids_to_tokens(ids) if words is not None else [str(i) for i in ids]
    return ids, spans, tuple(map(str, names))


def _table(given: Sequence[Sequence[int]], labels: Sequence[str]) -> Tensor:
    if len(given) != len(labels) or not all(len(ids) for ids in given):
        raise UsageError(f"prompt_ids: {len(given)} lists of token ids for {len(labels)} prompts")
    width = max(len(ids) for ids in given)
    return torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in given], dtype=torch.long)
