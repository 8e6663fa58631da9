"""The built-in data: a behaviour simulator whose best possible answer is known.

World. Items lie in C categories of S styles each, L = C * S leaves. A leaf has a
unit vector u_l near its category's, and a weight W_l: the sum of its items' Zipf
weights w_i = rank_i ** -zipf.

User. A unit interest vector z, a mixture of category vectors, that drifts between
sessions: z <- normalised(sqrt(1 - drift) z + sqrt(drift) m), m a fresh mixture. A
session has one device d; each device likes some categories a little more (b_dc).

Event. Category and style, then an item of that leaf by popularity, never one of
the user's last _MEMORY items while the redraws last:

    p(l | z, d) = softmax(_STRENGTH z . u_l + b_dc(l) + log W_l)
    p(i | z, d) = p(leaf(i) | z, d) w_i / W_leaf(i)

so the next-item distribution of a user is known exactly, and its top k among the
items not seen is the oracle, which no model beats on average.

Random numbers are a hash of (seed, user, purpose, counter) (SplitMix64, Steele et
al. 2014): users are simulated in parallel, in any grouping, with the same result.

Shapes: B users of a block, T events, S sessions, E all events, F all sessions,
L leaves, N items, D interests.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from recray.config import DataConfig
from recray.config.sources import SimulatedOptions as Options
from recray.data.sources.base import Source

START_US = 1_700_006_400_000_000  # a midnight, UTC
SPAN_DAYS = 30
DEVICES = ("phone", "laptop", "tablet", "tv")
_SESSION_EVENTS = 8  # mean events of a session
_GAP_US = 45e6  # mean time between two clicks
_STRENGTH = 15.0  # how sharply interests decide
_DEVICE_STRENGTH = 0.3  # standard deviation of b_dc
_LEAF_NOISE = 0.9  # how far a style lies from its category
_MEMORY = 256  # an item is not repeated within this many events of a user
_REDRAWS = 10
_HOME_SHARE = 0.7  # of a user's sessions on the first device; the others share the rest
_BLOCK_EVENTS = 65_536
_CHUNK = 4_000_000  # cells of a session x leaf table alive at a time
_DAY_US = 86_400_000_000
# Purposes of random numbers.
_ACTIVITY, _START, _MIXTURE, _DEVICE, _CLICK, _GAP, _WORLD = range(7)


def read(config: DataConfig, seed: int) -> Source:
    """About [data.simulated] events = ... events, generated in parallel by Ray Data."""
    import ray.data

    options = config.options
    assert isinstance(options, Options)
    block = block_users(options)
    starts = range(0, options.users, block)
    work = ray.data.from_items([{"start": start} for start in starts], override_num_blocks=len(starts))
    digest = hashlib.sha256(f"simulated 1 {options.model_dump_json()} {seed}".encode()).hexdigest()
    return Source(
        events=work.map_batches(
            _generate,
            batch_size=1,
            batch_format="pyarrow",
            fn_kwargs={"options": options, "seed": seed, "block": block},
        ),
        num_events=options.events,
        fingerprint=digest,
        items=World.build(options, seed).item_table(),
    )


def block_users(options: Options) -> int:
    """Users simulated together: about _BLOCK_EVENTS events, whatever the machine."""
    return int(np.clip(_BLOCK_EVENTS * options.users // options.events, 1, 4096))


def _generate(batch: pa.Table, options: Options, seed: int, block: int) -> Iterator[pa.Table]:
    world = World.build(options, seed)
    for start in batch["start"].to_pylist():
        yield simulate(world, np.arange(start, min(start + block, options.users)))


def uniform(seed: int, key_B: np.ndarray, purpose: int, counter_BK: np.ndarray) -> np.ndarray:
    """(B, K) float64 in (0, 1): numbers `counter_BK` of the SplitMix64 streams of (seed, key, purpose)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        state_B = _mix(_mix(np.asarray(key_B, np.uint64) * golden + np.uint64(seed)) ^ np.uint64(purpose + 1))
        bits = _mix(state_B[:, None] + (counter_BK.astype(np.uint64) + np.uint64(1)) * golden)
    return ((bits >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(x ^ (x >> np.uint64(31)))


@dataclass(frozen=True)
class World:
    """What all users share. Items are stored by leaf; `key_N` holds their keys."""

    options: Options
    seed: int
    category_CD: np.ndarray
    leaf_LD: np.ndarray
    category_L: np.ndarray
    device_DC: np.ndarray  # b_dc, one row per device
    leaf_N: np.ndarray
    key_N: np.ndarray
    weight_N: np.ndarray
    total_L: np.ndarray  # W_l
    bound_L: np.ndarray  # sum of the weights of the leaves before l

    @staticmethod
    def build(options: Options, seed: int) -> World:
        rng = np.random.default_rng([seed, _WORLD])
        categories = min(options.categories, options.items)
        styles = int(np.clip(options.items // (10 * categories), 1, 16))
        category_CD = _unit(rng.standard_normal((categories, options.interests)))
        category_L = np.repeat(np.arange(categories), styles)
        noise_LD = _LEAF_NOISE * _unit(rng.standard_normal((len(category_L), options.interests)))
        leaf_LD = _unit(category_CD[category_L] + (noise_LD if styles > 1 else 0.0))
        device_DC = _DEVICE_STRENGTH * rng.standard_normal((len(DEVICES), categories))
        # Popularity ranks are dealt to leaves at random, every leaf getting its share; keys hide both.
        leaf_of_rank = rng.permutation(options.items) % len(category_L)
        by_leaf = np.argsort(leaf_of_rank, kind="stable")
        weight_N = (by_leaf + 1.0) ** -options.zipf
        leaf_N = leaf_of_rank[by_leaf]
        total_L = np.bincount(leaf_N, weight_N, minlength=len(category_L))
        bound_L = np.concatenate([[0.0], np.cumsum(total_L)[:-1]])
        return World(
            options,
            seed,
            category_CD,
            leaf_LD,
            category_L,
            device_DC,
            leaf_N,
            rng.permutation(options.items),
            weight_N,
            total_L,
            bound_L,
        )

    def item_table(self) -> pa.Table:
        """Columns item, item_category, item_price, item_tags; row order is the order of keys."""
        rng = np.random.default_rng([self.seed, _WORLD, 1])
        n = self.options.items
        order = np.argsort(self.key_N)
        leaf_N = self.leaf_N[order]
        styles = len(self.category_L) // len(self.category_CD)
        category_N = self.category_L[leaf_N]
        price_N = np.exp(3.0 + 0.3 * (category_N % 5) + 0.5 * rng.standard_normal(n)).round(2)
        # Two tags: the style (shared between categories, wrong for one item in five), and a word that means nothing.
        style_N = np.where(rng.random(n) < 0.8, leaf_N % styles, rng.integers(0, styles, n))
        noise_N = rng.integers(0, 30, n)
        tags = [[f"style-{a}", f"word-{b}"] for a, b in zip(style_N.tolist(), noise_N.tolist(), strict=True)]
        return pa.table(
            {
                "item": pa.array(self.key_N[order].astype(np.int64)),
                "item_category": pa.array([f"category-{c}" for c in category_N.tolist()]),
                "item_price": pa.array(price_N),
                "item_tags": pa.array(tags, pa.list_(pa.string())),
            }
        )

    def leaf_probabilities(self, interest_FD: np.ndarray, device_F: np.ndarray) -> np.ndarray:
        """(F, L): p(l | z, d)."""
        with np.errstate(divide="ignore"):
            logit_FL = _STRENGTH * interest_FD @ self.leaf_LD.T + np.log(self.total_L)
        logit_FL += self.device_DC[device_F][:, self.category_L]
        logit_FL -= logit_FL.max(axis=1, keepdims=True)
        np.exp(logit_FL, out=logit_FL)
        logit_FL /= logit_FL.sum(axis=1, keepdims=True)
        return np.asarray(logit_FL)

    def draw_items(self, leaf_E: np.ndarray, u_E: np.ndarray) -> np.ndarray:
        """Positions in key_N: one item of each leaf, by weight."""
        ends_N = np.cumsum(self.weight_N)
        found = np.searchsorted(ends_N, self.bound_L[leaf_E] + u_E * self.total_L[leaf_E], side="right")
        low = np.searchsorted(self.leaf_N, leaf_E, side="left")
        high = np.searchsorted(self.leaf_N, leaf_E, side="right") - 1
        return np.asarray(np.clip(found, low, high))  # sums round differently at a leaf's edges


@dataclass(frozen=True)
class Users:
    """The latent life of B users: sessions of each, padded to S."""

    user_B: np.ndarray
    count_B: np.ndarray  # events
    sessions_B: np.ndarray
    start_BS: np.ndarray  # microseconds, rising; padded with the largest int64
    interest_BSD: np.ndarray
    device_BS: np.ndarray

    @staticmethod
    def build(world: World, user_B: np.ndarray) -> Users:
        options, seed = world.options, world.seed
        # Activity is Gamma(2) with mean 1: many light users, few heavy ones.
        activity_B = -0.5 * np.log(uniform(seed, user_B, _ACTIVITY, np.arange(2)[None])).sum(axis=1)
        count_B = np.maximum(2, np.rint(activity_B * options.events / options.users).astype(np.int64))
        sessions_B = np.maximum(1, count_B // _SESSION_EVENTS)
        most = int(sessions_B.max())
        # Days are uniform, hours have a broad peak in the evening.
        u_BSK = uniform(seed, user_B, _START, np.arange(most * 3)[None]).reshape(len(user_B), most, 3)
        day_BS = np.floor(u_BSK[..., 0] * SPAN_DAYS)
        hour_BS = ((u_BSK[..., 1] + u_BSK[..., 2]) / 2 + 0.3) % 1.0
        start_BS = START_US + ((day_BS + hour_BS) * _DAY_US).astype(np.int64)
        start_BS[np.arange(most) >= sessions_B[:, None]] = np.iinfo(np.int64).max
        start_BS.sort(axis=1)
        home_B1 = (user_B % len(DEVICES))[:, None]
        u_BSK = uniform(seed, user_B, _DEVICE, np.arange(most * 2)[None]).reshape(len(user_B), most, 2)
        other_BS = home_B1 + 1 + np.floor(u_BSK[..., 1] * (len(DEVICES) - 1)).astype(np.int64)
        device_BS = np.where(u_BSK[..., 0] < _HOME_SHARE, home_B1, other_BS % len(DEVICES))
        return Users(user_B, count_B, sessions_B, start_BS, _interests(world, user_B, most), device_BS)

    def state_at(self, time: int) -> np.ndarray:
        """(B, D): interests in the last session begun at `time`, or in the first when none has."""
        begun_B = (self.start_BS <= time).sum(axis=1)
        last_B = np.clip(begun_B - 1, 0, self.sessions_B - 1)
        return np.asarray(self.interest_BSD[np.arange(len(last_B)), last_B])


def _interests(world: World, user_B: np.ndarray, sessions: int) -> np.ndarray:
    """(B, S, D): each session's interests; a mixture is three categories with weights 3, 2, 1."""
    drift = world.options.drift
    u_BSK = uniform(world.seed, user_B, _MIXTURE, np.arange(sessions * 3)[None]).reshape(len(user_B), sessions, 3)
    category_BSK = np.floor(u_BSK * len(world.category_CD)).astype(np.int64)
    mixture_BSD = _unit(np.einsum("k,bskd->bsd", np.array([3.0, 2.0, 1.0]), world.category_CD[category_BSK]))
    for s in range(1, sessions):
        moved_BD = math.sqrt(1 - drift) * mixture_BSD[:, s - 1] + math.sqrt(drift) * mixture_BSD[:, s]
        mixture_BSD[:, s] = _unit(moved_BD)
    return mixture_BSD


def _unit(x: np.ndarray) -> np.ndarray:
    return np.asarray(x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12))


def simulate(world: World, user_B: np.ndarray) -> pa.Table:
    """All events of these users in standard columns, in order of (user, time)."""
    users = Users.build(world, user_B)
    most = int(users.count_B.max())
    valid_BT = np.arange(most) < users.count_B[:, None]
    row_E = np.nonzero(valid_BT)[0]
    step_E = np.nonzero(valid_BT)[1]
    session_E = step_E * users.sessions_B[row_E] // users.count_B[row_E]
    candidate_BTR = np.full((*valid_BT.shape, _REDRAWS), -1, np.int32)
    candidate_BTR[valid_BT] = _candidates(world, users, row_E, step_E, session_E)
    item_E = _without_repeats(candidate_BTR)[valid_BT]
    # Time runs on from the session's start; a session that outlasts the next one's start delays it.
    gap_E = 1 + (-np.log(uniform(world.seed, user_B[row_E], _GAP, step_E[:, None])[:, 0]) * _GAP_US).astype(np.int64)
    first_E = np.concatenate([[True], (row_E[1:] != row_E[:-1]) | (session_E[1:] != session_E[:-1])])
    elapsed_E = np.cumsum(gap_E)
    elapsed_E -= np.maximum.accumulate(np.where(first_E, elapsed_E, 0))
    time_BT = np.zeros(valid_BT.shape, np.int64)
    time_BT[valid_BT] = users.start_BS[row_E, session_E] + elapsed_E
    # Rising by at least one microsecond an event.
    step_T = np.arange(most)
    time_E = (np.maximum.accumulate(time_BT - step_T, axis=1) + step_T)[valid_BT]
    device = pa.DictionaryArray.from_arrays(
        pa.array(users.device_BS[row_E, session_E].astype(np.int8)), pa.array(DEVICES)
    )
    return pa.table(
        {
            "user": user_B[row_E].astype(np.int64),
            "item": world.key_N[item_E].astype(np.int64),
            "time": time_E,
            "order": (user_B[row_E].astype(np.int64) << 32) + step_E,
            "context_device": device.cast(pa.string()),
            "context_hour": (time_E // 3_600_000_000) % 24,
        }
    )


def _candidates(world: World, users: Users, row_E: np.ndarray, step_E: np.ndarray, session_E: np.ndarray) -> np.ndarray:
    """(E, R) item positions: R independent draws from each event's distribution."""
    counter_EK = step_E[:, None] * (2 * _REDRAWS) + np.arange(2 * _REDRAWS)
    u_EKR = uniform(world.seed, users.user_B[row_E], _CLICK, counter_EK).reshape(-1, 2, _REDRAWS)
    # Sessions in the order of events: F of them, flat.
    held_BS = np.arange(users.start_BS.shape[1]) < users.sessions_B[:, None]
    flat_E = (np.cumsum(users.sessions_B) - users.sessions_B)[row_E] + session_E
    interest_FD, device_F = users.interest_BSD[held_BS], users.device_BS[held_BS]
    leaf_ER = np.empty((len(row_E), _REDRAWS), np.int64)
    leaves = len(world.leaf_LD)
    size = max(1, _CHUNK // leaves)
    for low in range(0, len(interest_FD), size):
        p_FL = world.leaf_probabilities(interest_FD[low : low + size], device_F[low : low + size])
        # One search over all rows: integers, row number in the high bits, so rows do not round each other.
        ends_FL = np.minimum(np.cumsum(p_FL, axis=1) * 2.0**40, 2.0**40 - 1).astype(np.int64)
        ends_FL[:, -1] = 2**40 - 1
        ends_FL += np.arange(len(p_FL), dtype=np.int64)[:, None] << 40
        begin, end = np.searchsorted(flat_E, [low, low + size])
        wanted_ER = (u_EKR[begin:end, 0] * (2.0**40 - 1)).astype(np.int64) + ((flat_E[begin:end, None] - low) << 40)
        leaf_ER[begin:end] = np.searchsorted(ends_FL.ravel(), wanted_ER, side="left") % leaves
    return world.draw_items(leaf_ER.ravel(), u_EKR[:, 1].ravel()).reshape(leaf_ER.shape)


def _without_repeats(candidate_BTR: np.ndarray) -> np.ndarray:
    """(B, T): of each event's candidates the first that the user has not taken lately, else the first."""
    taken_BT = candidate_BTR[:, :, 0].copy()
    for t in range(1, taken_BT.shape[1]):
        low = max(0, t - _MEMORY)
        old = np.flatnonzero((taken_BT[:, low:t] == taken_BT[:, t, None]).any(axis=1) & (taken_BT[:, t] >= 0))
        for r in range(1, _REDRAWS):
            if not len(old):
                break
            drawn = candidate_BTR[old, t, r]
            new = ~(taken_BT[old, low:t] == drawn[:, None]).any(axis=1)
            taken_BT[old[new], t] = drawn[new]
            old = old[~new]
    return taken_BT


@dataclass(frozen=True)
class SimulatedOracle:
    """The true model: the likeliest next items of a user at a time, rebuilt from the seed."""

    options: Options
    seed: int

    def __call__(
        self, user_keys: Sequence[Any], at_time_us: int, k: int, exclude: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        """Top-k item keys per user, likeliest first, without those of `exclude`; ties by key.

        The probability is p(i | z, d) at the user's state, averaged over the devices the user has.
        """
        world = World.build(self.options, self.seed)
        position = np.argsort(world.key_N)  # of each key in the world's order
        share_N = world.weight_N / world.total_L[world.leaf_N]
        answers: list[np.ndarray] = []
        size = max(1, _CHUNK // max(self.options.items, len(world.leaf_LD)))
        for low in range(0, len(user_keys), size):
            keys_B = np.asarray(user_keys[low : low + size], np.int64)
            p_BN = self._leaf_marginal(world, keys_B, at_time_us)[:, world.leaf_N] * share_N
            for p_N, seen in zip(p_BN, exclude[low : low + size], strict=True):
                p_N[position[np.asarray(seen, np.int64)]] = -1.0
                top = np.argpartition(-p_N, min(k, len(p_N) - 1))[:k]
                top = top[p_N[top] >= 0]
                answers.append(world.key_N[top[np.lexsort((world.key_N[top], -p_N[top]))]])
        return answers

    def _leaf_marginal(self, world: World, keys_B: np.ndarray, at_time_us: int) -> np.ndarray:
        """(B, L): p(l | z), the device summed out."""
        state_BD = Users.build(world, keys_B).state_at(at_time_us)
        p_BL = np.zeros((len(keys_B), len(world.leaf_LD)))
        for device in range(len(DEVICES)):
            share_B = np.where(keys_B % len(DEVICES) == device, _HOME_SHARE, (1 - _HOME_SHARE) / (len(DEVICES) - 1))
            p_BL += share_B[:, None] * world.leaf_probabilities(state_BD, np.full(len(keys_B), device))
        return p_BL
