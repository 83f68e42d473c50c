"""The `quantize` section of params.yaml: GPTQ, compression and the byte budget."""

from dataclasses import dataclass
from typing import Literal

from model.runtime.settings import Settings, require, setting


@dataclass(frozen=True)
class QuantizeConfig(Settings):
    """GPTQ, compression and the byte budget."""

    budget_bytes: int = setting(
        "code + artifact, decimal; weights are rounded as finely as it allows", "bytes", ge=1
    )
    calibration_sequences: int = setting("documents the model writes for its own calibration", ge=1)
    calibration_tokens: int = setting("length of each of them", "tokens", ge=1)
    calibration_temperature: float = setting("of the sampling", gt=0)
    calibration_seed: int = setting("of the sampling, here and for sensitivities", ge=0)
    cuda_graphs: bool = setting("record the work of a calibration token and replay it (CUDA)")
    damping: float = setting("added to the Hessian's diagonal", "share of its mean", gt=0)
    block_columns: int = setting("columns GPTQ solves at once", "columns", ge=1)
    compressors: list[Literal["lzma", "zstd", "brotli"]] = setting(
        "tried on what is not codes, which are range-coded; the smallest result wins"
    )

    def __post_init__(self) -> None:
        require(bool(self.compressors), "compressors", "is empty", "name at least one")
