"""The shipped images: the counts that the demo rests on, and that they open."""

from florence_fast.data.artists import TEST_ARTIST, artists_names, artists_test, artists_train


def test_counts_are_those_of_the_demo() -> None:
    assert (len(artists_train()), len(artists_test()), len(artists_names())) == (8666, 1696, 2660)


def test_the_held_out_artist_is_not_trained_on_and_all_names_are_known() -> None:
    train, test, names = artists_train(), artists_test(), artists_names()
    assert not any(TEST_ARTIST in train.describe(index) for index in range(len(train)))
    assert all(TEST_ARTIST in test.describe(index) for index in range(len(test)))
    assert {test.texts(index).text for index in range(len(test))} < set(names)
    assert names == sorted(set(names))


def test_images_are_64_px_on_white_with_unicode_keywords() -> None:
    train = artists_train()
    dog = next(i for i in range(len(train)) if train.texts(i).text == "dog face" and "noto.tar" in train.describe(i))
    assert {"dog", "pet"} <= set(train.texts(dog).keywords) and train.texts(dog).short_name == "dog face"
    image = train.image(dog)
    assert image.size == (64, 64) and min(image.getpixel((0, 0))) > 250
