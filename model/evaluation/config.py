"""The `evaluate` section of params.yaml: evaluation without adaptation."""

from dataclasses import dataclass

from model.runtime.settings import Settings, setting


@dataclass(frozen=True)
class EvaluateConfig(Settings):
    """Evaluation without adaptation."""

    documents: int | None = setting(
        "validation documents, evenly spaced; null = all", ge=1, le=10**9
    )
    offset: int = setting(
        "take those that stand so many places later: other documents, to tune on",
        "documents",
        ge=0,
        le=10**9,
    )
    sliding_stride: int = setting(
        "new tokens scored per window of sequence_length", "tokens", ge=1, le=2**24
    )
