"""Contrastive pretraining of a dual encoder on image-text pairs (section 2.2): UniCL's loss, CLIP's or SigLIP's.

Letters: B pairs of a batch · T distinct texts among them · L length of the longest of these texts · D embedding dim
"""

import hashlib
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from florence_fast.data.decoding import CROPS
from florence_fast.data.mixture import mix
from florence_fast.data.pair_loader import PairBatch, PairLoader
from florence_fast.data.pairs import PairSource, open_pairs
from florence_fast.evaluate.evaluator import RetrievalEvaluator, ZeroShotEvaluator
from florence_fast.models.config import FlorenceConfig
from florence_fast.models.factory import create_model, get_tokenizer, model_config
from florence_fast.models.florence import Florence
from florence_fast.models.saving import CONFIG_KEY
from florence_fast.precision import input_dtype
from florence_fast.ranges import annotated
from florence_fast.strict_json import format_json
from florence_fast.tasks.images import Augment, augmentation, seed_of_rank
from florence_fast.train.config import RunConfig, Stage
from florence_fast.train.distributed import rank, world_size
from florence_fast.train.grad_cache import GradCache
from florence_fast.train.loss import GATHERS, ContrastiveLoss, SigmoidLoss
from florence_fast.train.settings import Settings, count, number, word
from florence_fast.train.task import Autocast, Evaluator, Inputs, Task

LOSSES = ("unicl", "clip", "siglip")
SIGLIP_START = {"init_logit_scale": 10.0, "init_logit_bias": -10.0}
"""Where SigLIP's paper starts; nearly every pair of a batch is a negative, and the bias says so."""
REDUCTIONS = ("mean_directions", "sum_directions", "image_to_text")
DESCRIBED_SAMPLES = 64


@dataclass(frozen=True)
class ContrastiveConfig(Settings):
    """Settings of contrastive pretraining.

    Args:
        loss: unicl (equal texts are positives of each other), clip (the diagonal) or siglip (a sigmoid for each pair;
            the model needs a logit_bias).
        loss_reduction, loss_chunk_size: of unicl and clip, and of all; passed to `ContrastiveLoss` or `SigmoidLoss`.
        gather: how texts travel between processes: all_gather, or ring (less memory).
        micro_batch_size: pairs that are encoded at a time, through the gradient cache; None encodes all at once.
        keyword_prob, template_prob: how often a keyword or a prompt template is drawn, as for `PairLoader`.
        images_per_text: images of one text that come one after another.
        crop: what a sample shows of its image: shortest (its middle), longest, squash or random_resized. None takes the
            model's ``config.resize_mode``. Any other than random_resized becomes the model's, for its evaluation.
        cache: decode each image once and keep it, where half of the memory holds them all.
        augment: turn, shear and recolour the images.
        lock_image: freeze the image tower (LiT); drop path is off there then.
        lock_text: freeze the text tower.
    """

    loss: str = word("unicl", LOSSES)
    loss_reduction: str = word("mean_directions", REDUCTIONS)
    loss_chunk_size: int | None = count(None)
    gather: str = word("all_gather", GATHERS)
    micro_batch_size: int | None = count(None)
    keyword_prob: float = number(0.3, "lie in [0, 1]", lambda x: 0 <= x <= 1)
    template_prob: float = number(0.5, "lie in [0, 1]", lambda x: 0 <= x <= 1)
    images_per_text: int = count(1)
    crop: str | None = word(None, CROPS)
    cache: bool = True
    augment: bool = False
    lock_image: bool = False
    lock_text: bool = False


