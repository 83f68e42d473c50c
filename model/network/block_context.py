"""What a block is given besides the residual stream: everything that depends on the text alone."""

from typing import NamedTuple

from torch import Tensor

from model.data.packing import Documents
from model.network.adapters import NO_ADAPTERS, BlockAdapters
from model.network.kv_cache import LayerCache


class BlockContext(NamedTuple):
    """The documents of T packed tokens, and what is known of them where a block runs.

    cos_sin: of `rotation`, each fp32 (T, 1, rope_width/2). value_embeddings: (T, kv_heads·d), None
    where a block adds none. adapters: of the documents, at this place. kv_cache: keys and values
    of earlier text of the same documents. query_positions: int64 (m,), the positions in each
    document (`model.data.packing`) for which alone the block works, but for keys and values; None:
    all. Never both of the last two.
    """

    documents: Documents
    cos_sin: tuple[Tensor, Tensor]
    value_embeddings: Tensor | None = None
    adapters: BlockAdapters = NO_ADAPTERS
    kv_cache: LayerCache | None = None
    query_positions: Tensor | None = None
