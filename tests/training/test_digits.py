import hashlib
from functools import cache

import numpy as np
import pytest
from PIL import Image

from swconv.training import digits

PINNED = {
    ("train", 4000): "4c0d2a84c595d34449bad1b2ea3139ee5ce7b17a630e03e37adb7a4bf22788c9",
    ("val", 2000): "2cb2b1ad885d36ea054bdaa34f0053e07a7ca3950d762a022e3c5ad9264007f3",
}
COUNTS = dict(PINNED.keys())
SPLITS = tuple(COUNTS)
compose = cache(digits.compose)


@pytest.mark.parametrize(("split", "count"), PINNED)
def test_pixels_are_those_that_were_published(split, count):
    images, _, _ = compose(split, count)
    assert images.shape == (count, 48, 48)
    assert hashlib.sha256(images.tobytes()).hexdigest() == PINNED[split, count]


def test_fewer_images_are_the_first_of_more():
    for few, many in zip(digits.compose("train", 20), compose("train", 4000), strict=True):
        np.testing.assert_array_equal(few, many[:20])


def test_composing_leaves_the_global_generator_alone():
    before = np.random.get_state()[1].copy()
    digits.compose("val", 10)
    np.testing.assert_array_equal(np.random.get_state()[1], before)


@pytest.mark.parametrize("split", SPLITS)
def test_only_digit_on_the_markers_row_or_column_has_the_label_and_the_distance(split):
    for image, label, distance in zip(*(values[:500] for values in compose(split, COUNTS[split])), strict=True):
        cells = _cells(image)
        row, column = _marker(cells)
        on_cross = [
            (r, c) for r, c in _occupied(cells) if (r, c) != (row, column) and (r == row or c == column)
        ]
        assert len(on_cross) == 1
        (r, c), = on_cross
        assert abs(r - row) + abs(c - column) == distance
        assert _nearest(cells[r, c], split)[0] == label


@pytest.mark.parametrize("split", SPLITS)
def test_four_digits_of_different_classes_lie_on_every_canvas(split):
    for image in compose(split, COUNTS[split])[0][:200]:
        cells = _cells(image)
        places = set(_occupied(cells)) - {_marker(cells)}
        assert len(places) == 4
        assert len({_nearest(cells[place], split)[0] for place in places}) == 4


@pytest.mark.parametrize("split", SPLITS)
def test_classes_are_balanced_and_distances_equally_frequent(split):
    _, labels, distances = compose(split, COUNTS[split])
    n = len(labels)
    assert np.bincount(labels).tolist() == [n // 10] * 10
    counts = np.bincount(distances, minlength=6)
    assert counts.sum() == counts[2:].sum()
    np.testing.assert_allclose(counts[2:], n / 4, atol=4 * np.sqrt(n * 3 / 16))


def test_no_scan_is_in_both_splits():
    train, val = ({scan.tobytes() for group in digits._scans(split) for scan in group} for split in SPLITS)
    assert len(train) + len(val) == 1797
    assert not train & val


@pytest.mark.parametrize(("split", "other"), [SPLITS, SPLITS[::-1]])
def test_digits_come_from_the_scans_of_their_own_split(split, other):
    for image in compose(split, COUNTS[split])[0][:100]:
        cells = _cells(image)
        for place in set(_occupied(cells)) - {_marker(cells)}:
            assert _nearest(cells[place], split)[1] < _nearest(cells[place], other)[1]


def test_files_hold_the_composed_pixels_under_class_and_distance(tmp_path):
    digits.write(tmp_path / "images", {"train": 12, "val": 7})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images"]
    for split, count in (("train", 12), ("val", 7)):
        images, labels, distances = digits.compose(split, count)
        files = {path.name: path for path in (tmp_path / "images" / split).glob("*/*.png")}
        assert len(files) == count
        for i in range(count):
            path = files[f"{i:05d}_d{distances[i]}.png"]
            assert path.parent.name == str(labels[i])
            with Image.open(path) as image:
                assert image.mode == "L"
                np.testing.assert_array_equal(np.asarray(image), images[i])


def test_writing_again_replaces_the_folder(tmp_path):
    digits.write(tmp_path / "images", {"train": 12, "val": 7})
    digits.write(tmp_path / "images", {"train": 3, "val": 2})
    assert len(list(tmp_path.rglob("*.png"))) == 5


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"needs write permission in .*/file, got 'Not a directory'"):
        digits.write(tmp_path / "file" / "images", {"train": 3, "val": 2})


def _cells(image):
    """(6, 6, 8, 8): row, column, pixels."""
    return image.reshape(6, 8, 6, 8).swapaxes(1, 2).astype(float)


def _marker(cells):
    plus = np.zeros((8, 8), bool)
    plus[1:7, 3:5] = plus[3:5, 1:7] = True
    (place,) = np.argwhere(((cells > 128) == plus).all((2, 3))).tolist()
    return tuple(place)


def _occupied(cells):
    return [tuple(place) for place in np.argwhere(cells.mean((2, 3)) > 20).tolist()]


@cache
def _table(split):
    scans = digits._scans(split)
    return np.concatenate(scans).astype(float), np.repeat(np.arange(10), [len(group) for group in scans])


def _nearest(cell, split):
    """Class and squared distance of the scan that looks most like a cell."""
    scans, classes = _table(split)
    errors = ((scans - cell) ** 2).sum((1, 2))
    return classes[errors.argmin()], errors.min()