@dataclass(frozen=True)
class ContrastiveInputs(Inputs):
    """A dual encoder and image-text pairs.

    Args:
        train_data: CSV, TSV, JSONL or Parquet file, folder, or WebDataset tars ('{000..010}', '*'); '::' joins several.
        train_data_upsampling_factors: how often the samples of each of several sources come, relative to the others, as
            in 1::2.5.
        val_data: pairs on which retrieval is measured.
        imagenet_val: class folders on which zero-shot accuracy is measured; WordNet ids are ImageNet's classes.
        csv_img_key: column of a table with the image's path.
        csv_caption_key: column of a table with the text.
        csv_separator: between columns: a character, or tab, comma, semicolon, pipe. None takes what the header shows.
    """

    model: str = "florence_nano"
    csv_img_key: str = "filepath"
    csv_caption_key: str = "title"
    csv_separator: str | None = None
    train_data_upsampling_factors: str | None = None
    val_data: str | None = None
    imagenet_val: str | None = None

    def image_size(self) -> int:
        """Return the image size of a dual encoder.

        Raises:
            ValueError: the model has no text tower.
        """
        config = model_config(self.model)
        if not isinstance(config, FlorenceConfig):
            raise ValueError(
                f"{self.model} is an image tower: contrastive training takes a dual encoder, as florence_nano"
            )
        return config.image.img_size

    def open(self) -> PairSource:
        """Open the pairs for training."""
        if self.train_data_upsampling_factors is None:
            return self._open(self.train_data)
        factors = [_factor(text) for text in self.train_data_upsampling_factors.split("::")]
        return mix([self._open(part) for part in self.train_data.split("::")], factors)

    def _open(self, spec: str) -> PairSource:
        columns = self.csv_img_key, self.csv_caption_key
        return open_pairs(spec, img_key=columns[0], caption_key=columns[1], separator=self.csv_separator)

    def create(self, source: PairSource, settings: "ContrastiveConfig", device: str) -> "ContrastiveTask":
        """Build a dual encoder with its tokenizer, and what measures it."""
        tokenizer = get_tokenizer(self.model)
        evaluators: list[Evaluator] = []
        if self.val_data is not None:
            evaluators.append(RetrievalEvaluator(tokenizer, self._open(self.val_data)))
        if self.imagenet_val is not None:
            evaluators.append(ZeroShotEvaluator(tokenizer, self.imagenet_val))
        pretrained = None if self.pretrained == "none" else self.pretrained
        start: dict[str, Any] = SIGLIP_START if settings.loss == "siglip" else {}
        model = cast(Florence, create_model(self.model, pretrained, device=device, **start))
        return ContrastiveTask(model, tokenizer, source, settings, evaluators=evaluators)

    def next_commands(self, folder: Path) -> Sequence[str]:
        """Return how the weights are measured and used."""
        weights = shlex.join(["--pretrained", str(folder)])
        return (
            f"florence-fast evaluate zero-shot {weights} --data PAIRS",
            f"florence-fast predict {weights} --image IMAGE --texts TEXT TEXT",
        )


def _factor(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"train_data_upsampling_factors must be numbers as in 1::2.5, got {text!r}") from None


class Prepared(NamedTuple):
    """A batch on its device."""

    images: Tensor  # (B, 3, H, W), normalised
    tokens: Tensor  # (T, L)
    which: Tensor  # (B,): row of `tokens` that belongs to each image
    labels: Tensor | None  # (B,), None for CLIP's loss


