"""Writing loses nothing: whole batches only, nothing half there, everything in the ledger."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import zarr

from foveate.data.arrays import stored_specs
from foveate.data.layout import ArraySpec
from foveate.data.ledger import Ledger, ledger_folder, sweep
from foveate.data.run import Run
from foveate.data.schema import check_version, differences, digest, plain
from foveate.data.store import create
from foveate.errors import StoreError
from run_fakes import SITE, make_run, write

ATTENTION = f"sites/{SITE}/attention"


@pytest.mark.parametrize("cut_to", [1, 3])
def test_a_part_of_a_batch_is_refused_and_nothing_is_written(tmp_path, cut_to):
    made = make_run(tmp_path, count=10, batch=4, fill=False)
    with pytest.raises(StoreError, match="written whole"):
        made.arrays.write(0, {ATTENTION: made.attention[:cut_to]}, {})
    with pytest.raises(StoreError, match="got nothing"):
        made.arrays.write(0, {}, {})
    assert made.arrays.files(ATTENTION, 0)[0].exists() is False
    assert Ledger(made.path).entries() == {}


def test_the_last_batch_is_as_long_as_what_is_left(tmp_path):
    made = make_run(tmp_path, count=10, batch=4, fill=False)
    assert [part.stop - part.start for part in made.arrays.batches] == [4, 4, 2]
    write(made, 2)
    stored = made.run.site(SITE)["attention"].values
    np.testing.assert_array_equal(stored[8:], made.attention[8:])
    assert np.isnan(stored[:8]).all()


def test_entry_holds_the_checksum_of_every_file(tmp_path):
    made = make_run(tmp_path, count=10, batch=4)
    entries = Ledger(made.path).entries()
    assert sorted(entries) == [0, 1, 2]
    files = [name for entry in entries.values() for name in entry["files"]]
    on_disk = {
        p.relative_to(made.path).as_posix() for p in (made.path / ATTENTION / "c").rglob("*") if p.is_file()
    }
    assert set(files) == on_disk
    assert len(files) == 3
    for entry in entries.values():
        for name, recorded in entry["files"].items():
            assert (made.path / name).stat().st_size == recorded["size"]


def test_every_chunk_is_written_even_where_all_values_are_missing(tmp_path):
    made = make_run(tmp_path, count=4, batch=4, fill=False)
    made.arrays.write(0, {ATTENTION: np.full_like(made.attention, np.nan)}, {"samples": []})
    assert made.arrays.files(ATTENTION, 0)[0].exists()


def test_what_a_killed_writer_leaves_is_swept(made):
    left = made.path / ATTENTION / "c" / "0.abc.partial"
    left.write_bytes(b"half")
    half = ledger_folder(made.path) / "000009.tmp"
    half.write_text("{")
    assert sweep(made.path) == 2
    assert not left.exists()
    assert not half.exists()


def test_create_refuses_what_is_there_and_says_why_it_cannot_write(tmp_path, made):
    with pytest.raises(StoreError, match="exists already"):
        create(made.path, {}, [], 1, {}, {})
    blocked = tmp_path / "file"
    blocked.write_text("x")
    with pytest.raises(StoreError, match="cannot be written"):
        create(blocked / "run.zarr", {}, [], 1, {}, {})
    if os.geteuid() != 0:  # root may write anywhere
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
        with pytest.raises(StoreError, match="Permission denied"):
            create(locked / "run.zarr", {}, [], 1, {}, {})


def test_create_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    spec = ArraySpec("a/v", ("sample",), (3,), "float32")
    monkeypatch.setattr("foveate.data.store.consolidate", lambda path: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(StoreError, match="disk full"):
        create(tmp_path / "run.zarr", {}, [spec], 2, {}, {})
    assert list(tmp_path.iterdir()) == []


def test_an_old_ledger_without_its_store_is_not_believed(tmp_path):
    made = make_run(tmp_path, count=4, batch=4)
    import shutil

    shutil.rmtree(made.path)
    assert Ledger(made.path).entries()
    again = make_run(tmp_path, count=4, batch=4, fill=False)
    assert Ledger(again.path).entries() == {}


def test_unreadable_ledger_entry_names_the_remedy(made):
    (ledger_folder(made.path) / "000000.json").write_text("{")
    with pytest.raises(StoreError, match=r"delete that file"):
        Ledger(made.path).entries()


def test_stored_specs_are_those_that_were_allocated(made):
    (spec,) = stored_specs(made.path, [ATTENTION])
    assert (spec.dims, spec.shape, spec.dtype) == (
        ("sample", "layer", "head", "query", "key"),
        (5, 2, 3, 17, 17),
        "float16",
    )
    with pytest.raises(StoreError, match="not in the store"):
        stored_specs(made.path, ["sites/none/attention"])


def test_codec_and_fill_are_as_documented(made):
    array = zarr.open_array(made.path / ATTENTION, mode="r")
    assert np.isnan(array.fill_value)
    (sharding,) = [codec.to_dict() for codec in array.metadata.codecs]
    blosc = next(c for c in sharding["configuration"]["codecs"] if c["name"] == "blosc")["configuration"]
    assert (blosc["cname"], blosc["clevel"], blosc["shuffle"]) == ("zstd", 1, "bitshuffle")


# ------------------------------------------------------------------------------------------- schema


def test_plain_makes_json_of_anything_and_digest_ignores_order():
    value = {"b": (1, np.float32(0.5)), "a": float("nan"), "c": {"z", "y"}, "d": np.arange(2)}
    assert plain(value) == {"b": [1, 0.5], "a": "NaN", "c": ["y", "z"], "d": [0, 1]}
    assert json.loads(json.dumps(plain(value), allow_nan=False))
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})
    assert digest({"a": 1}) != digest({"a": 1.5})


def test_differences_name_the_place():
    there, asked = {"plan": {"dtype": "float16", "rows": [1]}}, {"plan": {"dtype": "float32", "rows": (1,)}}
    assert differences(there, asked) == ['plan.dtype: "float16" there, "float32" asked']
    assert differences(there, there) == []


def test_minor_versions_are_read_and_newer_major_ones_refused():
    check_version({"Conventions": "foveate-1.0", "schema": "1.9"}, "run")
    with pytest.raises(StoreError, match="upgrade"):
        check_version({"Conventions": "foveate-2.0", "schema": "2.0"}, "run")


def test_run_of_a_newer_version_is_not_touched_by_products(made):
    zarr.open_group(made.path, mode="r+", use_consolidated=False).attrs["schema"] = "7.0"
    with pytest.raises(StoreError, match="upgrade"):
        Run.open(made.path)
