"""``foveate beside`` on files: labels first, then prompts for them, and a picture that cannot be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

pytest.importorskip("transformers")

from foveate.cli import beside as verb
from foveate.cli import main
from foveate.data.manifest import Manifest
from foveate.errors import UsageError
from foveate.interfaces import AttentionSource
from foveate.plugins.opening import open_source
from foveate.study.beside import Pictures, find_labels, run_beside
from foveate.study.clip_beside_detr import clip_beside_detr, prompts_for, surest
from foveate.testing.shapes import CLASSES, scenes
from vit_models import SHAPE, TEXT, sharpen, toy_tokenizer

METHOD = "grad_attention"


def tiny_clip(prompts: Sequence[str]) -> AttentionSource:
    config = {"vision_config": SHAPE, "text_config": TEXT | {"max_position_embeddings": 48}}
    tokenizer = toy_tokenizer()
    source = open_source("clip", weights="random", config=config, prompts=list(prompts), tokenizer=tokenizer)
    sharpen(source.module)
    source._texts = source._embed_prompts(None, source.prompts, tokenizer)
    return source


@pytest.fixture(scope="module")
def detector() -> AttentionSource:
    return open_source("foveate/shapes-cdetr")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("pictures")
    for i, drawn in enumerate(scenes(4, seed=11)):
        Image.fromarray(drawn.image).save(place / f"{i}.png")
    Image.fromarray(np.full((96, 96, 3), 128, np.uint8)).save(place / "blank.png")
    (place / "broken.png").write_bytes(b"no picture")
    return place


def test_labels_are_found_picture_by_picture_and_failures_told(detector: AttentionSource, folder: Path) -> None:
    manifest = Manifest.discover(folder)
    found = find_labels(detector, manifest)
    assert set(found.failed) == {"broken.png"}
    assert len(found.positions) == 5
    alone = [surest(detector, manifest.load(p)) or "" for p in found.positions]
    assert list(found.labels) == alone
    assert "" in found.labels  # the blank one
    assert "" not in found.distinct
    assert set(found.distinct) <= set(CLASSES)


def test_the_job_equals_the_function_on_loaded_pictures(detector: AttentionSource, folder: Path) -> None:
    manifest = Manifest.discover(folder)
    job = run_beside(tiny_clip, detector, manifest, method=METHOD)
    assert job.prompts == prompts_for(find_labels(detector, manifest).distinct)
    samples = [manifest.load(p) for p in job.pictures.positions]
    expected = clip_beside_detr(tiny_clip(job.prompts), detector, samples, method=METHOD)
    assert job.report.to_dict() == expected.to_dict()
    assert any("no object" in pair.reason for pair in job.report.pairs)
    assert "broken.png: not read" in job.to_text()


def test_pictures_are_a_lazy_sequence(folder: Path) -> None:
    manifest = Manifest.discover(folder)
    pictures = Pictures(manifest, [3, 0])
    assert [sample.id for sample in pictures] == [manifest.ids[3], manifest.ids[0]]
    assert [sample.id for sample in pictures[1:]] == [manifest.ids[0]]
    assert [sample.id for sample in pictures.named(manifest.ids[3])] == [manifest.ids[3]]


def test_no_object_anywhere_says_what_to_do(detector: AttentionSource, folder: Path) -> None:
    with pytest.raises(UsageError, match="found no object") as caught:
        run_beside(tiny_clip, detector, Manifest.discover(folder / "blank.png"), method=METHOD)
    assert "threshold" in str(caught.value.remedy)
    with pytest.raises(UsageError, match="can be read"):
        find_labels(detector, Manifest.discover(folder / "broken.png"))


def test_the_verb(
    monkeypatch: pytest.MonkeyPatch, detector: AttentionSource, folder: Path, tmp_path: Path
) -> None:
    asked: list[dict[str, Any]] = []

    def opened(model: str, weights: str | None, device: str, options: dict[str, Any]) -> AttentionSource:
        asked.append(options)
        return tiny_clip(options["prompts"]) if model == "clip" else detector

    monkeypatch.setattr(verb, "_open", opened)
    words = ["beside", "clip", "foveate/shapes-cdetr", str(folder), "--method", METHOD]
    dry = CliRunner().invoke(main, [*words, "--dry-run", "--json"])
    assert dry.exit_code == 0, dry.output
    plan = json.loads(dry.stdout)
    assert plan["pictures"] == 5
    assert asked == [{}]  # nothing but the detector was opened

    done = CliRunner().invoke(main, [*words, "--json", "-o", str(tmp_path / "beside.png")])
    assert done.exit_code == 5, done.output  # broken.png
    told = json.loads(done.stdout)
    assert told["prompts"] == list(prompts_for(plan["labels"]))
    assert asked[-1]["prompts"] == told["prompts"]
    assert list(told["failed"]) == ["broken.png"]
    assert (told["figure"] != "") == (tmp_path / "beside.png").exists()

    wrong = CliRunner().invoke(main, [*words, "--template", "a photo"])
    assert wrong.exit_code == 2
    assert "--template" in wrong.stderr
