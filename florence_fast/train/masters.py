"""fp32 master copies of 16-bit weights. The optimiser updates them, so that small steps add up.

bf16 has 8 bits of mantissa: AdamW's step of 5e-4 on a weight of 1 rounds back to 1, every time.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from florence_fast.precision import is_pure

LOW = (torch.bfloat16, torch.float16)


class MasterWeights:
    """The trainable parameters of a model as the optimiser sees them: those of 16 bits as fp32 copies, others as such.

    Args:
        model: its parameters are on their device and have their dtype.
        precision: what it is trained at; the "pure" words do without copies.
        earlier: masters of the same model before some of its parameters were replaced; all other copies go on.

    Attributes:
        named: name -> parameter or copy, in the model's order.
        copies: name -> copy.
    """

    def __init__(self, model: nn.Module, precision: str = "bf16", earlier: "MasterWeights | None" = None) -> None:
        self.named: dict[str, nn.Parameter] = {}
        self.copies: dict[str, nn.Parameter] = {}
        self._weights: dict[str, nn.Parameter] = {}
        before = earlier.copies if earlier is not None else {}
        for name, weight in model.named_parameters():
            if not weight.requires_grad:
                continue
            self.named[name] = weight
            if not is_pure(precision) and weight.dtype in LOW:
                kept = before.get(name)
                if kept is None or kept.shape != weight.shape:
                    kept = nn.Parameter(weight.detach().float())
                self.named[name] = self.copies[name] = kept
                self._weights[name] = weight

    def take_gradients(self) -> None:
        """Move the gradients of 16-bit weights to their copies."""
        for name, weight in self._weights.items():
            self.copies[name].grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None

    @torch.no_grad()
    def give_weights(self) -> None:
        """Round the copies into the model's weights."""
        if self.copies:
            torch._foreach_copy_(list(self._weights.values()), list(self.copies.values()))  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        """Return the copies."""
        return {name: copy.detach() for name, copy in self.copies.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned; a copy that is missing there starts from the model's weight.

        The model's weights, already loaded, are what the copies were rounded to.
        """
        for name, copy in self.copies.items():
            copy.copy_(state.get(name, self._weights[name]))
