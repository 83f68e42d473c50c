"""The `execution` section of params.yaml: how a run is executed, not what it computes.

Nothing here changes a result beyond rounding, so no stage becomes stale when a value changes:
dvc.yaml names none of these keys. Each run records them in its log and its provenance.
"""

from dataclasses import dataclass
from typing import Literal

from model.runtime.settings import Settings, setting


@dataclass(frozen=True)
class ExecutionConfig(Settings):
    """How a run is executed: no result depends on it, no stage becomes stale."""

    processes: int = setting("per stage; one GPU each if there are GPUs", ge=1, le=4096)
    nodes: int = setting("that share these processes, by srun on Slurm", ge=1, le=512)
    device: Literal["auto", "cuda"] = setting(
        "cuda: refuse to run on a CPU; auto: run on GPUs where there are any"
    )
    log_every: int = setting("training steps between lines of the log", "steps", ge=1, le=10**9)
    save_every_seconds: float = setting(
        "between saves of the training state for resuming", "s", gt=0, le=1e9
    )
    compile: bool = setting("compile the model on CUDA, before the clock; CPUs always run eagerly")
    cuda_graphs: bool = setting("capture and replay chunks of TTT and calibration tokens (CUDA)")
    evaluation_tokens: int = setting(
        "packed tokens run at once where nothing is trained", "tokens", ge=1, le=2**30
    )
    ttt_documents: int = setting(
        "largest batch of documents in TTT; on CUDA smaller if memory does not suffice",
        "documents",
        ge=1,
        le=2**20,
    )
    ttt_tokens: int = setting(
        "upper bound of a TTT batch's tokens per forward pass: fewer documents where windows are "
        "long",
        "tokens",
        ge=1,
        le=2**30,
    )
