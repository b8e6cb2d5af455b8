import logging
import os
import random

import numpy as np
import pytest
import torch
from PIL import Image

from swconv.training import data, digits, manifest, reduced

DIGITS = {
    "name": "digits",
    "root": None,
    "train_images": 60,
    "val_images": 30,
    "image_size": 48,
    "in_chans": 1,
    "num_classes": 10,
    "mean": (0.1,),
    "std": (0.25,),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
    "cache": True,
    "bad_files": "stop",
    "workers": 0,
}
STREAMED = DIGITS | {"cache": False}
PLAIN = {
    "batch_size": 8,
    "random_resized_crop": False,
    "hflip": 0.0,
    "rand_augment": None,
    "random_erasing": 0.0,
    "mixup": 0.0,
    "cutmix": 0.0,
    "mixup_switch": 0.5,
    "label_smoothing": 0.0,
}
AUGMENTED = PLAIN | {"random_resized_crop": True, "hflip": 0.5, "rand_augment": "rand-m9-mstd0.5-inc1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    manifest.prepare(DIGITS, path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Two classes of colour JPEGs of 40 x 30 pixels, two per class and split."""
    dataset = DIGITS | {"name": "photos", "root": str(tmp_path / "photos"), "num_classes": 2, "image_size": 28}
    for split in manifest.SPLITS:
        for label in range(2):
            place = tmp_path / "photos" / split / f"n{label}"
            place.mkdir(parents=True)
            for i in range(2):
                Image.effect_noise((40, 30), 60).convert("RGB").save(place / f"{i}.jpeg")
    manifest.prepare(dataset, tmp_path)
    return dataset | {"cache": False, "in_chans": 3, "crop_pct": 0.875}, tmp_path


@pytest.mark.parametrize("dataset", [DIGITS, STREAMED])
def test_validation_yields_the_composed_pixels_in_file_order_with_distances(folder, dataset):
    loader = data.ValLoader(dataset, folder, batch_size=8)
    images, labels = _join(loader)
    expected, classes, distances = digits.compose("val", 30)
    order = np.argsort(classes, kind="stable")
    np.testing.assert_array_equal(images[:, 0], expected[order])
    np.testing.assert_array_equal(labels, classes[order])
    np.testing.assert_array_equal(loader.distances, distances[order])
    assert [len(batch) for batch, _ in loader] == [8, 8, 8, 6]
    assert len(loader) == 4


def test_an_epoch_holds_no_image_twice_and_drops_the_remainder(folder):
    loader = data.TrainLoader(DIGITS, PLAIN, folder, seed=0)
    images, _ = _join(loader.epoch(1))
    assert len(loader) == 7
    assert len(images.flatten(1).unique(dim=0)) == len(images) == 56


def test_micro_batches_are_the_batches_in_parts(folder):
    whole = data.TrainLoader(DIGITS, PLAIN, folder, seed=0)
    parted = data.TrainLoader(DIGITS, PLAIN, folder, seed=0, micro_batch=3)
    assert (len(whole), whole.parts, len(parted), parted.parts) == (7, 1, 7, 3)
    assert [len(images) for images, _ in parted.epoch(1)] == 7 * [3, 3, 2]
    assert all(map(torch.equal, _join(whole.epoch(1)), _join(parted.epoch(1))))


def test_images_keep_their_labels_when_shuffled(folder):
    expected = dict(zip(map(bytes, digits.compose("train", 60)[0]), digits.compose("train", 60)[1], strict=True))
    for images, labels in data.TrainLoader(DIGITS, PLAIN, folder, seed=0).epoch(1):
        assert [expected[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_order_depends_on_seed_and_epoch(folder):
    first = _join(data.TrainLoader(DIGITS, PLAIN, folder, seed=0).epoch(1))[0]
    assert torch.equal(first, _join(data.TrainLoader(DIGITS, PLAIN, folder, seed=0).epoch(1))[0])
    assert not torch.equal(first, _join(data.TrainLoader(DIGITS, PLAIN, folder, seed=0).epoch(2))[0])
    assert not torch.equal(first, _join(data.TrainLoader(DIGITS, PLAIN, folder, seed=1).epoch(1))[0])


def test_memory_and_files_give_the_same_batches(folder):
    cached = _join(data.TrainLoader(DIGITS, PLAIN, folder, seed=3).epoch(2))
    streamed = _join(data.TrainLoader(STREAMED, PLAIN, folder, seed=3).epoch(2))
    assert all(map(torch.equal, cached, streamed))


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder):
    here = data.TrainLoader(STREAMED, AUGMENTED, folder, seed=0)
    used = [_join(here.epoch(epoch))[0] for epoch in (1, 2)]
    random.seed(7), np.random.seed(7), torch.manual_seed(7)
    workers = data.TrainLoader(STREAMED | {"workers": 2}, AUGMENTED, folder, seed=0)
    resumed = _join(workers.epoch(2))[0]
    assert torch.equal(used[1], resumed)
    assert torch.equal(used[0], _join(workers.epoch(1))[0])


def test_an_image_is_augmented_anew_in_every_epoch(folder):
    images = data.TrainLoader(STREAMED, AUGMENTED, folder, seed=0)._source.loader.dataset
    assert not np.array_equal(images.load(1, 5)[0], images.load(2, 5)[0])


@pytest.mark.parametrize("dataset", [DIGITS, STREAMED, STREAMED | {"workers": 1}])
def test_global_generators_stay_as_they_are(folder, dataset):
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    loader = data.TrainLoader(dataset, PLAIN if dataset["cache"] else AUGMENTED, folder, seed=0)
    _join(loader.epoch(1)), _join(data.ValLoader(dataset, folder, 8))
    assert random.getstate() == before[0]
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])


