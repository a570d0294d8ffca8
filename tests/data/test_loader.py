"""The loader: one sequence of samples for all positions, workers and ranks, and what happens to unreadable pairs."""

import logging
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from florence_fast.data.augment import BatchAugment
from florence_fast.data.labels import text_label
from florence_fast.data.loader import BadDataError
from florence_fast.data.pair_loader import PairBatch, PairLoader
from florence_fast.data.pairs import open_pairs
from florence_fast.data.prompts import TRAIN_TEMPLATES
from florence_fast.data.transforms import image_transform
from tests.data.conftest import ListPairs

Build = Callable[..., ListPairs]


def take(loader: PairLoader, count: int, position: int = 0) -> list[PairBatch]:
    return list(islice(loader.batches(position), count))


def load(source: ListPairs, **options: object) -> PairLoader:
    return PairLoader(source, **{"batch_size": 7, "image_size": 8, "seed": 3, **options})


def assert_equal(batches: list[PairBatch], others: list[PairBatch]) -> None:
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.indices, other.indices)
        assert torch.equal(one.labels, other.labels) and one.texts == other.texts and one.skipped == other.skipped


def joined(parts: list[PairBatch]) -> PairBatch:
    return PairBatch(
        images=torch.cat([part.images for part in parts]),
        texts=[text for part in parts for text in part.texts],
        labels=torch.cat([part.labels for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        skipped=sum(part.skipped for part in parts),
    )


def test_a_batch_holds_what_the_pairs_say(list_pairs: Build) -> None:
    source = list_pairs(40)
    (batch,) = take(load(source, augment_text=False), 1)
    assert batch.images.shape == (7, 3, 8, 8) and batch.images.dtype == torch.uint8
    assert batch.labels.dtype == batch.indices.dtype == torch.int64 and batch.skipped == 0
    assert batch.texts == [f"Name {i}" for i in batch.indices.tolist()]
    assert batch.labels.tolist() == [text_label(text) for text in batch.texts]
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert image[:, -1, -1].tolist() == [index, 255 - index, 7]
        assert image[:, 0, 0].tolist() == [255, 255, 255]


def test_every_epoch_shows_every_pair_once_though_batches_cross_its_border(list_pairs: Build) -> None:
    indices = torch.cat([batch.indices for batch in take(load(list_pairs(40)), 40)])
    for epoch in range(7):
        assert sorted(indices[40 * epoch : 40 * epoch + 40].tolist()) == list(range(40))
    assert indices[:40].tolist() != indices[40:80].tolist()


@pytest.mark.parametrize("crop", ["squash", "center", "random_resized"])
@pytest.mark.parametrize("grouped", [1, 3])
def test_a_position_equals_skipping(list_pairs: Build, crop: str, grouped: int) -> None:
    options = dict(crop=crop, images_per_text=grouped)
    straight = take(load(list_pairs(40, names=9), **options), 12)
    assert_equal(take(load(list_pairs(40, names=9), **options), 7, position=5 * 7), straight[5:])


def test_what_is_prepared_on_the_cpu_is_there_whatever_the_default_device(list_pairs: Build) -> None:
    def prepared() -> list[torch.Tensor]:
        source, mean_std = list_pairs(7), ((0.5,) * 3, (0.25,) * 3)
        (batch,) = take(load(source), 1)
        torch.random.default_generator.manual_seed(0)
        transformed = [image_transform(8, is_train)(source.image(0)) for is_train in (False, True)]
        augmented = BatchAugment(*mean_std)(batch.images, 6, seed=0, step=1)
        return [batch.images, batch.labels, batch.indices, augmented, *transformed]

    wanted = prepared()
    torch.set_default_device("meta")
    try:
        found = prepared()
    finally:
        torch.set_default_device(None)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("crop", ["shortest", "longest", "squash"])
def test_training_sees_what_evaluation_sees(list_pairs: Build, crop: str, interpolation: str) -> None:
    source = list_pairs(7)
    (batch,) = take(load(source, crop=crop, interpolation=interpolation), 1)
    transform = image_transform(8, False, mean=0.0, std=1.0, resize_mode=crop, interpolation=interpolation)
    for image, index in zip(batch.images, batch.indices.tolist(), strict=True):
        assert torch.equal(image / 255, transform(source.image(index)))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_join_to_the_same_global_batch(list_pairs: Build, world_size: int) -> None:
    bad = dict(bad_images={4, 5}, bad_texts={11})
    whole = take(load(list_pairs(40, **bad), batch_size=4 * world_size, max_bad_share=1), 9, position=8)
    ranks = [
        take(
            load(list_pairs(40, **bad), batch_size=4, rank=rank, world_size=world_size, max_bad_share=1), 9, position=8
        )
        for rank in range(world_size)
    ]
    assert_equal([joined(list(parts)) for parts in zip(*ranks, strict=True)], whole)
    assert sum(batch.skipped for batch in whole) > 0


def test_seeds_differ(list_pairs: Build) -> None:
    one, other = (take(load(list_pairs(40), seed=seed), 1)[0] for seed in (3, 4))
    assert one.indices.tolist() != other.indices.tolist()


def test_drawn_texts_are_labelled_before_the_template_and_change_with_the_epoch(list_pairs: Build) -> None:
    loader = load(list_pairs(40), batch_size=40, keyword_prob=0.5, template_prob=0.5)
    first, second = take(loader, 2)
    kinds = Counter()
    for text, label, index in zip(first.texts, first.labels.tolist(), first.indices.tolist(), strict=True):
        drawn = {text_label(name): name for name in (f"name {index}", f"short {index}", f"key {index}", "shared")}
        assert text in {drawn[label], *(template(drawn[label]) for template in TRAIN_TEMPLATES)}
        kinds[drawn[label].split()[0], text != drawn[label]] += 1
    assert len(kinds) == 8
    shared = [text_label("shared") == label for label in first.labels.tolist()]
    assert sum(shared) > 1
    by_index = dict(zip(second.indices.tolist(), second.texts, strict=True))
    assert [by_index[index] for index in first.indices.tolist()] != first.texts


def test_frequencies_of_keywords_short_names_and_templates(list_pairs: Build) -> None:
    loader = load(list_pairs(200), batch_size=4000, cache=False)
    loader.configure(batch_size=4000, image_size=1)
    (batch,) = take(loader, 1)
    kinds = Counter(text.split()[-2] if text[-1].isdigit() else "shared" for text in batch.texts)
    share = {kind: count / 4000 for kind, count in kinds.items()}
    assert share == pytest.approx({"name": 0.7, "short": 0.15, "key": 0.075, "shared": 0.075}, abs=0.025)
    assert np.mean([len(text.split()) > 2 for text in batch.texts]) == pytest.approx(0.5, abs=0.04)


def test_images_of_a_text_meet_in_a_batch(list_pairs: Build) -> None:
    (batch,) = take(load(list_pairs(60, names=15), batch_size=12, images_per_text=4, augment_text=False), 1)
    assert sorted(Counter(batch.labels.tolist()).values()) == [4, 4, 4]


def test_each_image_is_decoded_once_with_the_cache_and_every_time_without(list_pairs: Build) -> None:
    cached, anew = list_pairs(20), list_pairs(20)
    with_cache = take(load(cached), 9)
    assert sorted(cached.decoded) == list(range(20))
    assert_equal(take(load(anew, cache=False), 9), with_cache)
    assert len(anew.decoded) > 60


def test_a_cache_larger_than_half_the_memory_is_not_made(
    list_pairs: Build, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # 40 images of 8 x 8 are 7,680 bytes.
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 15_359, "SC_PAGE_SIZE": 1}[name])
    source = list_pairs(40)
    take(load(source), 12)
    assert len(source.decoded) > 80 and "would take" in caplog.text
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 15_360, "SC_PAGE_SIZE": 1}[name])
    source = list_pairs(40)
    take(load(source), 12)
    assert len(source.decoded) == 40


