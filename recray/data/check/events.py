"""What users, items and times of a log show: duplicates, bots, skew, gaps, splits, how fast items age."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recray.config import Config
from recray.data import split
from recray.data.check.findings import Finding
from recray.data.check.reading import Events
from recray.errors import ConfigError

_HOUR, _DAY = 3_600_000_000, 86_400_000_000
_NO_ID = ["", "0", "-1", "null", "none", "nan", "na", "n/a", "unknown", "undefined", "anonymous", "guest", "default"]
_DUPLICATES = 0.01  # share of rows from which repeated rows are a problem
_REPEATS = 0.2  # share of events of an item that the user chose before
_ONE_USER = 0.01  # share of all events
_ONE_ITEM = 0.1
_FEW_KEYS = 100  # with fewer users or items, a large share of one is no news
_TIED = 0.5  # share of a user's events that have the same time as the one before
_COLD = 0.3  # share of test targets whose item has no training event
_GAP_EVENTS = 20  # events that a period has on other days, where it has none
_FEW_TESTS = 100


@dataclass(frozen=True)
class EventChecks:
    """Checks of events; quantities that several of them need are computed once."""

    events: Events
    config: Config

    @cached_property
    def order(self) -> np.ndarray:
        """Events by (user, time, place in the files)."""
        return np.lexsort((self.events.time, self.events.user))

    @cached_property
    def per_user(self) -> np.ndarray:
        return np.bincount(self.events.user, minlength=len(self.events.users))

    @cached_property
    def per_item(self) -> np.ndarray:
        return np.bincount(self.events.item, minlength=len(self.events.items))

    @cached_property
    def born(self) -> np.ndarray:
        """(items,) time of the first event; that of items without one is the largest number."""
        first = np.full(len(self.events.items), np.iinfo(np.int64).max)
        np.minimum.at(first, self.events.item, self.events.time)
        return first

    def all(self) -> Iterator[Finding]:
        yield from self._repeats()
        yield from self._ids()
        yield from self._shares()
        yield from self._labels()
        if self.config.data.columns.timestamp:
            yield from self._ties()
        if self.events.has_time:
            yield from self._bots()
            yield from self._ends()
            if self.events.complete:  # a sample of files leaves gaps
                yield from self._gaps()
            yield from self._ages()
        yield from self._split()

    # ---- rows

    def _repeats(self) -> Iterator[Finding]:
        """Rows that are there twice, and events of items that the user chose before."""
        e, rows = self.events, len(self.events.time)
        timed = self.config.data.columns.timestamp is not None
        around = np.lexsort((e.time, e.item, e.user)) if timed else np.lexsort((e.item, e.user))
        pair = (e.user[around][1:] == e.user[around][:-1]) & (e.item[around][1:] == e.item[around][:-1])
        same = pair & (e.time[around][1:] == e.time[around][:-1]) if timed else pair
        twice = int(same.sum())
        if twice > _DUPLICATES * rows:
            kept = "one of each is kept" if self.config.data.drop_duplicates else "all are kept, and counted twice"
            yield Finding(
                "warning",
                "duplicates",
                f"{twice:,} of {rows:,} rows repeat user, item{' and time' if timed else ''} of another ({twice / rows:.1%})",
                f"{kept} (data.drop_duplicates); often a file that was delivered twice",
                "find out which job writes them twice; data.drop_duplicates = true removes them",
                {"rows": twice, "share": twice / rows},
            )
        again = int((pair & ~same).sum())
        share = again / max(rows - twice, 1)
        if share > _REPEATS and self.config.evaluation.filter_seen:
            yield Finding(
                "warning",
                "repeats",
                f"{share:.1%} of events are of an item that the user chose before",
                "with evaluation.filter_seen = true such targets can never be hit",
                "set evaluation.filter_seen = false if users are to be shown items again",
                {"share": share},
            )
        elif again:
            text = f"{share:.1%} of events are of an item that the user chose before (evaluation.filter_seen)"
            yield Finding("note", "repeats", text, values={"share": share})

    def _ids(self) -> Iterator[Finding]:
        """Texts that differ by spaces or case only."""
        for role, keys in (("user", self.events.users), ("item", self.events.items)):
            if not pa.types.is_string(keys.type):
                continue
            trimmed = pc.utf8_trim_whitespace(keys)
            spaces = len(keys) - int(pc.count_distinct(trimmed).as_py())
            case = len(keys) - spaces - int(pc.count_distinct(pc.utf8_lower(trimmed)).as_py())
            if spaces or case > 0.001 * len(keys):
                yield Finding(
                    "warning",
                    "untidy_ids",
                    f"{spaces + case:,} of {len(keys):,} {role} ids differ from another one by spaces or case only",
                    f"each is a {role} of its own, with a part of the events",
                    f"trim and lower-case {role} ids where the log is written",
                    {"role": role, "ids": spaces + case},
                )

    def _shares(self) -> Iterator[Finding]:
        """One user or item that has much of the log."""
        names = (("user", self.per_user, self.events.users), ("item", self.per_item, self.events.items))
        for role, counts, keys in names:
            total = int(counts.sum())
            if not total or len(keys) < _FEW_KEYS:
                continue
            top = int(counts.argmax())
            share, key = counts[top] / total, str(keys[top])
            placeholder = key.strip().lower() in _NO_ID and share > 0.001 and counts[top] > 10 * counts.mean()
            if placeholder or share > (_ONE_USER if role == "user" else _ONE_ITEM):
                meaning = ", a placeholder for 'no id'" if placeholder else ""
                cost = "its history mixes those of many people" if role == "user" else "it crowds other items out"
                yield Finding(
                    "warning",
                    f"skewed_{role}s",
                    f"{role} {key!r} has {counts[top]:,} of {total:,} events ({share:.1%}){meaning}",
                    f"{cost}; metrics and popularity lean towards it",
                    f"drop the rows of this {role} where the log is written, unless it is real",
                    {role: key, "events": int(counts[top]), "share": float(share)},
                )

    def _labels(self) -> Iterator[Finding]:
        label = self.events.label
        if label is not None and len(label) and label.min() == label.max():
            yield Finding(
                "warning",
                "one_label",
                f"every label looked at is {label[0]:g}",
                "a ranker has nothing to tell apart",
                "write shown and not chosen rows with label 0, or leave out data.columns.label and set data.negatives",
            )

    # ---- times

    def _ties(self) -> Iterator[Finding]:
        user, time = self.events.user[self.order], self.events.time[self.order]
        same = user[1:] == user[:-1]
        item = self.events.item[self.order]
        tied = same & (time[1:] == time[:-1]) & (item[1:] != item[:-1])
        share = float(tied.sum() / max(same.sum(), 1))
        if share > _TIED:
            yield Finding(
                "warning",
                "coarse_times",
                f"{share:.1%} of events have the same time as the user's event before",
                "their order is that of the files: what a sequence model learns from it may be chance",
                "write the time of each event, not its date; or use model.name = 'two_tower'",
                {"share": share},
            )

    def _bots(self) -> Iterator[Finding]:
        """Users that never sleep, act faster than people, or at equal intervals."""
        e, active = self.events, np.flatnonzero(self.per_user >= 100)
        if not len(active):
            return
        kept = self.order[np.isin(e.user[self.order], active)]
        user, time = e.user[kept], e.time[kept]
        hour = time // _HOUR
        starts = np.flatnonzero(np.r_[True, (user[1:] != user[:-1]) | (hour[1:] != hour[:-1])])
        per_hour = np.diff(np.r_[starts, len(user)])
        fast = set(user[starts[per_hour >= 1_000]].tolist())
        days, hours = np.unique(np.stack([user[starts], hour[starts] // 24]), axis=1, return_counts=True)
        awake = set(days[0][hours >= 22].tolist())
        gap, of = np.diff(time), user[1:][user[1:] == user[:-1]]
        gap = gap[user[1:] == user[:-1]]
        pace = (gap > 0) & (gap < _HOUR)
        pairs, times = np.unique(np.stack([of[pace], gap[pace]]), axis=1, return_counts=True)
        even = set(pairs[0][times > 0.8 * (self.per_user[pairs[0]] - 1)].tolist())
        bots = sorted(fast | awake | even, key=lambda one: -self.per_user[one])
        if bots:
            share = self.per_user[bots].sum() / max(self.per_user.sum(), 1)
            shown = ", ".join(f"{self.events.users[one]} ({self.per_user[one]:,} events)" for one in bots[:3])
            yield Finding(
                "warning",
                "bots",
                f"{len(bots):,} users act as programs do, with {share:.1%} of all events: {len(awake):,} in 22 or more hours of "
                f"a day, {len(fast):,} with 1,000 or more events in an hour, {len(even):,} at equal intervals; {shown}",
                "models and popularity learn what programs do",
                "drop their rows where the log is written",
                {
                    "users": len(bots),
                    "share": float(share),
                    "first": [str(self.events.users[one]) for one in bots[:20]],
                },
            )

    def _ends(self) -> Iterator[Finding]:
        """A few events long before or after all others."""
        time = np.sort(self.events.time)
        low, high = time[int(0.001 * len(time))], time[min(int(np.ceil(0.999 * len(time))), len(time) - 1)]
        span = max(high - low, 1)
        for name, away, moment, cut in (
            ("after", time[-1] - high, high, "end"),
            ("before", low - time[0], low, "start"),
        ):
            if away > 0.2 * span and away > _HOUR:
                few = int((time > high).sum() if cut == "end" else (time < low).sum())
                effect = (
                    "a test period counted from the end holds almost nothing" if cut == "end" else "they widen tables"
                )
                yield Finding(
                    "warning",
                    "stragglers",
                    f"{few:,} events lie up to {_length(away)} {name} the other 99.9 %, which take {_length(span)}",
                    effect,
                    f"set data.split.{cut} = {_iso(moment + (1_000_000 if cut == 'end' else 0))}",
                    {"events": few, cut: _iso(moment)},
                )

    def _gaps(self) -> Iterator[Finding]:
        """Hours or days without events that have some at other times."""
        time = np.sort(self.events.dates[self.events.dates <= self.events.time.max()])
        # The tails are the finding `stragglers`.
        time = time[int(0.001 * len(time)) : int(np.ceil(0.999 * len(time)))]
        if len(time) < 2:
            return
        size, cycle = (_HOUR, 24) if time[-1] - time[0] <= 21 * _DAY else (_DAY, 7)
        counts = np.bincount((time // size - time[0] // size).astype(np.int64))
        if len(counts) < 2 * cycle + 1:
            return
        phase = np.arange(len(counts)) % cycle
        usual = np.array([np.median(counts[phase == one]) for one in range(cycle)])[phase]
        empty = np.flatnonzero((counts < 0.02 * usual) & (usual >= _GAP_EVENTS))
        if len(empty):
            unit = "hours" if size == _HOUR else "days"
            first = _iso((int(time[0]) // size + int(empty[0])) * size)
            yield Finding(
                "warning",
                "gaps",
                f"{len(empty):,} {unit} with no or almost no events, which have about {usual[empty].mean():,.0f} at other times; the first: {first}",
                "features by time and the popularity before each event are wrong there; a test period may be empty",
                "load the missing files; or set data.split.start after the gap",
                {unit: len(empty), "first": first},
            )

    def _ages(self) -> Iterator[Finding]:
        """How fast items age, and the share of each day's events on items of that day."""
        e = self.events
        first, last = int(e.time.min()), int(e.time.max())
        new = self.born > first + (last - first) // 10  # of older ones the first event is not known
        age = (e.time - self.born[e.item])[new[e.item]]
        if last - first < 2 * _DAY or not len(age):
            return
        half = float(np.median(age))
        day = e.time // _DAY
        cold = self.born[e.item] // _DAY == day
        typical = float(cold[day > first // _DAY].mean())
        fast = half < (last - first) / 10
        yield Finding(
            "note",
            "ageing",
            f"half of the events come within {_length(half)} of their item's first one; {typical:.1%} of events "
            f"are of items that are new that day",
            "a model knows no item that is newer than its training" if typical > 0.05 else "",
            "train often, set training.half_life, and compare with baselines = ['rolling_popularity']" if fast else "",
            {"median_age_seconds": half / 1e6, "new_items_share_of_day": typical},
        )

    # ---- split

    def _split(self) -> Iterator[Finding]:
        """Sizes of the splits, and how many test targets are of unknown items and users."""
        try:
            code = self._codes()
        except ConfigError as error:
            yield Finding("error", "empty_split", str(error), "prepare stops", "change data.split")
            return
        if code is None:
            return
        sizes = [int((code == one).sum()) for one in range(3)]
        there = ", ".join(f"{name} {size:,}" for name, size in zip(("train", "valid", "test"), sizes, strict=True))
        if not all(sizes):
            yield Finding(
                "error", "empty_split", f"the split leaves {there} events", "prepare stops", "change data.split"
            )
            return
        e = self.events
        known_items, known_users = np.zeros(len(e.items), bool), np.zeros(len(e.users), bool)
        known_items[e.item[code == 0]] = True
        known_users[e.user[code < 2]] = True
        cold = float((~known_items[e.item[code == 2]]).mean())
        new = float((~known_users[e.user[code == 2]]).mean())
        text = f"{there} events; in test {cold:.1%} are of items without a training event, {new:.1%} of users without a history"
        values = {"train": sizes[0], "valid": sizes[1], "test": sizes[2], "cold_items": cold, "new_users": new}
        yield Finding("note", "split", text, values=values)
        if sizes[2] < _FEW_TESTS and e.complete:
            yield Finding(
                "warning", "few_tests", f"{sizes[2]:,} test events", "metrics are mostly noise", "raise data.split.test"
            )
        if cold > _COLD and e.complete:
            yield Finding(
                "warning",
                "cold_targets",
                f"{cold:.1%} of the test events are of items without a training event",
                "no trained model can hit them",
                "shorten data.split.valid and data.split.test (e.g. '6h'), set training.refit = true, and train that often",
                {"share": cold},
            )

    def _codes(self) -> np.ndarray | None:
        """(rows,) 0 train, 1 valid, 2 test, 3 outside; None for splits that the files name."""
        e, config = self.events, self.config.data.split
        if config.kind == "given" or not len(e.time):
            return None
        if config.kind == "leave_last":
            user = e.user[self.order]
            from_end = np.empty(len(user), np.int64)
            ends = np.r_[np.flatnonzero(user[1:] != user[:-1]), len(user) - 1]
            from_end[:] = np.repeat(ends, np.diff(np.r_[-1, ends])) - np.arange(len(user))
            code, few = np.empty(len(user), np.int8), self.per_user[user] < 3
            code[self.order] = np.where(few, 0, np.clip(2 - from_end, 0, 2))
            return code
        time = e.time
        if config.start is not None and e.has_time:
            time = time[time >= split.microseconds(config.start)]
        values, counts = np.unique(time, return_counts=True)
        edges = np.append(values, values[-1] + 1) if len(values) else np.array([0, 1])
        found = split.temporal(config, edges, counts, e.has_time)
        code = found.codes(e.time)
        return code if config.start is None else np.where(e.time < split.microseconds(config.start), 3, code)


def _length(microseconds: float) -> str:
    for unit, size in (("days", _DAY), ("hours", _HOUR), ("min", 60_000_000)):
        if microseconds >= 2 * size:
            return f"{microseconds / size:,.1f} {unit}"
    return f"{microseconds / 1e6:,.0f} s"


def _iso(microseconds: int) -> str:
    return f"{np.datetime64(int(microseconds), 'us').astype('datetime64[s]')}Z"
