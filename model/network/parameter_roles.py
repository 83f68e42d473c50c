"""What is done with each parameter of the network: one table, a row for each pattern of names.

    optimizer   matrices: Muon; embeddings, scalars: AdamW, each with a learning rate of its own
    storage     gptq: codes, with the Hessian of the inputs; rounded: codes, each value to the
                nearest; fp16: as it is, in 16 bits
    qat         whether late quantization-aware training rounds it
    product     the module of its block that multiplies by it, together with the other matrices of
                that product (`model.network.compute_weights`); None: no copy is made for products
    row_scale   the parameter of its block that scales the rows of the product

The optimizer, quantization and the copies for products read their rules here, so a new parameter
needs one row. Control tensors scale activations per channel or per head: few values with a large
effect, which stay exact.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal


@dataclass(frozen=True)
class Role:
    """The row of the table for parameters whose names match `pattern` (`*`: one layer)."""

    pattern: str
    optimizer: Literal["matrices", "embeddings", "scalars"]
    storage: Literal["gptq", "rounded", "fp16"]
    qat: bool = False
    product: str | None = None
    row_scale: str | None = None


def _matrix(name: str, product: str, row_scale: str | None = None) -> Role:
    return Role(f"blocks.*.{name}.weight", "matrices", "gptq", True, product, row_scale)


ROLES = (
    _matrix("attention.query", "attention"),
    _matrix("attention.key", "attention"),
    _matrix("attention.value", "attention"),
    _matrix("attention.output", "attention.output", "attention_scale"),
    _matrix("mlp.up", "mlp.up"),
    _matrix("mlp.down", "mlp.down", "mlp_scale"),
    Role("embedding", "embeddings", "gptq"),  # tied: solved as the output projection
    Role("bigram.table", "embeddings", "rounded"),
    Role("bigram.projection.weight", "scalars", "rounded"),
    Role("bigram.scale", "scalars", "fp16"),
    Role("value_embedding.table", "embeddings", "rounded"),
    Role("value_embedding.projection.weight", "scalars", "rounded"),
    Role("value_embedding.scale", "scalars", "fp16"),
    Role("smear.gate", "scalars", "fp16"),
    Role("token_smear.strength", "scalars", "fp16"),
    Role("token_smear.weight", "scalars", "fp16"),
    Role("skip_weights", "scalars", "fp16"),
    Role("mudd_skips.*.projection.weight", "scalars", "rounded"),
    Role("mudd_skips.*.mix", "scalars", "fp16"),
    Role("mudd_skips.*.bias", "scalars", "fp16"),
    Role("blocks.*.mix", "scalars", "fp16"),
    Role("blocks.*.attention_scale", "scalars", "fp16"),
    Role("blocks.*.mlp_scale", "scalars", "fp16"),
    Role("blocks.*.attention.gain", "scalars", "fp16"),
    Role("blocks.*.attention.value_gain", "scalars", "fp16"),
    Role("blocks.*.attention.exclusion.alpha", "scalars", "fp16"),
    Role("blocks.*.attention.output_gate.weight", "scalars", "fp16"),
    Role("blocks.*.lane_weights", "scalars", "fp16"),
)


def parameter_roles(names: Iterable[str]) -> dict[str, Role]:
    """The role of each parameter; raises ValueError unless exactly one row matches its name."""
    found = {}
    for name in names:
        rows = [role for role in ROLES if fnmatchcase(name, role.pattern)]
        if len(rows) != 1:
            raise ValueError(
                f"parameter {name}: matches {len(rows)} rows of the table in {__name__}, not one"
            )
        found[name] = rows[0]
    return found
