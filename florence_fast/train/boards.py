"""Loggers for a run's curves: TensorBoard and Weights & Biases."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from florence_fast.errors import require


class Board(Protocol):
    """Draws curves from numbers by step."""

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        """Add a point to each of several curves."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


def open_boards(
    out_dir: Path, step: int, settings: Mapping[str, Any], *, tensorboard: bool, wandb: bool
) -> list[Board]:
    """Open the boards that are wanted; TensorBoard only where it is installed.

    Args:
        out_dir: the run's folder.
        step: what the run goes on from; TensorBoard forgets what came later.
        settings: of the run.
        tensorboard, wandb: which ones.

    Raises:
        ImportError: wandb is wanted and not installed.
    """
    boards: list[Board] = []
    if tensorboard and (board := _TensorBoard.opened(out_dir / "tensorboard", step)) is not None:
        boards.append(board)
    if wandb:
        boards.append(_WeightsAndBiases(out_dir, settings))
    return boards


class _TensorBoard:
    def __init__(self, writer: Any) -> None:
        self._writer = writer

    @classmethod
    def opened(cls, folder: Path, step: int) -> "_TensorBoard | None":
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            return None
        return cls(SummaryWriter(str(folder), purge_step=step + 1))

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """A run that is named after its folder, and goes on when the run is resumed."""

    def __init__(self, out_dir: Path, settings: Mapping[str, Any]) -> None:
        folder = out_dir.resolve()
        name = folder.name
        identity = f"{name}-{hashlib.sha256(str(folder).encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"
        options = {"name": name, "id": identity, "resume": "allow", "config": dict(settings), "dir": str(out_dir)}
        self._run = require("wandb", "wandb").init(**options)

    def add(self, numbers: Mapping[str, float], step: int) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()
