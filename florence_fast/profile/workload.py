"""The profiled workload: a forward pass or a contrastive training step of a named model, on random inputs.

Letters: B pairs of a batch · L context length · S side of the images
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from florence_fast.data.pair_loader import PairBatch
from florence_fast.data.pairs import PairSource
from florence_fast.models import Florence, create_model
from florence_fast.models.config import FlorenceConfig, ImageConfig
from florence_fast.models.factory import model_config
from florence_fast.precision import autocast, input_dtype, resolve_precision
from florence_fast.tasks.contrastive import ContrastiveConfig, ContrastiveTask
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.state import TrainState, prepare

Step = Callable[[], object]


@dataclass(frozen=True)
class Workload:
    """What one step does.

    Args:
        model: name of a dual encoder or of an image tower, or folder of a saved one.
        batch_size: images, and as many texts for a dual encoder, B.
        image_size: side of the images, S; None takes the model's.
        precision: a word of ``florence_fast.precision``.
        train: forward, loss, backward and AdamW of a contrastive step, in place of a forward pass without a graph.
        micro_batch_size: train through the gradient cache, with so many pairs at a time.
        seed: of weights, images and texts.
    """

    model: str
    batch_size: int
    image_size: int | None = None
    precision: str = "auto"
    train: bool = False
    micro_batch_size: int | None = None
    seed: int = 0


def check(workload: Workload) -> None:
    """Refuse a workload that cannot be run.

    Raises:
        ValueError: the model is unknown, an image tower is to be trained, or micro_batch_size is given without train.
    """
    config = model_config(workload.model)
    if workload.train and not isinstance(config, FlorenceConfig):
        raise ValueError(f"train needs a dual encoder, such as florence_tiny; {workload.model} is an image tower")
    if workload.micro_batch_size is not None and not workload.train:
        raise ValueError("micro_batch_size is the gradient cache's, which only train uses")


def make_step(workload: Workload, device: str) -> Step:
    """Build the model with random weights, draw its inputs, and return what runs one step.

    Texts have the whole context length, so that a step costs what it may cost at most.

    Raises:
        ValueError: as `check` says.
    """
    check(workload)
    torch.manual_seed(workload.seed)
    size = {} if workload.image_size is None else {"img_size": workload.image_size}
    model = create_model(workload.model, None, workload.precision, device, **size)
    return _training_step(workload, cast(Florence, model)) if workload.train else _forward(workload, model)


def _forward(workload: Workload, model: Florence | nn.Module) -> Step:
    model.eval()
    parameter = next(model.parameters())
    config = cast(FlorenceConfig | ImageConfig, model.config)
    side = (config.image if isinstance(config, FlorenceConfig) else config).img_size
    images = torch.randn(workload.batch_size, 3, side, side, device=parameter.device, dtype=input_dtype(model))
    inputs = (images,)
    if isinstance(model, Florence):
        inputs = (images, _tokens(workload, model).to(parameter.device))

    def step() -> object:
        with torch.no_grad(), autocast(workload.precision, parameter.device):
            return model(*inputs)

    return step


def _training_step(workload: Workload, model: Florence) -> Step:
    """Return the engine's own step on one batch, at a constant learning rate."""
    model.train()
    size, samples = model.config.image.img_size, workload.batch_size
    stage = Stage(steps=1 << 30, image_size=size)
    tokens = _tokens(workload, model)
    images = torch.randint(256, (samples, 3, size, size), dtype=torch.uint8)
    numbers = torch.arange(samples)
    texts = [str(number) for number in range(samples)]
    batch = PairBatch(images=images, texts=texts, labels=numbers, indices=numbers, skipped=0)
    task = ContrastiveTask(
        model,
        lambda texts: tokens[: len(texts)],
        cast(PairSource, ()),  # nothing is read: the one batch is given
        ContrastiveConfig(micro_batch_size=workload.micro_batch_size),
    )
    precision = resolve_precision(workload.precision, task.device)
    run = RunConfig((stage,), batch_size=samples, precision=precision, seed=workload.seed, warmup=0)
    prepare(task, run)
    state = TrainState(task, run)

    def step() -> Tensor:
        state.take_step(batch, stage)
        return torch.tensor(state.counters.last_loss)

    return step


def _tokens(workload: Workload, model: Florence) -> Tensor:
    """Draw (B, L) ids that fill the context: none is padding, and the last is the greatest, the end of the text."""
    vocab_size = model.config.text.vocab_size
    tokens = torch.randint(1, vocab_size - 1, (workload.batch_size, model.context_length))
    tokens[:, -1] = vocab_size - 1
    return tokens
