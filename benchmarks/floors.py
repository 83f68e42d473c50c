"""Lower bounds of a training step: floating-point operations, and bytes of memory traffic.

Model FLOPs of a microbatch (`pocketlm.workflow.flops`), with the (query, key) pairs of documents of
the actual lengths, are the numerator of the model FLOPs utilization (MFU).

Bytes: every tensor between two matrix products must be written by one kernel and read by the next;
`chain_bytes` counts them for perfectly fused elementwise chains.
"""

from model.network.config import ModelConfig
from model.network.gpt import GPT
from model.training.config import TrainConfig

BF16, FP32 = 2, 4


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
