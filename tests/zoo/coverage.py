"""Which of transformers' models with pictures and attention the zoo leaves out: none is skipped in silence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from zoo.examine import Report

PICTURES = re.compile(r"pixel_values|flattened_patches|visual_feats|visual_embeds")
ATTENTION = re.compile(r"softmax|ALL_ATTENTION_FUNCTIONS|scaled_dot_product|MultiheadAttention")

REASONS = {
    "dinat": "needs natten, whose kernels are outside of torch",
    "edgetam": "its default backbone needs timm",
    "gemma3n": "its vision tower needs timm",
    "pe_audio_video": "its vision tower needs timm",
    "pe_video": "its vision tower needs timm",
    "timm_backbone": "needs timm",
    "timm_wrapper": "needs timm",
    "inkling": "its vision tower does not attend",
    "musicgen": "names pixel_values in a signature, takes no pictures",
    "musicgen_melody": "names pixel_values in a signature, takes no pictures",
}


def folders() -> list[str]:
    """Model folders of the installed transformers whose code takes pictures and attends."""
    import transformers

    found = set()
    for path in Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        source = path.read_text(encoding="utf-8")
        if PICTURES.search(source) and ATTENTION.search(source):
            found.add(path.parent.name)
    return sorted(found)


def left_out(reports: Sequence[Report]) -> dict[str, str]:
    """Folders of which no module was run, with the reason."""
    seen = set().union(*(report.folders for report in reports))
    reason = "no tiny configuration written yet"
    return {name: REASONS.get(name, reason) for name in folders() if name not in seen}
