"""Keys and values of earlier tokens, so that a continuation runs only its own tokens.

All documents of a cache have the same length so far. Keys are stored rotated, at their true
positions. What is stored carries no gradient: a training step through a cached continuation
differentiates the new tokens alone.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from workflow.params import ModelParams

NO_TOKEN = -1  # precedes the first token of a document


@dataclass
class LayerCache:
    """One layer's part of a `Cache`: keys and values, each (rows, capacity, kv_heads, d)."""

    keys: Tensor
    values: Tensor
    length: int = 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append k and v (rows, new, kv_heads, d); return keys, values and who may see what.

        Keys and values are (rows, total, kv_heads, d), the new tokens last; gradients flow to the
        new ones only. The third is bool (new, total) or (rows, 1, new, total), True where a new
        token may look, or None: every one may look everywhere.
        """
        end = self.length + k.shape[1]
        if end > self.keys.shape[1]:
            raise ValueError(f"{end} tokens do not fit a cache of {self.keys.shape[1]}")
        past_keys, past_values = self.keys[:, : self.length], self.values[:, : self.length]
        keys, values = self.keys[:, :end], self.values[:, :end]
        if k.requires_grad or v.requires_grad:
            keys, values = torch.cat((past_keys, k), 1), torch.cat((past_values, v), 1)
        self.keys[:, self.length : end] = k.detach()
        self.values[:, self.length : end] = v.detach()
        self.length = end
        new = k.shape[1]
        positions = torch.arange(end, device=k.device)
        visible = positions <= positions[end - new :, None] if new > 1 else None
        return keys, values, visible


class Cache:
    """Earlier text of `rows` documents for `GPT.forward`, up to `capacity` tokens each."""

    def __init__(
        self,
        params: "ModelParams",
        rows: int,
        capacity: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        shape = (rows, capacity, params.kv_heads, params.head_width)
        self.layers = [
            LayerCache(
                torch.zeros(shape, device=device, dtype=dtype),
                torch.zeros(shape, device=device, dtype=dtype),
            )
            for _ in range(params.layers)
        ]
        self.rows = rows
        self.length = 0  # tokens seen by each document
        # What precedes the next token: int64 (rows,), and (rows, width) before the smear.
        self.last_token: Tensor | int = NO_TOKEN
        self.last_embedding: Tensor | int = 0

    def remember(self, tokens: Tensor, embeddings: Tensor) -> None:
        """Keep the last of tokens (rows·new,) and of their normed embeddings (rows·new, width)."""
        self.last_token = tokens.view(self.rows, -1)[:, -1]
        self.last_embedding = embeddings.detach().view(self.rows, -1, embeddings.shape[-1])[:, -1]
