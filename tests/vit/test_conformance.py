"""The plugin passes the same battery that a stranger's has to."""

from __future__ import annotations

from typing import Any

from foveate.interfaces import Sample
from foveate.plugins.opening import open_source
from foveate.testing.conformance import PluginConformance, SourceConformance
from vit_models import TEXT, open_plonk, open_tiny, sharpen, toy_tokenizer

PROMPTS = ["france", "a cat", "zebra dog"]


class TestPlugin(PluginConformance):
    entry_point = "vit"


def kit(case: str, **options: Any) -> type[SourceConformance]:
    """One battery for one tiny model."""

    class Battery(SourceConformance):
        def open(self) -> Any:
            return open_tiny(case, **options)

    Battery.__name__ = Battery.__qualname__ = f"Test{case}"
    return Battery


KINDS = (  # one of each architecture; the other tests run over all cases
    "ViTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersModel",
    "DINOv3ViTModel",
    "CLIPVisionModel",
    "Siglip2Model",
)
for _case in KINDS:
    globals()[f"Test{_case}"] = kit(_case)
TestPrompts = kit("CLIPModel", prompts=PROMPTS, tokenizer=toy_tokenizer())
TestMatch = kit("SiglipModel", prompts=PROMPTS, tokenizer=toy_tokenizer())


class TestPlonk(SourceConformance):
    def open(self) -> Any:
        return open_plonk()


class TestText(SourceConformance):
    def open(self) -> Any:
        config = TEXT | {"model_type": "clip_text_model"}
        source = open_source("clip-text", weights="random", config=config, tokenizer=toy_tokenizer())
        sharpen(source.module)
        return source

    def samples(self) -> list[Sample]:
        pixels = super().samples()
        texts = ("a cat", "dogs", "on a mat")
        return [Sample(s.id, s.pixels, columns={"text": text}) for s, text in zip(pixels, texts, strict=True)]

    def test_encodes_in_order(self) -> None:
        self.skip("words have no geometry")

    def test_a_bright_square_lights_its_own_cell(self) -> None:
        self.skip("words do not lie on a picture")
