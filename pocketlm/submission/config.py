"""The `submission` section of params.yaml: what the folder of a submission says of it."""

import re
from dataclasses import dataclass

from model.runtime.settings import Settings, require, setting


@dataclass(frozen=True)
class SubmissionConfig(Settings):
    """Names in the folder of a submission."""

    name: str = setting("of the submission; its folder is records/<date>_<name>")
    author: str = setting("who submits it")
    github_id: str = setting("of the author")
    blurb: str = setting("the technique in a sentence or two")
    track: str = setting("of the challenge")
    despite_audit: bool = setting("write the folder although the audit fails, and say so on top")

    def __post_init__(self) -> None:
        require(
            re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,80}", self.name) is not None,
            "name",
            f"{self.name!r} is no name of a folder",
            "use letters, digits, '_', '.' and '-'",
        )
