"""Zero-shot scores against the library's own image-text forward, and prompts as users write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from foveate.errors import ModelError, UsageError
from foveate.interfaces import Target
from vit_models import open_tiny, photos, sharpen, toy_tokenizer

PROMPTS = ["france", "a cat", "zebra dog", "mongolia"]


def opened(case: str, prompts: Any = PROMPTS, **options: Any) -> Any:
    """The prompts are embedded when the model opens, so they are embedded again after sharpening."""
    source = open_tiny(case, prompts=prompts, tokenizer=toy_tokenizer(), **options)
    source._texts = source._embed_prompts(None, source.prompts, toy_tokenizer())
    return source


def their_logits(source: Any, batch: Any, texts: list[str]) -> torch.Tensor:
    """``logits_per_image`` of the model's own forward over images and texts."""
    name = type(source.module).__name__
    encoded = toy_tokenizer()(texts, padding="max_length", max_length=16, return_tensors="pt")
    arguments: dict[str, Any] = {"input_ids": encoded["input_ids"]}
    if name == "CLIPModel":  # SigLIP's texts are attended with their padding
        arguments["attention_mask"] = encoded["attention_mask"]

    def call(**pictures: Any) -> Any:
        return source.module(**pictures, **arguments)

    with torch.no_grad():
        return source._call(call, batch.inputs).logits_per_image.double()


@pytest.mark.parametrize("case", ["CLIPModel", "SiglipModel", "Siglip2Model"])
def test_zero_shot_and_match_are_the_models_own(case: str) -> None:
    source = opened(case)
    if hasattr(source.module, "logit_bias"):
        source.module.logit_bias.data.fill_(-0.7)
    batch = source.encode(photos(3))
    expected = their_logits(source, batch, PROMPTS)
    outputs = source.forward(batch)
    torch.testing.assert_close(outputs.logits.double(), expected, atol=2e-5, rtol=2e-5)
    bound = source.bind(outputs, batch, Target())
    assert [row.class_index for row in bound.rows] == expected.argmax(-1).tolist()
    torch.testing.assert_close(
        source.score(outputs, batch, bound).double(), expected.softmax(-1).amax(-1), atol=1e-5, rtol=1e-4
    )
    if case != "CLIPModel":
        bound = source.bind(outputs, batch, Target("match", "zebra dog"))
        torch.testing.assert_close(
            source.score(outputs, batch, bound).double(), expected[:, 2].sigmoid(), atol=1e-5, rtol=1e-4
        )
        torch.testing.assert_close(
            source.score(outputs, batch, bound.at("logit")).double(), expected[:, 2], atol=2e-5, rtol=2e-5
        )


def test_targets_follow_what_the_model_can_answer() -> None:
    assert opened("CLIPModel").targets == ("zero_shot", "feature")
    assert opened("SiglipModel").targets == ("zero_shot", "match", "feature")
    assert open_tiny("CLIPModel").targets == ("feature",)
    assert open_tiny("CLIPVisionModel").targets == ("feature",)
    assert open_tiny("CLIPForImageClassification").targets == ("class",)


def test_the_order_of_prompts_does_not_matter() -> None:
    one, other = opened("CLIPModel"), opened("CLIPModel", PROMPTS[::-1])
    batch = one.encode(photos(2))
    first = one.predictions(one.forward(batch), batch)
    second_batch = other.encode(photos(2))
    second = other.predictions(other.forward(second_batch), second_batch)
    for a, b in zip(first, second, strict=True):
        assert [p.label for p in a] == [p.label for p in b]
        assert [p.score for p in a] == pytest.approx([p.score for p in b], abs=1e-6)


def test_a_prompt_file_is_one_a_line_and_the_label_is_the_line(tmp_path: Path) -> None:
    path = tmp_path / "countries.txt"
    path.write_text("\ufefffrance\n\n  a cat \r\nzebra dog\nmongolia\n", encoding="utf-8")
    by_file, by_list = opened("CLIPModel", path), opened("CLIPModel", PROMPTS)
    assert by_file.prompts.labels == tuple(PROMPTS)
    batch = by_file.encode(photos(2))
    assert torch.equal(by_file.forward(batch).logits, by_list.forward(by_list.encode(photos(2))).logits)


def test_a_template_changes_the_text_and_not_the_label() -> None:
    source = opened("CLIPModel", template="in {}")
    batch = source.encode(photos(2))
    expected = their_logits(source, batch, [f"in {text}" for text in PROMPTS])
    torch.testing.assert_close(source.forward(batch).logits.double(), expected, atol=2e-5, rtol=2e-5)
    assert source.predictions(source.forward(batch), batch)[0][0].label in PROMPTS


def test_prompts_are_given_to_the_forward_by_the_batch() -> None:
    source = opened("CLIPModel")
    batch = source.encode(photos(2))
    assert batch.shared["prompts"].shape == (4, 512)
    again = batch.replace(batch.inputs[[1, 1]], [1, 1])
    torch.testing.assert_close(source.forward(again).logits, source.forward(batch).logits[[1, 1]])


def test_sharpening_after_opening_needs_new_text_embeddings() -> None:
    """The helper above is not idle: old embeddings give other logits."""
    source = open_tiny("CLIPModel", prompts=PROMPTS, tokenizer=toy_tokenizer())
    stale = source.forward(source.encode(photos(1))).logits
    sharpen(source.module)
    source._texts = source._embed_prompts(None, source.prompts, toy_tokenizer())
    assert not torch.allclose(source.forward(source.encode(photos(1))).logits, stale, atol=1e-3)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "none given"),
        (["  ", ""], "none given"),
        (["cat", "dog", "cat "], "more than once"),
        ("no/such/file.txt", "cannot read"),
        (["a very long prompt that does not fit"], "16"),
    ],
)
def test_prompts_that_mean_nothing_are_refused(prompts: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_tiny("CLIPModel", prompts=prompts, tokenizer=toy_tokenizer())


def test_a_template_without_a_place_is_refused() -> None:
    with pytest.raises(UsageError, match="template"):
        open_tiny("CLIPModel", prompts=PROMPTS, template="a photo", tokenizer=toy_tokenizer())


def test_prompts_without_text_tower_or_tokenizer_say_what_to_do() -> None:
    with pytest.raises(UsageError, match="no text tower"):
        open_tiny("CLIPVisionModel", prompts=PROMPTS, tokenizer=toy_tokenizer())
    with pytest.raises(ModelError, match="tokenizer"):
        open_tiny("CLIPModel", prompts=PROMPTS)


def test_the_tokenizer_beside_the_weights_is_found(tmp_path: Path) -> None:
    from foveate.plugins.opening import open_source

    source = opened("CLIPModel")
    source.module.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    again = open_source(tmp_path, prompts=PROMPTS)
    batch = source.encode(photos(2))
    torch.testing.assert_close(again.forward(again.encode(photos(2))).logits, source.forward(batch).logits)


def test_targets_that_cannot_be_explained_name_the_remedy() -> None:
    bare = open_tiny("CLIPModel")
    batch = bare.encode(photos(1))
    with pytest.raises(UsageError, match="--prompts"):
        bare.bind(bare.forward(batch), batch, Target("zero_shot"))
    single = opened("CLIPModel", ["cat"])
    batch = single.encode(photos(1))
    outputs = single.forward(batch)
    with pytest.raises(UsageError, match="always 1"):
        single.bind(outputs, batch, Target())
    assert single.score(outputs, batch, single.bind(outputs, batch, Target(scale="logit"))).shape == (1,)
