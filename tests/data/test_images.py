"""Every odd image file is either seen as a person sees it or refused with its reason."""

from __future__ import annotations

import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from foveate.data.images import decode, read_image, read_mask
from foveate.errors import SampleError


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)


def saved(path, image, **options):
    image.save(path, **options)
    return path


def test_plain_png_and_its_hash(tmp_path, rgb):
    path = saved(tmp_path / "a.png", Image.fromarray(rgb))
    decoded = decode(path)
    np.testing.assert_array_equal(decoded.pixels, rgb)
    assert decoded.pixels.dtype == np.uint8
    assert decoded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert decoded.notes == ()


def test_non_ascii_name_and_one_pixel(tmp_path):
    path = saved(tmp_path / "крокодил 鱼 é.png", Image.new("RGB", (1, 1), (1, 2, 3)))
    assert read_image(path).tolist() == [[[1, 2, 3]]]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32768, 65535]], np.uint16)
    for name in ("a.png", "a.tiff"):
        path = saved(tmp_path / name, Image.fromarray(values))
        assert read_image(path)[0, :, 0].tolist() == [0, 1, 128, 255]
        assert "16-bit" in decode(path).notes[0]


def test_float_grey_in_unit_range_works_and_any_other_range_is_refused(tmp_path):
    unit = saved(tmp_path / "unit.tiff", Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)))
    assert read_image(unit)[0, :, 1].tolist() == [0, 128, 255]
    wide = saved(tmp_path / "wide.tiff", Image.fromarray(np.array([[0.0, 5e4]], np.float32)))
    with pytest.raises(SampleError, match="no defined white"):
        read_image(wide)


def test_cmyk(tmp_path):
    path = saved(tmp_path / "c.tiff", Image.fromarray(np.array([[[0, 255, 255, 0]]], np.uint8), "CMYK"))
    assert read_image(path).tolist() == [[[255, 0, 0]]]
    assert decode(path).notes == ("CMYK converted to RGB",)


@pytest.mark.parametrize("mode", ["1", "L", "P", "YCbCr"])
def test_other_modes_become_rgb(tmp_path, mode):
    grey = np.repeat(np.array([[[0], [255]]], np.uint8), 3, axis=2)
    path = saved(tmp_path / "m.tiff", Image.fromarray(grey).convert(mode))
    assert read_image(path).shape == (1, 2, 3)
    assert read_image(path)[0, :, 0].tolist() == [0, 255]


def test_palette_keeps_its_colours(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    assert read_image(saved(tmp_path / "p.png", image)).tolist() == [[[10, 20, 30], [200, 100, 50]]]


def test_transparency_is_composited_on_white(tmp_path):
    rgba = np.array([[[255, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 127]]], np.uint8)
    pixels = read_image(saved(tmp_path / "t.png", Image.fromarray(rgba)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1].tolist() == [255, 0, 0]
    np.testing.assert_allclose(pixels[0, 2], 128, atol=1)
    grey_alpha = np.array([[[0, 0], [0, 255]]], np.uint8)
    assert read_image(saved(tmp_path / "la.png", Image.fromarray(grey_alpha, "LA")))[0, :, 0].tolist() == [255, 0]


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    path = saved(tmp_path / "pt.png", image, transparency=0)
    assert read_image(path).tolist() == [[[255, 255, 255], [200, 100, 50]]]


def test_opaque_alpha_changes_nothing(tmp_path, rgb):
    path = saved(tmp_path / "o.png", Image.fromarray(rgb).convert("RGBA"))
    np.testing.assert_array_equal(read_image(path), rgb)
    assert decode(path).notes == ()


def test_first_frame_of_an_animation_is_taken_and_noted(tmp_path):
    frames = [Image.new("RGB", (3, 2), colour) for colour in ("red", "blue", "green")]
    path = saved(tmp_path / "a.gif", frames[0], save_all=True, append_images=frames[1:])
    decoded = decode(path)
    assert decoded.pixels[0, 0].tolist() == [255, 0, 0]
    assert decoded.notes == ("first of 3 frames",)


def test_exif_rotation_is_applied(tmp_path, rgb):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show rotated 90 degrees clockwise
    path = saved(tmp_path / "r.png", Image.fromarray(rgb), exif=exif)
    np.testing.assert_array_equal(read_image(path), np.rot90(rgb, -1))


def test_unreadable_exif_does_not_cost_the_image(tmp_path, rgb):
    path = saved(tmp_path / "x.png", Image.fromarray(rgb), exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    np.testing.assert_array_equal(read_image(path), rgb)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.png", b"", "empty"),
        ("text.jpg", b"this is a letter, not a photo", "not an image"),
        ("short.png", None, "cannot be decoded"),
    ],
)
def test_broken_files_say_why(tmp_path, rgb, name, content, reason):
    if content is None:
        buffer = io.BytesIO()
        Image.fromarray(np.repeat(np.repeat(rgb, 20, 0), 20, 1)).save(buffer, "PNG")
        content = buffer.getvalue()[: buffer.tell() // 2]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SampleError, match=reason) as caught:
        read_image(tmp_path / name)
    assert name in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(SampleError, match="no such file"):
        read_image(tmp_path / "gone.png")
    with pytest.raises(SampleError, match="cannot be read"):
        read_image(tmp_path)


def test_hundred_megapixels_work_and_the_guard_is_configurable(tmp_path, monkeypatch):
    path = saved(tmp_path / "big.png", Image.new("1", (10_000, 10_001)))
    assert read_image(path).shape == (10_001, 10_000, 3)
    before = Image.MAX_IMAGE_PIXELS
    monkeypatch.setenv("FOVEATE_MAX_MEGAPIXELS", "1.5")
    with pytest.raises(SampleError, match=r"over the limit of 1.5\n.*FOVEATE_MAX_MEGAPIXELS"):
        read_image(path)
    assert before == Image.MAX_IMAGE_PIXELS


def test_an_image_over_pillows_own_limit_is_refused_with_our_words(tmp_path):
    path = saved(tmp_path / "huge.png", Image.new("1", (30_000, 20_000)))
    with pytest.raises(SampleError, match="600 megapixels"):
        read_image(path)


def test_masks(tmp_path):
    inside = np.array([[True, False, True]])
    ones = saved(tmp_path / "01.png", Image.fromarray(inside.astype(np.uint8)))
    white = saved(tmp_path / "w.png", Image.fromarray(inside.astype(np.uint8) * 255))
    bits = saved(tmp_path / "b.png", Image.fromarray(inside))
    rgb = saved(tmp_path / "rgb.png", Image.fromarray(np.repeat(inside[..., None], 3, 2).astype(np.uint8) * 255))
    for path in (ones, white, bits, rgb):
        np.testing.assert_array_equal(read_mask(path, (1, 3)), inside)
    with pytest.raises(SampleError, match=r"expected .* 4 x 1 pixels, got 3 x 1"):
        read_mask(ones, (1, 4))


def test_mask_in_a_jpeg_is_cut_at_half_white(tmp_path):
    block = np.zeros((16, 16), np.uint8)
    block[:, 8:] = 255
    path = saved(tmp_path / "m.jpg", Image.fromarray(block), quality=60)
    np.testing.assert_array_equal(read_mask(path, (16, 16)), block > 0)
