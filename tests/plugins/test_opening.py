"""From a reference to a model: registry ids, folders, hub ids, and every way in which that goes wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import foveate
from fake_packages import Install
from foveate.errors import MissingDependencyError, ModelError, PluginError, UsageError
from foveate.plugins.opening import find_row, open_source
from foveate.plugins.rows import ModelRow

PLUGIN = """
@hookimpl
def foveate_sources():
    return [
        SourceSpec("tiny-tests", "foveate.testing.tiny:TinySource", ""),
        SourceSpec("strict", "plugin_tiny:Strict", ""),
        SourceSpec("passing", "plugin_tiny:Passing", ""),
        SourceSpec("bad", "plugin_tiny:Bad", ""),
        SourceSpec("liar", "plugin_tiny:Liar", ""),
    ]

def __getattr__(name):
    from foveate.testing.tiny import TinySource
    class Strict(TinySource):
        @classmethod
        def open(cls, row, *, weights=None, device="cpu", dtype="float32", layers=2):
            return super().open(row, weights=weights, device=device, dtype=dtype, layers=layers)
    class Passing(Strict):
        @classmethod
        def open(cls, row, *, blur=0, **options):
            return super().open(row, **options)
    class Bad(TinySource):
        @classmethod
        def open(cls, row, **given):
            raise KeyError("inner")
    class Liar(TinySource):
        @classmethod
        def open(cls, row, **given):
            return "not a source"
    try:
        return {"Strict": Strict, "Passing": Passing, "Bad": Bad, "Liar": Liar}[name]
    except KeyError:
        raise AttributeError(name)
