"""A short run of the campaign of kills; `python -m tests.campaigns.kills` runs a long one."""

from pathlib import Path

import pytest

from tests.campaigns.kills import campaign


@pytest.mark.campaign
@pytest.mark.workflow
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    rounds = campaign(kills=3, seeds=1, seed=1, place=tmp_path)
    assert [one.problem for one in rounds if one.problem] == []
