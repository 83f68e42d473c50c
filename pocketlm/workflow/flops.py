"""Model FLOPs: the floating-point operations that the products and attention of a model need.

Forward, per token that is read:

    2 · (values in matrices that tokens are multiplied by) + 4 · executed layers · heads · d · pairs

The 2 is a multiplication and an addition; the 4 is the same for the two products of attention, over
the (query, key) pairs of a token that the causal mask leaves. The gradients of inputs and weights
cost twice as much again. Recomputation does not count.
"""

from model.network.config import ModelConfig


def product_values(config: ModelConfig) -> int:
    """Values of all matrices that every token is multiplied by, the tied head included."""
    executed = config.matrix_values // config.layers * len(config.executed_layers)
    bigram = config.bigram_width * config.width if config.bigram_buckets else 0
    value = config.value_width * config.kv_heads * config.head_width if config.value_layers else 0
    return executed + config.vocabulary * config.width + bigram + value


def attention_flops(config: ModelConfig, pairs: float) -> float:
    """Forward and backward of all layers' attention, for so many (query, key) pairs."""
    return 12.0 * len(config.executed_layers) * config.heads * config.head_width * pairs


def product_flops(config: ModelConfig, tokens: float) -> float:
    """Forward and backward of all products of activations with matrices."""
    return 6.0 * product_values(config) * tokens


def forward_flops(config: ModelConfig) -> float:
    """Forward, per token, in windows of sequence_length: a token sees half of them on average."""
    pairs = (config.sequence_length + 1) / 2
    return (product_flops(config, 1) + attention_flops(config, pairs)) / 3