"""
ROWS = """schema = 1
[[family]]
id = "tiny-family"
source = "tiny-tests"
model_types = ["tinymodel", "shared"]
options = { layers = 3, heads = 2 }
[[family]]
id = "other-family"
source = "strict"
model_types = ["shared"]
[[model]]
id = "tests/tiny"
family = "tiny-family"
licence = "MIT"
provenance = "made for a test"
options = { layers = 1 }
expect = { image = 32, patch = 8, layers = 1, heads = 2 }
[[model]]
id = "tests/wrong"
family = "tiny-family"
licence = "MIT"
provenance = "made for a test"
expect = { image = 48, grid = [6, 6], heads = 2 }
[[model]]
id = "tests/gone"
family = "tiny-family"
licence = "MIT"
provenance = "made for a test"
weights = "not/there"
"""


@pytest.fixture(autouse=True)
def tiny(install: Install) -> None:
    files = {"package_tiny/__init__.py": "", "package_tiny/registry.toml": ROWS}
    groups = {"foveate": {"tiny": "plugin_tiny"}, "foveate.registry": {"tiny": "package_tiny"}}
    install("tiny", PLUGIN, groups=groups, files=files)


def folder(path: Path, model_type: str) -> Path:
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def test_a_registry_id_opens_with_options_of_family_row_and_caller() -> None:
    assert foveate.open("tests/tiny").facts()["layers"] == 1
    assert foveate.open("tests/tiny").facts()["heads"] == 2
    assert open_source("tests/tiny", seed=4).card.source == "tiny"


def test_a_model_that_is_not_what_the_row_expects() -> None:
    with pytest.raises(ModelError) as caught:
        open_source("tests/wrong")
    assert "image: expected 48, got 32" in caught.value.message
    assert "grid: expected [6, 6], but the source does not state it" in caught.value.message
    assert "heads" not in caught.value.message
    assert open_source("tests/wrong", weights="random").facts()["image"] == 32, "random weights expect nothing"


def test_an_option_can_break_what_is_expected() -> None:
    with pytest.raises(ModelError, match="layers: expected 1, got 5"):
        open_source("tests/tiny", layers=5)


def test_shipped_weights_that_are_gone() -> None:
    with pytest.raises(ModelError, match="its weights are not there"):
        open_source("tests/gone")


def test_a_folder_opens_by_its_model_type(tmp_path: Path) -> None:
    path = folder(tmp_path / "mine", "tinymodel")
    row = find_row(str(path))
    assert (row.id, row.family.id, row.weights, row.expect) == ("mine", "tiny-family", path, {})
    assert open_source(path).facts()["layers"] == 3


def test_a_type_that_two_families_claim_asks_for_a_choice(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "both", "shared"))
    with pytest.raises(UsageError) as caught:
        find_row(path)
    assert "claimed by tiny-family, other-family" in caught.value.message
    assert "source='tiny-family'" in caught.value.remedy
    assert find_row(path, "other-family").source == "strict"
    assert find_row(path, "strict").family.id == "other-family"


def test_a_type_that_nobody_claims(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "odd", "unheard_of"))
    with pytest.raises(UsageError, match="no plugin claims model_type 'unheard_of'") as caught:
        find_row(path)
    assert "tinymodel" in caught.value.remedy
    assert find_row(path, "strict").source == "strict"


@pytest.mark.parametrize("text", ["{not json", "[1, 2]"])
def test_a_config_that_is_no_config(text: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "odd", "x")
    (path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        find_row(str(path))


def test_a_folder_without_a_config(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no config"):
        find_row(str(tmp_path))


def test_a_named_source_takes_any_reference() -> None:
    row = find_row("anything at all", "strict")
    assert (row.id, row.source) == ("anything at all", "strict")
    assert open_source("anything at all", source="tiny-tests", layers=2).facts()["layers"] == 2
    with pytest.raises(UsageError, match="no source named 'no-such'"):
        open_source("x", source="no-such")


def test_a_family_opens_by_itself() -> None:
    assert open_source("tiny-family", weights="random").facts()["layers"] == 3


@pytest.mark.parametrize("reference", ["tests/tinny", "tiny-famly"])
def test_close_names_are_given(reference: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.plugins.opening._looks_like_hub_id", lambda reference: False)
    with pytest.raises(UsageError) as caught:
        find_row(reference)
    assert "did you mean" in caught.value.remedy


def test_a_hub_id_is_read_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    path = folder(tmp_path / "hub", "tinymodel") / "config.json"
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda repo, name, **how: str(path))
    row = find_row("somebody/model")
    assert (row.id, row.family.id, row.weights, row.owner) == ("somebody/model", "tiny-family", None, "hub")


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def offline(repo: str, name: str, **how: object) -> str:
        raise OSError("no route to host")

    calls = []

    def one_question(self: object, repo: str, **how: object) -> None:
        calls.append(repo)
        raise RuntimeError("no route to host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", one_question)
    with pytest.raises(ModelError, match=r"the hub did not give its config\.json: OSError: .*no route") as caught:
        find_row("tests/tinny")
    assert "give its folder" in caught.value.remedy
    assert "did you mean tests/tiny" in caught.value.remedy
    assert calls == ["tests/tinny"]  # asked once: the client's own retries take half a minute


def test_without_the_hub_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.plugins.opening.is_installed", lambda name: False)
    with pytest.raises(MissingDependencyError) as caught:
        find_row("somebody/model")
    assert "pip install huggingface_hub" in caught.value.remedy


def test_an_option_that_the_adapter_does_not_take() -> None:
    assert open_source("x", source="strict", layers=1).facts()["layers"] == 1
    with pytest.raises(UsageError, match="takes no option 'colour'") as caught:
        open_source("x", source="strict", colour="red")
    assert caught.value.remedy == "its options: layers"
    with pytest.raises(UsageError, match="source 'passing' takes no option 'colour'") as caught:
        open_source("x", source="passing", colour="red")  # refused further down, where `open` passes it on
    assert "blur and others" in caught.value.remedy


def test_an_adapter_that_raises_is_named() -> None:
    with pytest.raises(PluginError, match="source 'bad' failed to open x: KeyError: 'inner'"):
        open_source("x", source="bad")


def test_an_adapter_that_returns_something_else() -> None:
    with pytest.raises(PluginError, match="must return an AttentionSource, got 'not a source'"):
        open_source("x", source="liar")


def test_rows_are_what_the_contract_says() -> None:
    row = find_row("tests/tiny")
    assert isinstance(row, ModelRow)
    assert row.owner == "tiny"


def test_a_misspelt_shipped_model_is_refused_without_asking_the_hub(monkeypatch):
    monkeypatch.setattr("foveate.plugins.opening._hub_config", lambda reference: pytest.fail("the hub was asked"))
    with pytest.raises(UsageError, match="rim-vitt") as caught:
        open_source("foveate/rim-vitt")
    assert "foveate/rim-vit" in caught.value.remedy
