"""Prompts: read once from a list or a file, embedded once by the text tower, then only compared with.

A prompt's label is the line the user wrote; what the tower reads is the template filled with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foveate.errors import ModelError, UsageError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from foveate_vit.loading import Loaded


@dataclass(frozen=True)
class Prompts:
    """What the user asks the model to choose among."""

    labels: tuple[str, ...]
    template: str = "{}"

    @classmethod
    def read(cls, given: Sequence[str] | Path | str, template: str = "{}") -> Prompts:
        """A list of labels, or the path of a UTF-8 text file with one a line (blank lines do not count).

        Raises UsageError for a missing file, no prompts, duplicates, or a template without ``{}``.
        """
        lines = _lines(Path(given)) if isinstance(given, str | Path) else [str(line) for line in given]
        labels = tuple(line.strip() for line in lines if line.strip())
        if not labels:
            raise UsageError("prompts: none given", remedy="a list, or a text file with one prompt a line")
        if len(set(labels)) < len(labels):
            twice = sorted({label for label in labels if labels.count(label) > 1})
            raise UsageError(f"prompts: {twice[0]!r} appears more than once", remedy="remove the duplicates")
        if "{}" not in template:
            raise UsageError(f"template {template!r} has no {{}}", remedy="for instance 'a photo of {}'")
        return cls(labels, template)

    @property
    def texts(self) -> tuple[str, ...]:
        """What the text tower reads."""
        return tuple(self.template.replace("{}", label) for label in self.labels)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"prompts: cannot read {path}: {error}", remedy="a UTF-8 text file with one prompt a line, or a list"
        ) from error


def open_tokenizer(loaded: Loaded) -> Any:
    """The tokenizer beside the weights. Raises ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        if loaded.beside is None:
            raise OSError("these random weights belong to no checkpoint")
        place = Path(loaded.beside)
        where = str(place.parent) if place.is_file() else loaded.beside
        return AutoTokenizer.from_pretrained(where, revision=loaded.card.revision or None, trust_remote_code=False)
    except (OSError, ValueError, ImportError, TypeError) as error:
        raise ModelError(
            f"{loaded.card.id}: no tokenizer for prompts: {str(error).strip().splitlines()[0][:200]}",
            remedy="keep tokenizer.json and tokenizer_config.json beside the weights, or pass tokenizer=...",
        ) from error


def tokenise(tokenizer: Any, texts: Sequence[str], length: int, *, device: Any) -> Tensor:
    """Token ids ``(text, length)``, every text padded to the tower's ``length``.

    CLIP reads at the first end-of-text token under a causal mask, so padding cannot reach it; SigLIP was
    trained on texts padded to full length. Raises UsageError for a text that does not fit.
    """
    import torch

    encoded = tokenizer(list(texts), padding="max_length", max_length=length, truncation=False)["input_ids"]
    for text, ids in zip(texts, encoded, strict=True):
        if len(ids) > length:
            raise UsageError(
                f"prompt {text[:60]!r} has {len(ids)} tokens; the text tower takes {length}",
                remedy="shorten the prompt or the template",
            )
    return torch.tensor(encoded, device=device)


def embed(model: nn.Module, ids: Tensor) -> Tensor:
    """Unit embeddings ``(text, channel)`` of token ids, without gradient."""
    import torch

    with torch.no_grad():
        found: Tensor = model.get_text_features(input_ids=ids).pooler_output  # type: ignore[operator]
    return torch.nn.functional.normalize(found, dim=-1)