def test_smaller_stages_average_areas_of_the_largest(list_pairs: Build) -> None:
    loader = load(list_pairs(40), batch_size=5, image_size=8)
    (large,) = take(loader, 1)
    loader.configure(batch_size=3, image_size=4, augment_text=False)
    (small,) = take(loader, 1)
    means = large.images[:3].double().reshape(3, 3, 4, 2, 4, 2).mean((3, 5))
    assert small.images.shape == (3, 3, 4, 4)
    assert (small.images.double() - means).abs().max() <= 0.5
    assert (
        small.texts == [f"Name {i}" for i in small.indices.tolist()]
        and small.indices.tolist() == large.indices[:3].tolist()
    )
    without = load(list_pairs(40), batch_size=5, image_size=8, cache=False)
    without.configure(batch_size=3, image_size=4, augment_text=False)
    assert_equal(take(without, 4), take(loader, 4))


def test_a_larger_stage_decodes_anew(list_pairs: Build) -> None:
    grown = load(list_pairs(40), image_size=4)
    take(grown, 2)
    grown.configure(image_size=8)
    assert_equal(take(grown, 3), take(load(list_pairs(40), image_size=8), 3))


def test_random_crops_change_with_the_epoch_only(list_pairs: Build) -> None:
    loader = load(list_pairs(6), batch_size=6, crop="random_resized", image_size=16)
    first, second = ({int(i): image for i, image in zip(b.indices, b.images, strict=True)} for b in take(loader, 2))
    assert any(not torch.equal(first[i], second[i]) for i in range(6))
    assert_equal(take(loader, 2), take(loader, 2))