def test_certain_flip_alone_mirrors_every_image(folder):
    plain = _join(data.TrainLoader(STREAMED, PLAIN, folder, seed=0).epoch(1))[0]
    flipped = _join(data.TrainLoader(STREAMED, PLAIN | {"hflip": 1.0}, folder, seed=0).epoch(1))[0]
    assert torch.equal(flipped, plain.flip(-1))


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_strongest_posterize_blackens_instead_of_crashing(mode):
    """RandAugment m9-mstd0.5 draws magnitudes up to 10, where timm asks for 0 bits and Pillow 13 refuses them."""
    recipe = PLAIN | {"rand_augment": "rand-m10-inc1-n1"}
    *_, augment, _ = data.train_transform(DIGITS, recipe).transforms
    (posterize,) = [op for op in augment.ops if op.name == "PosterizeIncreasing"]
    posterize.prob = 1.0
    image = posterize(Image.effect_noise((8, 8), 60).convert(mode))
    assert image.mode == mode
    assert not np.asarray(image).any()


def test_photos_are_resized_and_cropped_to_colour_or_grey(photos):
    dataset, path = photos
    for in_chans in (1, 3):
        loader = data.ValLoader(dataset | {"in_chans": in_chans}, path, batch_size=4)
        ((images, labels),) = loader
        assert images.shape == (4, in_chans, 28, 28)
        assert images.dtype == torch.uint8
        assert labels.tolist() == [0, 0, 1, 1]
        assert loader.distances is None


def test_random_transform_is_not_kept_in_memory(folder):
    with pytest.raises(ValueError, match="has cache: true, which needs a recipe that does not augment at random"):
        data.TrainLoader(DIGITS, AUGMENTED, folder, seed=0)


def test_less_than_one_batch_is_refused(folder):
    with pytest.raises(ValueError, match="at least one batch of 64 images, got 60 images"):
        data.TrainLoader(DIGITS, PLAIN | {"batch_size": 64}, folder, seed=0)


@pytest.mark.parametrize("dataset", [DIGITS, STREAMED], ids=["memory", "files"])
def test_processes_share_the_global_batches_of_one(folder, dataset):
    whole = list(data.TrainLoader(dataset, PLAIN, folder, seed=0).epoch(1))
    shares = [data.TrainLoader(dataset, PLAIN, folder, seed=0, micro_batch=3, rank=rank, world=2) for rank in range(2)]
    assert [(len(share), share.parts) for share in shares] == 2 * [(7, 2)]
    parts = [list(share.epoch(1)) for share in shares]
    assert [len(images) for images, _ in parts[0]] == 7 * [3, 1]
    for step, batch in enumerate(whole):
        for rank in range(2):
            share = _join(parts[rank][2 * step : 2 * step + 2])
            assert all(torch.equal(mine, all_[rank::2]) for mine, all_ in zip(share, batch, strict=True))


def test_a_batch_that_processes_cannot_share_is_refused(folder):
    with pytest.raises(ValueError, match="multiple of their number, got 8 images for 3 processes"):
        data.TrainLoader(DIGITS, PLAIN, folder, seed=0, world=3)


