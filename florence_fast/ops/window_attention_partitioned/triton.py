"""The ``triton`` backend of attention in windows that are cut out already: the kernels, asked in the terms of the op.

Nothing is kept for the backward but the log-sum-exp of a row: probabilities cost less to compute again than to read.

Letters: B batch · M windows of one map · N tokens in one window · h heads.
"""

from typing import Any

from torch import Tensor

from florence_fast.kernels import window_attention_partitioned as kernels
from florence_fast.ops import dispatch


def window_attention_partitioned_fwd(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    """Return the result and, for a training step, the log-sum-exp of each row, in base 2, (B*M, h, N) float32.

    ``arguments`` are k, v, bias, mask, scale and train.
    """
    return kernels.window_attention_partitioned_fwd(q, *arguments, tf32=dispatch.allows_tf32(q))


def window_attention_partitioned_bwd(grad_out: Tensor, q: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, bias and mask, None where ``needs`` is false.

    ``arguments`` are k, v, bias, mask, the log-sum-exp, needs and scale.
    """
    return kernels.window_attention_partitioned_bwd(grad_out, q, *arguments, tf32=dispatch.allows_tf32(q))
