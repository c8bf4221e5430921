"""Validation finds each kind of damage, and only damage."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

from foveate.data.ledger import ledger_folder
from foveate.data.validate import validate
from foveate.errors import StoreError
from run_fakes import SITE, make_run, write

ATTENTION = f"sites/{SITE}/attention"


def messages(path, **options):
    return [f"{p.where}: {p.message}" for p in validate(path, **options) if p.level == "error"]


def rewrite(made, values):
    """Write other attention with a matching ledger, so that only the values are wrong."""
    made.attention[:] = values
    for number in range(len(made.arrays.batches)):
        write(made, number)


def test_a_good_run_is_valid(made):
    assert validate(made.path, deep=True) == []


def test_an_unfinished_run_is_valid_with_a_note(tmp_path):
    made = make_run(tmp_path, count=10, batch=4, fill=False)
    assert messages(made.path) == []
    (note,) = validate(made.path)
    assert "10 of 10 samples are missing" in note.message


def test_a_killed_run_is_valid_with_a_note(tmp_path):
    made = make_run(tmp_path, count=10, batch=4, fill=False)
    zarr.open_group(made.path, mode="r+").attrs["complete"] = False
    write(made, 0)  # and then the job is killed, before its tables are made
    assert messages(made.path, deep=True) == []
    notes = " ".join(problem.message for problem in validate(made.path))
    assert "4 samples of a killed job are safe" in notes
    assert "6 of 10 samples are missing" in notes
    made.attention[:4] *= np.float16(0.9)
    write(made, 0)
    assert any("rows sum to 1 only within 0.1" in line for line in messages(made.path)), "its values are checked"


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda a: a * 0.9, "rows sum to 1 only within 0.1"),
        (lambda a: np.where(np.arange(17) == 3, np.float16(np.nan), a), "not finite"),
        (lambda a: -a, "weights from -"),
    ],
)
def test_wrong_values(made, damage, expected):
    rewrite(made, damage(made.attention))
    assert any(expected in line for line in messages(made.path))


def test_rows_of_zeros_are_fully_masked_not_wrong(made):
    rewrite(made, np.where(np.arange(17)[:, None] == 2, np.float16(0), made.attention))
    assert messages(made.path) == []


def test_status_must_say_what_the_ledger_says(made):
    entry = ledger_folder(made.path) / "000000.json"
    content = json.loads(entry.read_text())
    content["samples"][1]["status"] = 2
    entry.write_text(json.dumps(content))
    assert messages(made.path) == ["samples/status: sample 1: ok here, failed in the ledger"]
    entry.unlink()
    assert len(messages(made.path)) == 5


def test_lost_truncated_and_altered_files(tmp_path):
    made = make_run(tmp_path, count=10, batch=4)
    first, second, third = (made.arrays.files(ATTENTION, number)[0] for number in range(3))
    data = bytearray(first.read_bytes())
    data[10] ^= 255
    first.write_bytes(bytes(data))
    assert any("checksum differs" in line for line in messages(made.path, deep=True))
    second.unlink()
    third.write_bytes(third.read_bytes()[:-8])
    found = " ".join(messages(made.path))
    assert "file is missing" in found
    assert "were written" in found


def test_structure(made):
    shutil.rmtree(made.path / ATTENTION)
    assert messages(made.path) == [f"{ATTENTION}: array is missing"]


def test_products_are_checked_by_their_own_ledger(tmp_path):
    made = make_run(tmp_path, count=10, batch=4)
    with made.run.product_writer("maps/v", {"v": (("sample",), (10,), "float64")}) as out:
        out.write(0, {"v": np.arange(10.0)})
    assert messages(made.path, deep=True) == []
    next(path for path in (made.path / "maps/v/v/c").rglob("*") if path.is_file()).unlink()
    assert any("maps/v" in line and "missing" in line for line in messages(made.path))


def test_newer_version_is_refused(made):
    zarr.open_group(made.path, mode="r+", use_consolidated=False).attrs["schema"] = "2.0"
    with pytest.raises(StoreError, match="upgrade"):
        validate(made.path)