@pytest.mark.parametrize("cache", [True, False])
def test_unreadable_pairs_are_counted_named_and_replaced_by_the_next(
    list_pairs: Build, caplog: pytest.LogCaptureFixture, cache: bool
) -> None:
    good = torch.cat([batch.indices for batch in take(load(list_pairs(40)), 40)]).tolist()
    bad = {good[3], good[4], good[9], good[39]}
    source = list_pairs(40, bad_images={good[3], good[4]}, bad_texts={good[9], good[39]})
    loader = load(source, max_bad_share=0.2, cache=cache)
    with caplog.at_level(logging.WARNING):
        batches = take(loader, 40)
    expected = list(good)
    for place in reversed(range(279)):
        if good[place] in bad:
            expected[place] = expected[place + 1]
    found = torch.cat([batch.indices for batch in batches]).tolist()
    assert found[:279] == expected[:279] and not bad & set(found)
    assert sum(batch.skipped for batch in batches) == loader.samples_bad == sum(i in bad for i in good) == 28
    assert loader.samples_seen == 280
    for index in bad:
        assert caplog.text.count(f"skipping pair {index}, list[{index}]: no ") == 1
    for batch in batches:
        assert [image[0, -1, -1].item() for image in batch.images] == batch.indices.tolist()


def test_too_large_a_share_of_unreadable_pairs_stops_the_run(list_pairs: Build) -> None:
    source = list_pairs(100, bad_images={1, 2})
    assert sum(batch.skipped for batch in take(load(source, batch_size=50, max_bad_share=0.02), 8)) == 8
    batches = load(source, batch_size=50).batches(0)
    assert sum(next(batches).skipped for _ in range(3)) >= 2
    with pytest.raises(
        BadDataError,
        match=r"^4 of 200 samples were unreadable, more than max_bad_share=0\.01: list\[[12]\]: no image here; list",
    ):
        next(batches)


def test_a_wrong_folder_stops_the_run_early(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = "".join(f"wrong/{number}.png,caption {number}\n" for number in range(2000))
    (tmp_path / "t.csv").write_text("filepath,title\n" + rows)
    with pytest.raises(BadDataError, match="200 pairs in a row could not be read") as error:
        take(load(open_pairs(tmp_path / "t.csv")), 1)
    assert f"neither in the table's folder {tmp_path} nor in the working folder {Path.cwd()}" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).count("wrong/") == 2
    assert len(caplog.records) < 300


def test_reasons_do_not_act_on_the_terminal(list_pairs: Build, caplog: pytest.LogCaptureFixture) -> None:
    source = list_pairs(9)

    def image(index: int) -> Image.Image:
        if index == 3:
            raise ValueError("cannot read \x1b[2J.png")
        return ListPairs.image(source, index)

    source.image = image
    take(load(source, max_bad_share=1), 3)
    assert r"cannot read \x1b[2J.png" in caplog.text and "\x1b" not in caplog.text


def test_a_source_of_which_nothing_can_be_read_stops_the_run(list_pairs: Build) -> None:
    with pytest.raises(BadDataError, match=r"none of the 9 .* can be read: list.*; and 4 more"):
        take(load(list_pairs(9, bad_images=set(range(9))), max_bad_share=1), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(image_size=0), "image_size must be at least 1, got 0"),
        (dict(images_per_text=0), "images_per_text must be at least 1"),
        (dict(num_workers=-1), "num_workers must not be negative, got -1"),
        (dict(rank=2, world_size=2), r"rank must lie in \[0, world_size=2\), got 2"),
        (dict(keyword_prob=1.5), r"keyword_prob must lie in \[0, 1\], got 1.5"),
        (dict(max_bad_share=-0.1), r"max_bad_share must lie in \[0, 1\]"),
        (dict(crop="centre"), r"unknown crop 'centre' \(did you mean 'center'\?\)"),
        (dict(interpolation="cubic"), "unknown interpolation 'cubic'"),
    ],
)
def test_bad_arguments_are_refused(list_pairs: Build, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(list_pairs(4), **options)


def test_an_empty_source_and_a_negative_position_are_refused(list_pairs: Build) -> None:
    with pytest.raises(ValueError, match="at least one image-text pair, got none"):
        load(list_pairs(0))
    with pytest.raises(ValueError, match="position must not be negative, got -1"):
        load(list_pairs(4)).batches(-1)
    with pytest.raises(ValueError, match="image_size must be at least 1, got 0"):
        load(list_pairs(4)).configure(image_size=0)
