"""The `report` section of params.yaml: the significance test and the time allowed."""

from dataclasses import dataclass

from model.runtime.settings import Settings, setting


@dataclass(frozen=True)
class ReportConfig(Settings):
    """The significance test, and the time allowed."""

    baseline: str = setting(
        "no_ttt: this run's own models without TTT; a file in records/; or none: no test"
    )
    margin: float = setting(
        "the loss must be lower than the baseline by this", "nats/token", ge=0, le=1e6
    )
    significance: float = setting("claim it if p is below this", "probability", ge=0, le=1)
    confidence: float = setting(
        "level of the interval of the difference", "probability", gt=0, lt=1
    )
    train_budget_seconds: float = setting("time allowed for training", "s", gt=0, le=1e9)
    evaluate_budget_seconds: float = setting("time allowed for evaluation", "s", gt=0, le=1e9)
