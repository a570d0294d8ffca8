"""Decoded images kept in memory, so that each is decoded once a run.

Letters: N pairs of the source · B images asked for · S side of an image.
"""

import logging
import os

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)


def fits_in_memory(num_images: int, size: int, processes: int = 1) -> bool:
    """Whether a cache a process takes at most half of the machine's memory; a warning says when it does not."""
    needed = num_images * 3 * size * size * processes
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > memory // 2:
        logger.warning(
            "%d images of %d x %d pixels would take %.1f GB of %.1f GB of memory: they are decoded anew each epoch",
            num_images, size, size, needed / 1e9, memory / 1e9,
        )  # fmt: skip
    return needed <= memory // 2


def shrink(images: Tensor, size: int) -> Tensor:
    """Reduce uint8 (B, 3, S, S) to ``size`` by averaging areas, each image for itself; its own size is kept."""
    if images.shape[-1] == size:
        return images
    return F.interpolate(images.float(), size=(size, size), mode="area").round_().to(torch.uint8)


class PictureCache:
    """Images of one decoded size by index, and smaller copies of them, made when they are first asked for."""

    def __init__(self, num_images: int, size: int) -> None:
        self.size = size
        self._stores = {size: self._empty(num_images, size)}

    def __contains__(self, index: int) -> bool:
        """Whether image ``index`` has been put."""
        return bool(self._stores[self.size][1][index])

    def put(self, index: int, image: np.ndarray) -> None:
        """Keep a decoded image, uint8 (3, S, S)."""
        images, present = self._stores[self.size]
        images[index] = torch.from_numpy(image)
        present[index] = True

    def take(self, indices: np.ndarray, size: int) -> Tensor:
        """Return images that have been put, at ``size``: uint8 (B, 3, size, size)."""
        whole, _ = self._stores[self.size]
        if size not in self._stores:
            self._stores[size] = self._empty(len(whole), size)
        images, present = self._stores[size]
        missing = torch.from_numpy(np.unique(indices[~present[indices]]))
        if len(missing):
            images[missing] = shrink(whole[missing], size)
            present[missing] = True
        return images.index_select(0, torch.from_numpy(indices))

    @staticmethod
    def _empty(num_images: int, size: int) -> tuple[Tensor, np.ndarray]:
        """Room for images, which takes memory as it is filled, and which of them are there."""
        room = torch.empty(num_images, 3, size, size, dtype=torch.uint8, device="cpu")
        return room, np.zeros(num_images, dtype=bool)
