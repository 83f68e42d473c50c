"""Lower bounds of a training step: floating-point operations, and bytes of memory traffic.

Model FLOPs of a microbatch, the numerator of the model FLOPs utilization (MFU):

    6 · (values in matrices that tokens are multiplied by) · tokens
    + 12 · executed layers · heads · d · Σ_documents n(n + 1)/2

The 6 is 2 for the forward product plus 4 for the gradients of input and weight; the 12 is the same
for the two products of attention, over the (query, key) pairs that the causal mask leaves in
documents of the actual lengths. Recomputation does not count as model FLOPs.

Bytes: every tensor between two matrix products must be written by one kernel and read by the next;
`chain_bytes` counts them for perfectly fused elementwise chains.
"""

from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.training.config import TrainConfig

BF16, FP32 = 2, 4


def product_values(model: GPT) -> int:
    """Values of all matrices that every token is multiplied by, the tied head included."""
    projections = [module for module in (model.bigram, model.value_embedding) if module is not None]
    tables = sum(module.projection.weight.numel() for module in projections)
    config = model.config
    executed = config.matrix_values // config.layers * len(config.executed_layers)
    return executed + model.embedding.numel() + tables


def attention_flops(params: ModelConfig, pairs: float) -> float:
    """Forward and backward of all layers' attention, for so many (query, key) pairs."""
    return 12.0 * len(params.executed_layers) * params.heads * params.head_width * pairs


def product_flops(model: GPT, tokens: int) -> float:
    """Forward and backward of all products of activations with matrices."""
    return 6.0 * product_values(model) * tokens


def chain_bytes(params: ModelConfig, tokens: int) -> float:
    """Bytes that the elementwise chains between the blocks' products must read and write.

    In units of width w, query width q and key width k, forward: mix and norm 4w (x, x0; u, n);
    q and k normed and rotated 2(q + k); XSA 2q + k; residual and norm 4w; residual 3w. Backward:
    norm and mix 7w (dn, du, x, x0, dx, dx0 twice); rotation and norms 3(q + k); XSA 3q + 2k;
    norm 4w. The activation is fused into the products around it. Skips: 2w forward, 4w backward.
    """
    w, q = params.width, params.heads * params.head_width
    k = params.kv_heads * params.head_width
    block = 22 * w + 5 * (q + k) + (5 * q + 3 * k) * params.exclusive_attention
    visits = len(params.executed_layers)
    skips = visits // 2 * 6 * w * params.skips
    return float(BF16 * tokens * (visits * block + skips))


def head_bytes(params: ModelConfig, tokens: int) -> float:
    """Bytes of the logits (written, read, and the same for the gradient) and of the embedding."""
    return float(BF16 * tokens * (5 * params.vocabulary + 12 * params.width))


def optimizer_work(model: GPT, train: TrainConfig) -> tuple[float, float]:
    """Bytes and FLOPs of one optimizer step on one process.

    Muon reads gradient, momentum and weight and writes the latter two; AdamW has two moments.
    Newton-Schulz of m ≤ n: per iteration two products of 2m²n and one of 2m³.
    """
    matrices = [matrix.weight for matrix in model.matrices().values()]
    values = sum(weight.numel() for weight in matrices)
    rest = sum(parameter.numel() for parameter in model.parameters()) - values
    flops = 0.0
    for weight in matrices:
        m, n = sorted(weight.shape)
        flops += train.newton_schulz_steps * (4.0 * m * m * n + 2.0 * m**3)
    return float(FP32 * (5 * values + 7 * rest)), flops


def average_bytes(model: GPT) -> float:
    """Bytes of the moving average: weights read, average read and written."""
    return float(FP32 * 3 * sum(parameter.numel() for parameter in model.parameters()))
