"""Attention of a continuation: new tokens to each other and to cached keys and values.

What a new token may see is the cache's to say (`model.cache`): its kinds differ in how they keep
earlier tokens, not in the attention.
"""

from torch import Tensor

from model.cache import LayerCache
from model.documents import Documents
from model.ops import varlen


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, documents: Documents, cache: LayerCache
) -> Tensor:
    """Attend, and cache the new keys and values.

    q (rows·new, heads, d), k and v (rows·new, kv_heads, d); documents: uniform rows. Returns
    (rows·new, heads, d).
    """
    rows = documents.count
    q, k, v = (x.view(rows, -1, *x.shape[1:]) for x in (q, k, v))
    keys, values, visible = cache.extend(k, v)
    return varlen.dense(q, keys, values, mask=visible).flatten(0, 1)
