"""`recray check`: what is wrong with a log, what it costs and what fixes it, from footers and a sample of events.

No Ray and no artefact: footers and row groups are read by threads of this process.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from recray.config import Config, load_config, parse_config
from recray.data.check import files as file_checks
from recray.data.check import reading
from recray.data.check.events import EventChecks, _iso
from recray.data.check.findings import Checked, Finding, render
from recray.data.check.reading import Events
from recray.data.infer import Inferred, inferred_from
from recray.data.sampling import sample_of
from recray.data.sources import files
from recray.data.sources.parquet import paths
from recray.data.sources.tables import Footer
from recray.errors import ConfigError, DataError, StorageError

__all__ = ["Checked", "Finding", "check", "render"]
ROWS = 5_000_000  # looked at; more would only make figures more exact


def check(
    source: str, roles: Mapping[str, str | None] | None = None, rows: int = ROWS, overrides: Sequence[str] = ()
) -> Checked:
    """source: a file, folder or glob of Parquet, or a configuration (.toml), whose split and model are then judged, too.

    roles: columns by role (user, item, timestamp, label), where they are not found. Raises StorageError for a wrong path,
    ConfigError for a configuration that is not valid or whose source is not 'parquet'.
    """
    config = load_config(source, overrides) if source.endswith(".toml") else None
    if config is not None and config.data.source != "parquet":
        raise ConfigError(f"{source}: recray check reads Parquet, and data.source is '{config.data.source}'")
    located = [path for path, _ in paths(config.data)] if config is not None else [source]
    found = [info for path in located for info in files.find(path, "check")]
    footers, findings = file_checks.read_footers(found)
    if not any(footer.rows for footer in footers):
        findings.append(
            Finding("error", "no_rows", "the files hold no rows", "there is nothing to prepare", "check the path")
        )
        return Checked(source, {"files": f"{len(found):,}"}, findings)
    facts = _size_facts(footers)
    findings += file_checks.of_files(located[0] if isinstance(located[0], str) else located[0][0], footers)
    config, unknown = (config, []) if config is not None else _inferred(source, footers, roles or {})
    used = [] if config is None else _used(config)
    findings += file_checks.of_columns(footers, used)
    drifted = any(one.name == "type_drift" for one in findings)
    if config is None or unknown or not _has_roles(config, footers):
        findings += unknown if not drifted else []
        return Checked(source, facts, findings)
    events, bad = reading.read(config.data, footers, rows)
    findings += bad
    if len(events.time):
        facts |= _event_facts(events)
        findings += EventChecks(events, config).all()
        findings += _memory(events, config)
    return Checked(source, facts, findings)


def _inferred(
    source: str, footers: Sequence[Footer], roles: Mapping[str, str | None]
) -> tuple[Config | None, list[Finding]]:
    """The configuration that `recray init` would write, and the roles that it would ask for."""
    try:
        found: Inferred = inferred_from(sample_of(source, footers), roles=roles)
        table = tomllib.loads(found.toml)
        config = parse_config(table)
    except (DataError, StorageError) as error:
        return None, [Finding("error", "unreadable", str(error), "prepare stops", "write this file again")]
    open_roles = [one for one in found.questions if one.startswith("which column is the ")]
    there = list(dict.fromkeys(name for footer in footers for name in footer.names))
    return config, [
        Finding(
            "error",
            "unknown_role",
            question.partition(". Write")[0],
            "events were not checked",
            f"recray check {source} --{question.split('?')[0].rpartition(' ')[2]} COLUMN; columns there: {', '.join(there)}",
        )
        for question in open_roles
    ]


def _used(config: Config) -> list[str]:
    columns = config.data.columns
    named = (columns.user, columns.item, columns.timestamp, columns.label, columns.weight, columns.split)
    return [name for name in named if name is not None] + columns.context


def _has_roles(config: Config, footers: Sequence[Footer]) -> bool:
    there = {name for footer in footers for name in footer.names}
    return {config.data.columns.user, config.data.columns.item} <= there


def _size_facts(footers: Sequence[Footer]) -> dict[str, str]:
    size, rows = sum(footer.size for footer in footers), sum(footer.rows for footer in footers)
    groups = sum(len(footer.group_rows) for footer in footers)
    return {"files": f"{len(footers):,} with {groups:,} row groups, {size / 1e6:,.1f} MB", "rows": f"{rows:,}"}


def _event_facts(events: Events) -> dict[str, str]:
    facts = {} if events.complete else {"looked at": f"{events.rows:,} rows, spread over the log"}
    for name, places in (("user", events.user), ("item", events.item)):
        counts = np.bincount(places)
        counts = counts[counts > 0]
        once = (counts == 1).mean()
        facts[f"{name}s"] = (
            f"{len(counts):,}; events per {name}: median {np.median(counts):,.0f}, 99 % {np.quantile(counts, 0.99):,.0f}, "
            f"most {counts.max():,}; {once:.0%} have one"
        )
    first, last = int(events.time.min()), int(events.time.max())
    positions = f"positions {first:,} to {last:,}"
    facts["time"] = f"{_iso(first)} to {_iso(last)}" if events.has_time else positions
    return facts


def _memory(events: Events, config: Config) -> Iterator[Finding]:
    """What the item table, its optimizer and the scores of a batch take, against this machine's memory."""
    scale = events.total_rows / max(events.rows, 1)  # an upper bound: more rows show fewer new items
    items, dim = len(events.items) * scale, config.model.dim
    table = items * dim * 4 * 3
    scores = items * config.training.global_batch_size * 4 if config.loss.scores_all_items else 0
    shards = events.total_rows * 24
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    parts = [f"item table with Adam {table / 1e6:,.1f} MB (model.dim = {dim})"]
    parts += [f"scores of a batch {scores / 1e6:,.1f} MB (loss.name = '{config.loss.name}')"] if scores else []
    parts += [f"histories in prepared shards about {shards / 1e6:,.1f} MB"]
    values = {"table_bytes": round(table), "score_bytes": round(scores), "history_bytes": shards}
    if table + scores > 0.5 * memory:
        fix = (
            "loss.name = 'sampled_softmax'"
            if scores > table
            else "lower model.dim, or model.embedding.mode = 'row_sharded'"
        )
        what = f"{'; '.join(parts)}: this machine has {memory / 1e9:,.0f} GB"
        yield Finding("warning", "memory", what, "training may run out of memory", fix, values)
    else:
        yield Finding("note", "memory", "; ".join(parts), values=values)