class ContrastiveTask(Task):
    """Pretrain an image tower and a text tower contrastively.

    Every distinct text is encoded once and spread back to its images. Features are normalised and compared in fp32.

    Args:
        model: a dual encoder on its device.
        tokenizer: turns a list of texts into (T, context_length) ids, zero padded.
        source: the pairs.
        config: the task's settings.
        augment: image augmentation in place of what ``config.augment`` means.
        evaluators: what measures the model at intervals.
    """

    name = "contrastive"
    settings = ContrastiveConfig
    inputs = ContrastiveInputs
    model: Florence
    config: ContrastiveConfig

    def __init__(
        self,
        model: Florence,
        tokenizer: Callable[[list[str]], Tensor],
        source: PairSource,
        config: ContrastiveConfig | None = None,
        *,
        augment: Augment | None = None,
        evaluators: Sequence[Evaluator] = (),
    ) -> None:
        super().__init__(model, config)
        model.config.text.check_tokenizer(tokenizer)
        self.tokenizer, self.source = tokenizer, source
        self.epoch_size = len(source)
        self.augment = augment or augmentation(model.config, self.config.augment)
        self._evaluators = tuple(evaluators)
        if self.config.loss == "siglip" and model.logit_bias is None:
            raise ValueError("loss siglip needs a model with a logit_bias: create_model(..., init_logit_bias=-10.0)")
        if model.logit_bias is not None:
            model.logit_bias.requires_grad_(self.config.loss == "siglip")
        if self.config.lock_image:
            model.lock_image_tower()
            model.visual.disable_drop_path()
        if self.config.lock_text:
            model.lock_text_tower()

    def setup(self, run: RunConfig) -> None:
        """Make the loss; the model's evaluation will resize images as its training does."""
        super().setup(run)
        model, config = self.model, self.config
        if config.crop not in (None, "random_resized"):
            mode = "shortest" if config.crop == "center" else config.crop
            model.config = replace(model.config, resize_mode=mode)
        if config.loss == "siglip":
            self.compare = SigmoidLoss(config.loss_chunk_size, config.gather)
        else:
            self.compare = ContrastiveLoss(config.loss_reduction, config.loss_chunk_size, config.gather)

    @cached_property
    def loader(self) -> PairLoader:
        """Reads and orders the pairs."""
        run, config, model = self.run, self.config, self.model
        return PairLoader(
            self.source,
            batch_size=run.batch_size,
            image_size=max(stage.image_size for stage in run.stages),
            seed=run.seed,
            keyword_prob=config.keyword_prob,
            template_prob=config.template_prob,
            images_per_text=config.images_per_text,
            cache=config.cache,
            num_workers=run.num_workers,
            worker_timeout=run.worker_timeout,
            rank=rank(),
            world_size=world_size(),
            max_bad_share=run.max_bad_share,
            crop=config.crop or model.config.resize_mode,
            interpolation=model.config.interpolation,
        )

    def batches(
        self, stage: Stage, batch_size: int, position: int, stopping: Callable[[], bool]
    ) -> Iterator[PairBatch]:
        """Return batches of pairs, with texts as the stage wants them."""
        self.loader.configure(batch_size=batch_size, image_size=stage.image_size, augment_text=stage.augment_text)
        return self.loader.batches(position, stopping=stopping)

    def enter_stage(self, stages: Sequence[Stage]) -> None:
        """Give the model the image size and window of the stage; a new window makes new bias tables."""
        windows = [stage.window_size for stage in stages if stage.window_size]
        self.model.set_input_size(img_size=stages[-1].image_size, window_size=windows[-1] if windows else None)

    @annotated("train.prepare")
    def prepare(self, batch: PairBatch, stage: Stage, step: int) -> Prepared:
        """Augment the images, tokenise each distinct text once and cut the tokens to the longest."""
        row_of = {text: row for row, text in enumerate(dict.fromkeys(batch.texts))}
        tokens = self.tokenizer(list(row_of))
        tokens = tokens[:, : int((tokens != 0).sum(1).max())]
        which = torch.tensor([row_of[text] for text in batch.texts], device="cpu")
        images = batch.images.to(self.device, non_blocking=True)
        images = self.augment(images, stage.image_size, seed_of_rank(self.run.seed), step)
        labels = batch.labels.to(self.device, non_blocking=True) if self.config.loss == "unicl" else None
        return Prepared(images.to(input_dtype(self.model)), tokens.to(self.device), which.to(self.device), labels)

    def loss(self, batch: PairBatch, stage: Stage, step: int) -> Tensor:
        """Return the loss of the joined batch of all ranks."""
        prepared = self.prepare(batch, stage, step)
        return self._compare(prepared.which, *self.module(prepared.images, prepared.tokens), prepared.labels)

    def backward(
        self, batch: PairBatch, stage: Stage, step: int, scale: Callable[[Tensor], Tensor], autocast: Autocast
    ) -> Tensor:
        """Run forward and backward; all ranks return the loss of their joined batch, so none is averaged.

        Towers run under autocast, the comparison in fp32 outside of it. With ``micro_batch_size`` the gradient cache
        encodes parts of the batch at a time.
        """
        prepared = self.prepare(batch, stage, step)
        compare = partial(self._compare, prepared.which)
        if self.config.micro_batch_size is not None:
            cache = GradCache(self.module, compare, self.config.micro_batch_size)
            with autocast():
                return cache.step(prepared.images, prepared.tokens, labels=prepared.labels, scale=scale)
        with autocast():
            outputs = self.module(prepared.images, prepared.tokens)
        loss = compare(*outputs, prepared.labels)
        scale(loss).backward()
        return loss.detach()

    def _compare(
        self, which: Tensor, images: Tensor, texts: Tensor, logit_scale: Tensor, *others: Tensor | None
    ) -> Tensor:
        """Spread texts to their images and compare; others are the model's bias, if it has one, and labels."""
        features = images.float(), texts.float().index_select(0, which)
        bias = others[0] if self.model.logit_bias is not None else None
        labels = others[-1] if self.config.loss == "unicl" else None
        if self.config.loss == "siglip":
            assert bias is not None, "checked where the task is made"
            return self.compare(*features, logit_scale.float(), bias.float())
        return self.compare(*features, logit_scale.float(), labels)

    def after_update(self) -> None:
        """Keep the temperature within its bounds."""
        self.model.clamp_logit_scale_()

    def scalars(self) -> Mapping[str, float]:
        """Return the factor of the cosines, and their bias if there is one."""
        found = {"logit_scale": self.model.logit_factor().item()}
        return found if self.model.logit_bias is None else {**found, "logit_bias": self.model.logit_bias.item()}

    def metadata(self) -> Mapping[str, str]:
        """Return the model's configuration, from which the weights file is loaded alone."""
        return {**super().metadata(), CONFIG_KEY: format_json(self.model.config.to_dict())}

    def evaluators(self) -> Sequence[Evaluator]:
        """Return the evaluators that the task was made with."""
        return self._evaluators

    def describe_data(self) -> Mapping[str, Any]:
        """Say what the data must agree on: the number of pairs, and some texts."""
        indices = np.linspace(0, len(self.source) - 1, min(len(self.source), DESCRIBED_SAMPLES)).astype(int)
        digest = hashlib.sha256()
        for index in indices.tolist():
            try:
                digest.update(repr(self.source.texts(index)).encode("utf-8", "backslashreplace"))
            except (OSError, ValueError):
                digest.update(b"unreadable")
        return {"pairs": len(self.source), "digest": digest.hexdigest()[:12]}