def test_processes_validate_every_image_once(folder):
    whole = data.ValLoader(STREAMED, folder, batch_size=8)
    images, labels = _join(whole)
    shares = [data.ValLoader(STREAMED, folder, batch_size=8, rank=rank, world=4) for rank in range(4)]
    for rank, share in enumerate(shares):
        mine = _join(share)
        assert torch.equal(mine[0], images[rank::4])
        assert torch.equal(mine[1], labels[rank::4])
        assert torch.equal(share.distances, whole.distances[rank::4])


@pytest.mark.parametrize("workers", [0, 1])
def test_an_epoch_goes_on_at_a_step_and_reads_nothing_before_it(folder, workers, monkeypatch):
    loader = data.TrainLoader(STREAMED | {"workers": workers}, AUGMENTED, folder, seed=0, micro_batch=4)
    whole = list(loader.epoch(2))
    read, decode = [], manifest.read_image
    monkeypatch.setattr(manifest, "read_image", lambda path, *args: read.append(path) or decode(path, *args))
    rest = list(loader.epoch(2, start=5))
    assert len(rest) == 2 * 2
    assert all(torch.equal(one, other) for pair in zip(rest, whole[10:], strict=True) for one, other in zip(*pair, strict=True))
    assert len(read) == (0 if workers else 2 * 8)                     # a worker process reads for itself
    assert len(list(loader.epoch(3))) == 7 * 2
    assert not list(loader.epoch(3, start=7))


def test_more_workers_than_cores_are_told_and_not_started(folder, caplog, monkeypatch):
    monkeypatch.setattr(data, "cores", lambda: 2)
    loader = data.TrainLoader(STREAMED | {"workers": 3}, AUGMENTED, folder, seed=0, world=2)
    assert loader._source.loader.num_workers == 1
    assert "asks for 3 worker processes for each of 2 training processes, and there are 2 cores" in caplog.text
    assert "set workers: 1" in caplog.text


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_image_is_replaced_by_the_next_counted_and_named_once(photos, caplog, workers, cache):
    dataset, path = photos
    bad = path / "photos" / "train" / "n1" / "0.jpeg"
    whole = _join(data.TrainLoader(dataset, PLAIN | {"batch_size": 4}, path, seed=0).epoch(1))
    bad.write_bytes(b"")
    skipping = dataset | {"workers": workers, "bad_files": "skip", "cache": cache}
    with caplog.at_level(logging.WARNING):
        loader = data.TrainLoader(skipping, PLAIN | {"batch_size": 4}, path, seed=0)
        again = [_join(loader.epoch(1)) for _ in range(2)]
    place = np.random.RandomState([0, 1]).permutation(4).tolist()     # n0/0, n0/1, n1/0, n1/1
    lost, stands_in = place.index(2), place.index(3)
    for images, labels in again:
        assert torch.equal(images[lost], whole[0][stands_in])
        assert torch.equal(labels, whole[1])
        kept = [i for i in range(4) if i != lost]
        assert torch.equal(images[kept], whole[0][kept])
    assert loader.bad_files == {str(bad)}
    assert caplog.text.count(f"{bad} cannot be read, the next image stands in for it") == 1


def test_stand_ins_are_augmented_on_their_own(photos):
    dataset, path = photos
    (path / "photos" / "train" / "n1" / "0.jpeg").write_bytes(b"")
    loader = data.TrainLoader(dataset | {"bad_files": "skip"}, AUGMENTED | {"batch_size": 4}, path, seed=0)
    images = loader._source.loader.dataset
    assert not np.array_equal(images.load(1, 2)[0], images.load(1, 3)[0])


def test_a_folder_of_unreadable_images_stops_in_spite_of_skip(photos):
    dataset, path = photos
    for bad in (path / "photos" / "train").rglob("*.jpeg"):
        bad.write_bytes(b"")
    loader = data.TrainLoader(dataset | {"bad_files": "skip"}, PLAIN | {"batch_size": 2}, path, seed=0)
    with pytest.raises(manifest.ImageError, match="needs a readable image among 16 in a row, got none"):
        _join(loader.epoch(1))


def test_validation_stops_at_an_unreadable_image_in_spite_of_skip(photos):
    dataset, path = photos
    (path / "photos" / "val" / "n1" / "0.jpeg").write_bytes(b"")
    with pytest.raises(manifest.ImageError, match="n1/0.jpeg needs to be a readable image"):
        _join(data.ValLoader(dataset | {"bad_files": "skip"}, path, batch_size=2))


def test_unreadable_images_of_a_sample_stop_before_the_first_batch(photos):
    dataset, path = photos
    bad = path / "photos" / "train" / "n1" / "0.jpeg"
    bad.write_bytes(bad.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"got 1 unreadable among those sampled: {bad}; copy .* or set bad_files: skip"):
        data.TrainLoader(dataset, PLAIN | {"batch_size": 2}, path, seed=0)


