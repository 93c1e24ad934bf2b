"""What a run says of loading: how long it took, and the most memory that any rank has taken."""

import re
from types import SimpleNamespace
from typing import cast

from model_fixtures import CPU

from trainer.rank.job import Job
from trainer.rank.sliced import loading


def test_the_rank_that_took_most_is_told() -> None:
    said: list[str] = []
    ranks = SimpleNamespace(device=CPU, gather=lambda mine: [mine, 99.0, 7.0])
    job = cast(Job, SimpleNamespace(say=said.append, ranks=ranks))
    for done in ([], ["made ready to train"]):
        with loading(job, *done):
            assert len(said) == len(done), "it is said at the end"
    told = [re.fullmatch(r"(.+) in \d+\.\d s, at most 99\.00 GB on a rank so far", line) for line in said]
    assert [one[1] for one in told if one is not None] == ["loaded", "made ready to train"]
