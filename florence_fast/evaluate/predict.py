"""Probabilities of several texts for one image."""

from collections.abc import Callable, Sequence

from PIL import Image
from torch import Tensor

from florence_fast.evaluate.features import (
    ImageTransform,
    device_of,
    encode_texts,
    evaluating,
    evaluation_transform,
)
from florence_fast.models.florence import Florence
from florence_fast.precision import input_dtype


def probabilities(
    model: Florence,
    tokenizer: Callable[[list[str]], Tensor],
    image: Image.Image,
    texts: Sequence[str],
    *,
    transform: ImageTransform | None = None,
    precision: str = "auto",
) -> list[float]:
    """Return the probability of each text, given that exactly one of them describes the image.

    p = softmax over texts k of s u.v_k, with u the image's feature, v_k the texts', s the learned scale.

    Args:
        model: A dual encoder.
        tokenizer: From texts to tokens.
        image: An RGB image.
        texts: The choices, at least one.
        transform: From a PIL image to a tensor; by default the model's own evaluation transform.
        precision: A word of ``florence_fast.precision``.

    Returns:
        One number for each text, in their order, adding up to 1.

    Raises:
        ValueError: There is no text.

    >>> probabilities(model, tokenizer, Image.open("cat.png"), ["a cat", "a dog"])
    """
    pixels_1CHW = (
        (transform or evaluation_transform(model))(image).unsqueeze(0).to(device_of(model), input_dtype(model))
    )
    texts_KD = encode_texts(model, tokenizer, texts, precision=precision)
    with evaluating(model, precision):
        image_1D, _, scale, *_ = model(image=pixels_1CHW)
    return (scale.float().cpu() * image_1D.float().cpu() @ texts_KD.T).softmax(-1)[0].tolist()
