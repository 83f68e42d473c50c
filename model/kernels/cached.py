"""Attention of a continuation: new tokens to each other and to cached keys and values.

What a new token may see is the cache's to say (`model.network.kv_cache`): its kinds differ in how
they keep earlier tokens, not in the attention. The query heads that share a key/value head are laid
out as further queries of that head, so that keys and values are read where they lie, not copied per
head.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from model.data.packing import Documents
from model.kernels.varlen import DENSE_KERNELS
from model.network.kv_cache import LayerCache


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: LayerCache) -> Tensor:
    """Attend, and give the new keys and values to the cache.

    q (rows·new, heads, d), k and v (rows·new, kv_heads, d); documents: uniform rows. Returns
    (rows·new, heads, d).
    """
    rows = documents.count
    q, k, v = (x.view(rows, -1, *x.shape[1:]) for x in (q, k, v))
    return grouped_attention(q, *cache.extend(k, v)).flatten(0, 1)


def grouped_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """Softmax attention: q (rows, new, heads, d), k and v (rows, total, kv_heads, d).

    visible: as `LayerCache.extend` returns it. Returns (rows, new, heads, d).
    """
    rows, new, heads, width = q.shape
    groups = heads // k.shape[2]
    q = q.view(rows, new, -1, groups, width).permute(0, 2, 3, 1, 4).flatten(2, 3)
    if visible is not None:
        visible = visible.repeat(*(1,) * (visible.dim() - 2), groups, 1)
    with sdpa_kernel(DENSE_KERNELS):
        y = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), visible)
    return y.unflatten(2, (groups, new)).permute(0, 3, 1, 2, 4).flatten(2, 3)
