"""The `quantize` section of params.yaml: GPTQ, compression and the byte budget."""

from dataclasses import dataclass
from typing import Literal

from model.runtime.settings import Settings, require, setting


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """GPTQ, compression and the byte budget."""

    budget_bytes: int = setting(
        "code + artifact, decimal; weights are rounded as finely as it allows",
        "bytes",
        ge=1,
        le=10**12,
    )
    code_reserve_bytes: int = setting(
        "left free for the code, whose real size the report counts", "bytes", ge=0, le=10**12
    )
    calibration_sequences: int = setting(
        "documents the model writes for its own calibration", ge=1, le=10**6
    )
    calibration_tokens: int = setting("length of each of them", "tokens", ge=1, le=2**24)
    calibration_temperature: float = setting("of the sampling", gt=0, le=1e3)
    calibration_seed: int = setting(
        "of the sampling, here and for sensitivities", ge=0, le=2**32 - 1
    )
    sensitivity_sequences: int = setting(
        "of these documents, on which gradients are taken: for the bit allocation, and by row",
        ge=1,
        le=10**6,
    )
    damping: float = setting("added to the Hessian's diagonal", "share of its mean", gt=0, le=1e6)
    block_columns: int = setting("columns GPTQ solves at once", "columns", ge=1, le=2**16)
    column_rates: float = setting(
        "power of the conditional deviation in step sizes by column; 1: water-filling; 0 = off",
        ge=0,
        le=2,
    )
    row_rates: float = setting(
        "power of 1/√Fisher information in step sizes by row; 1: water-filling; 0 = off", ge=0, le=2
    )
    fisher: float = setting(
        "of the loss's Hessian in GPTQ's, the rest being that of the inputs; 0 = off",
        "share",
        ge=0,
        le=1,
    )
    rate_penalty: float = setting(
        "code length in the choice of codes, 1: at the price of a finer step size; 0 = off",
        ge=0,
        le=100,
    )
    trellis: bool = setting("trellis codes: chosen together down the columns, on two grids")
    tuning_epochs: int = setting(
        "passes over the calibration text that train the fp16 values after rounding; 0 = off",
        ge=0,
        le=1000,
    )
    tuning_tokens: int = setting("batch of each of its steps", "tokens", ge=1, le=2**24)
    tuning_lr: float = setting("its first learning rate, which falls to 0", gt=0, le=1)
    compressors: list[Literal["lzma", "zstd", "brotli"]] = setting(
        "tried on what is not codes, which are range-coded; the smallest result wins"
    )
    validation_documents: int | None = setting(
        "validation documents scored with the artifact, evenly spaced; null = all", ge=1, le=10**9
    )

    def __post_init__(self) -> None:
        require(bool(self.compressors), "compressors", "is empty", "name at least one")
        require(
            self.code_reserve_bytes < self.budget_bytes,
            "code_reserve_bytes",
            f"{self.code_reserve_bytes} leaves no room in budget_bytes ({self.budget_bytes})",
            "lower code_reserve_bytes, or raise budget_bytes",
        )