def test_another_number_of_classes_than_the_data_has_is_refused(photos):
    dataset, path = photos
    with pytest.raises(ValueError, match="needs 3 classes in .*train, got 2 in .*manifest.csv"):
        data.TrainLoader(dataset | {"num_classes": 3}, PLAIN | {"batch_size": 2}, path, seed=0)


def test_what_the_manifest_does_not_list_is_not_trained_on(photos):
    dataset, path = photos
    Image.effect_noise((40, 30), 60).convert("RGB").save(path / "photos" / "train" / "n0" / "later.jpeg")
    assert len(data.TrainLoader(dataset, PLAIN | {"batch_size": 1}, path, seed=0)) == 4


def test_reduced_images_train_without_their_files(photos):
    dataset, path = photos
    dataset |= {"cache_px": 24, "image_size": 16}
    reduced.build(dataset, path)
    kept = [_join(data.TrainLoader(dataset | {"workers": workers}, AUGMENTED | {"batch_size": 2}, path, seed=0).epoch(1))
            for workers in (0, 1)]
    for file in (path / "photos").rglob("*.jpeg"):
        os.truncate(file, 0)
    kept.append(_join(data.TrainLoader(dataset, AUGMENTED | {"batch_size": 2}, path, seed=0).epoch(1)))
    assert all(map(torch.equal, kept[0], kept[1]))
    assert all(map(torch.equal, kept[0], kept[2]))
    assert _join(data.ValLoader(dataset, path, batch_size=4))[0].shape == (4, 3, 16, 16)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_stops_with_one_sentence(photos, workers):
    dataset, path = photos
    bad = path / "photos" / "train" / "n1" / "0.jpeg"
    loader = data.TrainLoader(dataset | {"workers": workers}, PLAIN | {"batch_size": 2}, path, seed=0)
    bad.write_bytes(b"")
    with pytest.raises(manifest.ImageError, match=f"^{bad} needs to be a readable image, got .*again[.]$"):
        _join(loader.epoch(1))


def test_input_is_normalised_per_channel_in_the_asked_memory_format():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(2, 3, 4, 4)
    x = data.to_input(images, [0.0, 0.1, 0.5], [1.0, 0.2, 0.25], "cpu", "channels_last")
    assert x.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(x[1, :, 2, 3], torch.tensor([0.0, 0.5, 2.0]))
    assert images[0, 2, 0, 0] == 255


def test_mean_that_does_not_fit_the_channels_is_refused():
    with pytest.raises(ValueError, match="got 1 channels, 3 means and 1 stds"):
        data.to_input(torch.zeros(1, 1, 2, 2, dtype=torch.uint8), [0.1] * 3, [0.2], "cpu", "contiguous")


@pytest.mark.parametrize(("switch", "mixes"), [(0.0, True), (1.0, False)])
def test_mixup_switch_is_the_share_of_cutmix(switch, mixes):
    """Mixup blends all pixels, CutMix moves whole ones."""
    mixup = data.mixup_for(PLAIN | {"mixup": 0.8, "cutmix": 1.0, "mixup_switch": switch}, num_classes=10)
    np.random.seed(1)
    images, _ = mixup(torch.arange(2.0).view(2, 1, 1, 1).repeat(1, 1, 8, 8), torch.tensor([0, 1]))
    assert bool(((images > 0) & (images < 1)).any()) is mixes


def test_mixup_is_a_function_of_numpys_generator():
    assert data.mixup_for(PLAIN, num_classes=10) is None
    mixup = data.mixup_for(PLAIN | {"mixup": 0.8, "cutmix": 1.0, "label_smoothing": 0.1}, num_classes=10)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    results = []
    for seed in (0, 0, 1):
        np.random.seed(seed)
        results.append(mixup(images.clone(), labels))
    torch.testing.assert_close(results[0][1].sum(1), torch.ones(4))
    assert all(map(torch.equal, results[0], results[1]))
    assert not torch.equal(results[0][1], results[2][1])


def test_random_erasing_replaces_part_of_an_image():
    assert data.erasing_for(PLAIN, "cpu") is None
    erased = data.erasing_for(PLAIN | {"random_erasing": 1.0}, "cpu")(torch.full((4, 1, 32, 32), 9.0))
    share = (erased != 9).float().mean((1, 2, 3))
    assert ((share > 0) & (share < 0.4)).all()


def _join(batches):
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)
