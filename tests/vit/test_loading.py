"""Opening models: folders, single files, random weights, and everything that can be wrong with weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from foveate.errors import ModelError
from foveate.interfaces import Target
from foveate.plugins.opening import open_source
from foveate_vit.weights import sha256_of
from vit_models import CASES, open_tiny, photos


def scores(source: Any) -> torch.Tensor:
    batch = source.encode(photos(2))
    outputs = source.forward(batch)
    return source.score(outputs, batch, source.bind(outputs, batch, Target(scale="logit")))


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Any, Path]:
    source = open_tiny("ViTForImageClassification")
    source.module.save_pretrained(tmp_path / "model")
    return source, tmp_path / "model"


@pytest.mark.parametrize("case", CASES)
def test_a_saved_folder_opens_as_the_same_model(case: str, tmp_path: Path) -> None:
    source = open_tiny(case)
    source.module.save_pretrained(tmp_path)
    again = open_source(tmp_path)
    assert type(again.module) is type(source.module)
    assert torch.equal(scores(again), scores(source))
    assert again.card.weights_sha256 == sha256_of([tmp_path / "model.safetensors"])


def test_the_preprocessor_file_beside_the_weights_is_obeyed(saved: tuple[Any, Path]) -> None:
    from transformers import ViTImageProcessorPil

    _, folder = saved
    processor = ViTImageProcessorPil(size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(folder)
    opened = open_source(folder)
    theirs = processor(photos(1)[0].pixels, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(opened.encode(photos(1)).inputs, theirs)
    assert not any("defaults" in note for note in opened.card.notes)


def test_one_file_opens_with_the_config_beside_it_or_given(saved: tuple[Any, Path], tmp_path: Path) -> None:
    source, folder = saved
    beside = open_source("vit", weights=folder / "model.safetensors")
    alone = tmp_path / "alone" / "weights.safetensors"
    alone.parent.mkdir()
    shutil.copy(folder / "model.safetensors", alone)
    with pytest.raises(ModelError, match=r"no config\.json"):
        open_source("vit", weights=alone)
    given = open_source("vit", weights=alone, config=CASES["ViTForImageClassification"][1])
    by_path = open_source("vit", weights=alone, config=folder / "config.json")
    for opened in (beside, given, by_path):
        assert torch.equal(scores(opened), scores(source))


def test_a_pickle_of_tensors_is_read_and_hashed(saved: tuple[Any, Path]) -> None:
    source, folder = saved
    torch.save({"state_dict": load_file(folder / "model.safetensors")}, folder / "weights.pth")
    opened = open_source("vit", weights=folder / "weights.pth")
    assert torch.equal(scores(opened), scores(source))


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.target,)


def in_a_folder_without_safetensors(folder: Path, content: Any) -> Path:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("as_file", [False, True])
def test_a_pickle_that_could_run_code_is_refused_with_the_conversion_command(
    saved: tuple[Any, Path], tmp_path: Path, as_file: bool
) -> None:
    source, folder = saved
    state = load_file(folder / "model.safetensors")
    in_a_folder_without_safetensors(folder, {**state, "extra": Evil(tmp_path / "pwned")})
    with pytest.raises(ModelError, match="weights_only") as caught:
        open_source("vit", weights=folder / "pytorch_model.bin") if as_file else open_source(folder)
    assert not (tmp_path / "pwned").exists()
    command = caught.value.remedy.split("convert it once: ")[1].split()
    assert command[:3] == ["python", "-m", "foveate_vit.convert"]
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    assert (tmp_path / "pwned").exists()  # the flag says so: converting runs the pickle
    assert torch.equal(scores(open_source(folder)), scores(source))


def test_a_broken_pickle_says_so(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    torch.save({"a": torch.ones(100)}, folder / "weights.bin")
    (folder / "weights.bin").write_bytes((folder / "weights.bin").read_bytes()[:300])
    with pytest.raises(ModelError, match="refused"):
        open_source("vit", weights=folder / "weights.bin")


def test_a_broken_safetensors_file_says_so(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    (folder / "model.safetensors").write_bytes(b"<html>404</html>")
    for reference in ({"reference": folder}, {"reference": "vit", "weights": folder / "model.safetensors"}):
        with pytest.raises(ModelError):
            open_source(**reference)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_refused_by_name(saved: tuple[Any, Path], value: float) -> None:
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    state["classifier.weight"][3, 1] = value
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"1 of 160 numbers in 'classifier.weight'"):
        open_source(folder)


def test_missing_weights_are_not_filled_with_random_ones(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("classifier")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"2 parameters are missing .*classifier"):
        open_source(folder)


def test_the_unused_pooler_may_be_missing(tmp_path: Path) -> None:
    source = open_tiny("ViTModel")
    source.module.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    kept = {key: value for key, value in state.items() if "pooler" not in key}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(scores(open_source(tmp_path)), scores(source))


def test_another_shape_than_the_config_is_an_error(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    config = CASES["ViTForImageClassification"][1] | {"num_labels": 7}
    (folder / "config.json").unlink()
    with pytest.raises(ModelError):
        open_source("vit", weights=folder / "model.safetensors", config=config)


def test_the_vision_tower_of_a_whole_checkpoint_gives_the_same_tokens(tmp_path: Path) -> None:
    whole = open_tiny("CLIPModel")
    whole.module.save_pretrained(tmp_path)
    alone = open_source(tmp_path, architecture="CLIPVisionModel")
    assert type(alone.module).__name__ == "CLIPVisionModel"
    batch = whole.encode(photos(2))
    torch.testing.assert_close(
        alone.forward(batch).last_hidden_state, whole.forward(batch).last_hidden_state, atol=0, rtol=0
    )
    assert [s.id for s in alone.sites] == [s.id for s in whole.sites]


def test_another_family_and_an_unknown_architecture_are_named(saved: tuple[Any, Path]) -> None:
    _, folder = saved
    with pytest.raises(ModelError, match=r"model_type 'vit'.*'dinov2'"):
        open_source("dinov2", weights=folder)
    with pytest.raises(ModelError, match="no architecture 'ViTForEverything'"):
        open_source(folder, architecture="ViTForEverything")
    with pytest.raises(ModelError, match="dtype 'int8'"):
        open_source(folder, dtype="int8")


def test_a_hub_id_without_network_says_how_to_get_it() -> None:
    with pytest.raises(ModelError, match="dinov2-small") as caught:
        open_source("facebook/dinov2-small")
    assert "hf download facebook/dinov2-small" in caught.value.remedy


def test_random_weights_follow_their_seed_and_leave_the_generator_alone() -> None:
    config = CASES["ViTModel"][1]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one = open_source("vit", weights="random", config=config, seed=1)
    assert torch.equal(torch.rand(3), expected)
    same, other = (open_source("vit", weights="random", config=config, seed=s) for s in (1, 2))
    assert torch.equal(scores(one), scores(same))
    assert not torch.equal(scores(one), scores(other))
    assert "random weights" in one.card.notes[0]


def test_the_untrained_twin_of_a_folder_sees_the_same_pixels_and_prompts(tmp_path: Path) -> None:
    from transformers import CLIPImageProcessorPil

    from vit_models import toy_tokenizer

    open_tiny("CLIPModel").module.save_pretrained(tmp_path)
    toy_tokenizer().save_pretrained(tmp_path)
    CLIPImageProcessorPil(
        size={"shortest_edge": 40}, crop_size={"height": 28, "width": 28}, image_mean=[0.1, 0.2, 0.3]
    ).save_pretrained(tmp_path)
    trained, twin = (open_source(tmp_path, weights=w, prompts=["cat", "dog"]) for w in (None, "random"))
    assert torch.equal(trained.encode(photos(2)).inputs, twin.encode(photos(2)).inputs)
    assert trained.facts() == twin.facts()
    assert not torch.allclose(scores(trained), scores(twin))
    assert twin.card.weights_sha256.startswith("random:")


def test_opening_is_quiet_and_leaves_the_librarys_settings_alone(
    saved: tuple[Any, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    capfd.readouterr()
    open_source(saved[1])
    assert capfd.readouterr().err == ""
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_a_known_model_has_its_true_shape_even_with_random_weights() -> None:
    from foveate.plugins.opening import check_expect
    from foveate.plugins.registry import models

    for name in ("openai/clip-vit-base-patch32", "facebook/dinov2-with-registers-small"):
        source = open_source(name, weights="random")
        check_expect(models()[name], source.facts())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_gives_nearly_the_same_answer(saved: tuple[Any, Path], dtype: str) -> None:
    source, folder = saved
    half = open_source(folder, dtype=dtype)
    assert next(half.module.parameters()).dtype == getattr(torch, dtype)
    found = scores(half)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, scores(source), atol=0.3, rtol=0.1)


def test_the_module_is_in_eval_mode_and_frozen(saved: tuple[Any, Path]) -> None:
    opened = open_source(saved[1])
    assert not opened.module.training
    assert not any(p.requires_grad for p in opened.module.parameters())
