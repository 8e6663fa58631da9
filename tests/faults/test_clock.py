"""The clock of the machine jumps back an hour or forward a day, again and again, while training saves and resumes."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

import recray
from helpers.faults import Table, config_of, half_written, same_weights
from helpers.inline_tasks import inline_prepare

pytestmark = pytest.mark.slow


def test_a_clock_that_jumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: Table) -> None:
    keys = ("scaling.num_workers=0", "training.epochs=4")
    whole, disturbed = config_of(tmp_path, "undisturbed", *keys), config_of(tmp_path, "clock", *keys)
    inline_prepare(whole)
    recray.train(whole)
    now, jumps = time.time, itertools.cycle((-3600.0, 86_400.0, 0.0))
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps))
    recray.train(disturbed, until=2)
    recray.train(disturbed)
    assert same_weights(whole, disturbed) and not half_written(disturbed.run_uri)
    table.row("a clock that jumps by -1 h and +1 day", "nothing", 0)
