"""The text tower (arXiv 2111.11432, section 2.3): a causal pre-LayerNorm transformer like CLIP's, under UniCL's names.

With V the vocabulary, L the context, W the width and n layers it has V W + L W + n (12 W**2 + 13 W) + 2 W parameters:
12 layers of 512 63,165,952 (UniCL's), 12 layers of 1152 248,291,712 (the paper says 256M of its own).
B batch · N tokens · W width · h heads · d head dim
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from florence_fast import ops
from florence_fast.models.config import TextConfig
from florence_fast.models.layers import (
    QuickGELU,
    add_branch_and_norm,
    init_weights,
    is_plain,
    layer_norm,
    linear,
    module_list,
    quieten_branches,
)
from florence_fast.ops.linear import product
from florence_fast.ranges import annotate


class CausalAttention(nn.Module):
    """Multi-head attention in which a token sees itself and what stands before it; nn.MultiheadAttention's names.

    Products and a softmax rather than scaled_dot_product_attention: on a CPU in bf16, forward and backward, that took
    3 to 5 times as long at 12 to 77 tokens, and texts are too short for it to save memory that counts.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, N, W) to (B, N, W), adding ``mask`` (N, N) to the scores."""
        qkv = ops.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3W)
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).flatten(1, 2)  # each (B h, N, d)
        scores = product(q * q.shape[-1] ** -0.5, k.mT, mask)  # (B h, N, N)
        out = product(scores.softmax(-1).to(v.dtype), v)
        return linear(self.out_proj, out.unflatten(0, (-1, self.heads)).transpose(1, 2).flatten(2))


class TextBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.mlp_ratio * config.width)
        self.ln_1 = nn.LayerNorm(width, eps=config.norm_eps)
        self.attn = CausalAttention(width, config.heads)
        self.ln_2 = nn.LayerNorm(width, eps=config.norm_eps)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, hidden))
        self.mlp.add_module("gelu", QuickGELU() if config.act == "quick_gelu" else nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(hidden, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Map (B, N, W) to (B, N, W), under the causal ``mask`` (N, N)."""
        x, normed = add_branch_and_norm(x, self.attn(layer_norm(self.ln_1, x), mask), self.ln_2)
        return x + self._mlp(normed)

    def _mlp(self, x: Tensor) -> Tensor:
        parts = tuple(self.mlp) if is_plain(self.mlp, kinds=(nn.Sequential,)) else ()
        activation = _ACTIVATIONS.get(tuple(map(type, parts)))
        if activation is None or not is_plain(*parts, kinds=(nn.Linear, nn.GELU, QuickGELU)):
            return self.mlp(x)
        fc, gelu, proj = cast("tuple[nn.Linear, nn.Module, nn.Linear]", parts)
        if getattr(gelu, "approximate", "none") != "none":
            return self.mlp(x)
        return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, activation=activation)


_ACTIVATIONS = {
    (nn.Linear, QuickGELU, nn.Linear): "quick_gelu",
    (nn.Linear, nn.GELU, nn.Linear): "gelu",
}


class TextTower(nn.Module):
    """Token ids (B, N) -> the normalised state of the end-of-text token (B, W).

    Its ops have a first derivative; ``ff.backend("reference")`` gives them a second one.
    """

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.config = config
        self.num_features = config.width
        embed_dim = config.token_embed_dim or config.width
        self.token_embedding = nn.Embedding(config.vocab_size, embed_dim)
        self.token_projection: nn.Module = nn.Identity()
        if config.token_embed_dim:
            self.token_projection = nn.Linear(embed_dim, config.width, bias=False)
        self.positional_embedding = nn.Parameter(torch.empty(config.context_length, config.width))
        self.resblocks = module_list(TextBlock(config) for _ in range(config.layers))
        self.ln_final = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.grad_checkpointing = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every parameter."""
        for module in self.modules():
            init_weights(module)
            if isinstance(module, CausalAttention):
                nn.init.normal_(module.in_proj_weight, std=self.config.width**-0.5)
                nn.init.zeros_(module.in_proj_bias)
        quieten_branches(
            [output for block in self.resblocks for output in (block.attn.out_proj, cast(nn.Linear, block.mlp.c_proj))]
        )
        nn.init.normal_(self.token_embedding.weight, std=0.05 if self.config.token_embed_dim else 0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        """Encode texts; what stands behind the end-of-text token changes nothing.

        Args:
            tokens: (B, N) integer ids with N at most ``context_length``, so that a batch may be cut to its longest
                text; the end-of-text token is the one with the largest id.

        Returns:
            (B, W).

        Raises:
            TypeError: ``tokens`` is not of an integer type.
            ValueError: ``tokens`` is not (B, N) or is longer than the context.
        """
        if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
            raise TypeError(f"tokens must hold integer ids, got {tokens.dtype}")
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= self.config.context_length:
            raise ValueError(
                f"tokens must have shape (B, N) with N from 1 to context_length={self.config.context_length}, "
                f"got {tuple(tokens.shape)}"
            )
        length = tokens.shape[1]
        with annotate("text.embedding"):
            x = self.token_projection(self.token_embedding(tokens)) + self.positional_embedding[:length]  # (B, N, W)
        mask = x.new_full((length, length), float("-inf")).triu(1)
        with annotate("text.blocks"):
            for block in self.resblocks:
                if self.grad_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, mask, use_reentrant=False)
                else:
                    x = block(x, mask)
        ends = tokens.argmax(1) + length * torch.arange(tokens.shape[0], device=tokens.device)
        return self.ln_final(x.flatten(0, 1).index_select(0, ends))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep one state a block for the backward pass and compute the rest again."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """Return the names of the embeddings, which decay would shrink whether their token occurs or not."""
        return {"token_embedding.weight", "positional_embedding"}
