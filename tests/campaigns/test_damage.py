"""A short run of the campaign of damaged files; `python -m tests.campaigns.damage`: a long one."""

from pathlib import Path

import pytest

from tests.campaigns.damage import OUTCOMES, campaign


@pytest.mark.campaign
@pytest.mark.workflow
def test_damaged_files_are_refused_or_change_nothing(tmp_path: Path) -> None:
    found = campaign(cases=4, seed=1, place=tmp_path)
    wrong = {kind: outcomes for kind, outcomes in found.items() if set(outcomes) & {*OUTCOMES[2:]}}
    assert wrong == {}
