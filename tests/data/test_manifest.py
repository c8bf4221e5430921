"""A manifest fixes which samples there are, in which order, under which names, before anything runs."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from foveate.data.manifest import Manifest
from foveate.errors import SampleError, UsageError


def image(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 3), (value, value, value)).save(path)
    return path


def test_folder_is_searched_recursively_in_sorted_order(tmp_path):
    for name in ("b.png", "a/z.JPG", "a/ü.png", ".hidden/c.png"):
        image(tmp_path / name)
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "LICENSE").write_text("x")
    manifest = Manifest.discover(tmp_path)
    assert manifest.ids == ("a/z.JPG", "a/ü.png", "b.png")
    assert manifest.ignored == {".txt": 1, "no suffix": 1}
    assert manifest.load(2).path == str(tmp_path / "b.png")


def test_text_named_jpg_is_a_row_that_fails_on_load(tmp_path):
    (tmp_path / "letter.jpg").write_text("dear reader")
    manifest = Manifest.discover(tmp_path)
    with pytest.raises(SampleError, match="not an image"):
        manifest.load(0)


def test_file_named_twice_counts_once_and_equal_names_stay_apart(tmp_path):
    first, second, third = (image(tmp_path / name) for name in ("x/a.png", "y/a.png", "w/x/a.png"))
    assert Manifest.discover([first, first]).ids == ("a.png",)
    assert Manifest.discover([first, second]).ids == ("x/a.png", "y/a.png")
    assert Manifest.discover([first, third]).ids == ("x/a.png", "x/a.png#2")
    assert len(Manifest.discover([tmp_path / "x", first])) == 1


def test_table_columns_keep_their_types_and_namibia(tmp_path):
    image(tmp_path / "i" / "1.png", 7)
    Image.fromarray(np.array([[0, 1, 0, 1]] * 3, np.uint8)).save(tmp_path / "m.png")
    (tmp_path / "t.csv").write_text(
        "path,image_id,country,latitude,year,label,mask,winter\n"
        "i/1.png,007,NA,1.5,1999,0,m.png,True\n"
        "i/2.png,008,,,2001,1,,False\n"
    )
    manifest = Manifest.discover(tmp_path / "t.csv")
    assert manifest.ids == ("007", "008")
    columns = manifest.columns
    assert columns["country"] == ["NA", ""]
    assert columns["latitude"][0] == 1.5
    assert math.isnan(columns["latitude"][1])
    assert columns["year"] == [1999, 2001]
    assert columns["label"] == ["0", "1"]
    assert columns["winter"] == [True, False]
    sample = manifest.load(0)
    assert sample.columns["country"] == "NA"
    assert sample.mask.sum() == 6
    with pytest.raises(SampleError, match="no such file"):
        manifest.load(1)


def test_csv_tsv_and_parquet_say_the_same(tmp_path):
    frame = pd.DataFrame({"path": ["a.png", "b.png"], "score": [0.5, 1.0], "place": ["x", "y"]})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_csv(tmp_path / "t.tsv", index=False, sep="\t")
    frame.to_parquet(tmp_path / "t.parquet")
    csv, tsv, parquet = (Manifest.discover(tmp_path / f"t.{kind}") for kind in ("csv", "tsv", "parquet"))
    assert csv.digest == tsv.digest == parquet.digest
    assert parquet.columns == {"score": [0.5, 1.0], "place": ["x", "y"]}


def test_columns_of_mixed_inputs_are_filled(tmp_path):
    image(tmp_path / "free.png")
    pd.DataFrame({"path": ["a.png"], "score": [0.5], "place": ["x"]}).to_csv(tmp_path / "t.csv", index=False)
    columns = Manifest.discover([tmp_path / "t.csv", tmp_path / "free.png"]).columns
    assert columns["place"] == ["x", ""]
    assert math.isnan(columns["score"][1])


def test_digest_follows_ids_columns_and_order_but_not_the_place(tmp_path):
    for folder in ("one", "two"):
        for name in ("a.png", "b.png"):
            image(tmp_path / folder / name)
    one, two = Manifest.discover(tmp_path / "one"), Manifest.discover(tmp_path / "two")
    assert one.digest == two.digest
    assert one.take(1).digest != one.digest
    swapped = Manifest(one.rows[::-1])
    assert swapped.digest != one.digest


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("file\na.png\n", "no column 'path'"),
        ("path,id\na.png,1\nb.png,1\n", "not unique"),
        ("path,status\na.png,1\n", "cannot be a sample coordinate"),
        ("path,a/b\na.png,1\n", "cannot be a sample coordinate"),
        ("path,c\n,1\n", "row 1 has no path"),
        ("", "cannot be read"),
        ("path\n", "no image"),
    ],
)
def test_tables_that_cannot_be_used_say_why(tmp_path, content, message):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UsageError, match=message):
        Manifest.discover(tmp_path / "t.csv")


def test_nothing_found(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(UsageError, match=r"ignored: 1 x \.txt"):
        Manifest.discover(tmp_path)
    with pytest.raises(UsageError, match="no such file"):
        Manifest.discover(tmp_path / "gone")
    with pytest.raises(UsageError, match="empty list"):
        Manifest.discover([])
