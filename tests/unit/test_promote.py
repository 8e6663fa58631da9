"""What is served: the gate, the pointer, rollback, and a served model that is asked with the ids of another dataset."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import recray
from helpers.cli import recray_command
from helpers.growing_log import growing_config, write_day
from helpers.inline_tasks import inline_prepare
from recray import inventory, served
from recray.artifacts import CHECKPOINT, Run, current_of, in_use
from recray.config import Config
from recray.errors import ConfigError, LineageError
from recray.evaluation.promote import promote, rollback
from recray.loading.collate import eval_queries
from recray.retrieval.recommenders import RunArtifacts, open_recommenders
from recray.retrieval.translate import translated


def _night(config: Config) -> None:
    inline_prepare(config)
    recray.train(config)
    recray.index(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two nights: the first one is served, the second one is trained on a log that has grown."""
    folder = tmp_path_factory.mktemp("nights")
    for day in range(2):
        write_day(folder / "clicks", day)
    config = growing_config(folder)
    _night(config)
    first = promote(config)
    assert first.promoted and [one.name for one in first.checks] == ["served", "popularity", "index", "unknown items"]
    write_day(folder / "clicks", 2)
    _night(config)
    return folder


def test_a_served_model_answers_queries_of_another_dataset_as_it_answers_raw_keys(folder: Path) -> None:
    config = growing_config(folder)
    run = Run(config)
    standing = served.served_of(run.uri)
    assert standing is not None
    source = in_use(f"{run.uri}/checkpoint/{standing.checkpoint}", CHECKPOINT)
    old, new = RunArtifacts.of_checkpoint(run, source), RunArtifacts.of(run)
    assert old.dataset.record.id != new.dataset.record.id
    asked = translated(
        open_recommenders(old, config, ("train", "valid")).final, config.model.history_length, new.dataset, old.dataset
    )
    items = new.dataset.items()["item"].to_pylist()
    model = recray.load(run.uri)
    assert isinstance(model, recray.inference.LoadedRetriever)
    numeric = next(one for one in new.dataset.record.features if one.name == "minutes")
    devices = next(one for one in new.dataset.record.features if one.name == "device").vocabulary
    assert devices is not None and "day2" in devices  # the old model does not know it
    compared = unknown = 0
    for table in new.dataset.iter_tables("test"):
        for query in eval_queries(table, 64, config.model.history_length, "event"):
            # Lists for a history are those of a user without a vector: the tables of users are compared below.
            stranger = replace(query.batch, user_B=torch.zeros_like(query.batch.user_B))
            ids, scores = asked.recommend(replace(query, batch=stranger), 5, False)
            bounds = query.seen.offsets.tolist()
            histories = [query.seen.values[a:b].tolist() for a, b in itertools.pairwise(bounds)]
            # An item that the new dataset does not know has no key there: it must be unknown to the old model, too.
            keys = [[items[one] if one > 1 else "no such item" for one in row] for row in histories]
            at = query.batch.context["device"].tolist()  # type: ignore[union-attr]
            minutes = query.batch.context["minutes"].double() * numeric.std + numeric.mean  # type: ignore[union-attr]
            context = {"device": [devices[one - 2] if one > 1 else "other" for one in at], "minutes": minutes.tolist()}
            lists = model.recommend(history=keys, context=context, k=5, exclude_seen=False).to_pandas()
            for row in np.flatnonzero(np.diff(bounds)):
                wanted = lists[lists["user"] == row]
                found = [items[one] if one else None for one in ids[row]]
                new_to_both = [key if key in items else None for key in wanted["item"]]
                unknown += new_to_both.count(None)
                assert found == new_to_both
                np.testing.assert_allclose(scores[row], wanted["score"], rtol=1e-4, atol=1e-4)
                compared += 1
    assert compared > 300
    mine, other = (one.dataset.user_keys().to_pandas().set_index("user_id")["user"] for one in (new, old))
    for number, key in mine.items():
        to = int(asked.users[number])
        assert other[to] == key if to else key not in set(other)


def test_a_worse_model_is_held_back_and_what_is_served_stays(folder: Path) -> None:
    config = growing_config(folder, "optim.learning_rate=1e-9")
    run = Run(config).uri
    before = served.served_of(run)
    _night(config)
    found = recray_command("promote", run)
    assert found.code == 1
    assert found.out.startswith("FAIL  served: ndcg@10 ") and "held back: checkpoint" in found.out
    assert served.served_of(run) == before and before is not None
    assert recray_command("promote", run, "--exit-zero").code == 0
    assert served.served_of(run) == before
    assert current_of(run)["checkpoint"] != before.checkpoint
    assert recray.load(run).config.optim.learning_rate == 0.02
    assert recray.load(run, current=True).config.optim.learning_rate == 1e-9
    assert recray_command("promote", f"{run}-of-nobody").code == 2


def test_promote_roll_back_and_prune(folder: Path) -> None:
    config = growing_config(folder)
    run = Run(config).uri
    (first,) = served.standing(run)
    recray.train(config)
    found = promote(config)
    assert found.promoted, found.checks
    by_name = {one.name: one for one in found.checks}
    assert by_name["served"].values["gain"] == pytest.approx(
        by_name["served"].values["candidate"] - by_name["served"].values["other"], abs=1e-9
    )
    assert promote(config).checks == []  # it is served already
    second = served.served_of(run)
    assert second is not None and second.checkpoint != first.checkpoint and second.dataset != first.dataset
    kept = {(one.stage, one.identity) for one in inventory.list_artifacts(run)}
    assert {(e.stage, e.identity) for e in inventory.list_artifacts(run) if e.served} == second.artifacts
    # A third one, which is in use and not served.
    recray.train(growing_config(folder, "run.seed=1", "optim.learning_rate=0.03"))
    recray.train(growing_config(folder, "optim.learning_rate=0.04"))
    gone = {(one.stage, one.identity) for one in inventory.prune(run, keep=0)}
    assert gone and not gone & (first.artifacts | second.artifacts) and first.artifacts < kept

    assert rollback(config) == first and served.served_of(run) == first
    assert recray.load(run).recommend(history=[["i001"]], k=3).num_rows == 3  # type: ignore[union-attr]
    with pytest.raises(LineageError, match="serves its first promotion: there is nothing to return to"):
        rollback(config)
    again = promote(config)  # what was withdrawn stays so
    assert not again.promoted and [one.name for one in again.checks if not one.passed] == ["withdrawn"]
    forced = recray_command("--json", "promote", run, "--force")
    assert forced.code == 0 and json.loads(forced.out.splitlines()[-1])["values"]["forced"]
    assert served.served_of(run) is not None and served.served_of(run) != first


def test_a_model_that_was_trained_on_the_queries_is_not_compared(folder: Path) -> None:
    earlier = growing_config(folder, "data.split.end=2023-11-16T14:00:00Z")
    _night(earlier)
    with pytest.raises(ConfigError, match=r"was trained on events after the test split of the candidate begins"):
        promote(earlier)
