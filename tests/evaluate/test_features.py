"""Encoding of many images and texts: order, batches, mode, precision, broken images."""

import logging

import pytest
import torch

from florence_fast.data.loader import BadDataError
from florence_fast.evaluate import encode_images, encode_texts, with_texts
from tests.evaluate.stand_ins import ColourImages, ColourModel, tokenizer, transform


@pytest.mark.parametrize("batch_size", [1, 2, 3, 64])
def test_rows_keep_the_order_of_the_source_for_every_batch_size(batch_size):
    encoded = encode_images(ColourModel(), ColourImages(["red", "blue", "green"]), transform, batch_size=batch_size)
    assert encoded.indices == [0, 1, 2]
    assert torch.equal(encoded.features, torch.tensor([[1.0, 0, 0], [0, 0, 1], [0, 1, 0]]))
    texts = encode_texts(ColourModel(), tokenizer, ["a blue sky", "red"], batch_size=batch_size)
    assert torch.equal(texts, torch.tensor([[0.0, 0, 1], [1, 0, 0]]))


def test_the_model_runs_in_evaluation_mode_and_gets_its_mode_back():
    model = ColourModel().train()
    encoded = encode_images(model, ColourImages(["red"]), transform)
    assert model.modes == [False] and model.training and not encoded.features.requires_grad
    model.eval()
    encode_images(model, ColourImages(["red"]), transform)
    assert not model.training


def test_images_follow_the_dtype_of_the_weights():
    encoded = encode_images(ColourModel().double(), ColourImages(["red"]), transform)
    assert encoded.features.dtype is torch.float32


def test_a_broken_image_is_named_and_left_out(caplog):
    source = ColourImages(["red", None, "green"])
    with caplog.at_level(logging.WARNING):
        encoded = encode_images(ColourModel(), source, transform, max_bad_share=0.5)
    assert encoded.indices == [0, 2] and len(encoded.features) == 2
    assert "skipped image 1: broken data stream" in caplog.text


def test_too_many_broken_images_stop_the_call():
    source = ColourImages(["red", None, None, "green"])
    with pytest.raises(BadDataError, match=r"2 of 4 pairs cannot be read.*0\.3; first: image 1, image 2"):
        encode_images(ColourModel(), source, transform, max_bad_share=0.3)
    with pytest.raises(BadDataError, match=r"none of 1 images can be read; first: image 0"):
        encode_images(ColourModel(), ColourImages([None]), transform, max_bad_share=1.0)


def test_a_wrong_folder_stops_the_call_early(caplog):
    with pytest.raises(BadDataError, match=r"none of the first 200 of 30000 pairs can be read; are the images where"):
        encode_images(ColourModel(), ColourImages([None] * 30_000), transform)
    assert len(caplog.records) == 200
    images = ColourImages([None] * 250 + ["red"])
    assert encode_images(ColourModel(), images, transform, max_bad_share=1.0).indices == [250]


def test_a_pair_without_a_text_is_named_and_left_out(caplog):
    source, texts = with_texts(ColourImages(["red", "green", "blue"], ["red", "", "blue"]), max_bad_share=0.5)
    assert texts == ["red", "blue"] and [source.describe(index) for index in range(2)] == ["image 0", "image 2"]
    assert "skipped image 1: its text is empty" in caplog.text
    with pytest.raises(BadDataError, match=r"1 of 2 pairs cannot be read"):
        with_texts(ColourImages(["red", "green"], ["red", ""]))


def test_nothing_to_encode_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        encode_images(ColourModel(), ColourImages([]), transform)
    with pytest.raises(ValueError, match="at least one text"):
        encode_texts(ColourModel(), tokenizer, [])


def test_an_unknown_precision_names_the_nearest():
    with pytest.raises(ValueError, match=r"unknown precision 'amp_bf61' \(did you mean 'amp_bf16'\?\)"):
        encode_images(ColourModel(), ColourImages(["red"]), transform, precision="amp_bf61")
