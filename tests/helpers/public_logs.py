"""Public logs by their published column names, with made rows, and the roles that a person gives their columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

ROWS = 2_000
START = 1_500_000_000  # seconds since 1970


@dataclass(frozen=True)
class PublicLog:
    """roles: what a person writes into data.columns; "?" where a person has to decide. said: parts of the output."""

    table: pa.Table
    roles: dict[str, str]
    unit: str | None = None
    model: str = "sasrec"
    said: list[str] = field(default_factory=list)


class _Rows:
    """Plausible values of usual columns."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def ids(self, many: int, form: str = "{}", offset: int = 1) -> Any:
        """Zipf-like ids; text where `form` is more than a number."""
        numbers = np.minimum(self.rng.zipf(1.3, ROWS), many) + offset
        return numbers if form == "{}" else [form.format(n) for n in numbers]

    def users(self, form: str = "{}", offset: int = 1) -> Any:
        numbers = self.rng.integers(0, 150, ROWS) + offset
        return numbers if form == "{}" else [form.format(n) for n in numbers]

    def seconds(self, days: int = 60) -> np.ndarray:
        return self.rng.integers(0, days * 86_400, ROWS) + START

    def pick(self, *values: Any) -> list[Any]:
        return [values[i] for i in self.rng.integers(0, len(values), ROWS)]

    def whole(self, low: int, high: int) -> np.ndarray:
        return self.rng.integers(low, high, ROWS)

    def real(self, low: float, high: float) -> np.ndarray:
        return self.rng.uniform(low, high, ROWS)

    def clicks(self, share: float = 0.2) -> np.ndarray:
        return (self.rng.random(ROWS) < share).astype(np.int64)

    def prose(self) -> list[str]:
        return [f"I bought this {i} times and it never failed me, so I recommend it" for i in range(ROWS)]

    def stamps(self, days: int = 60) -> pa.Array:
        return pa.array(self.seconds(days) * 1_000_000).cast(pa.timestamp("us"))


def _movielens(r: _Rows) -> PublicLog:
    table = {"userId": r.users(), "movieId": r.ids(400), "rating": r.whole(1, 11) / 2, "timestamp": r.seconds()}
    return PublicLog(
        pa.table(table),
        {"user": "userId", "item": "movieId", "timestamp": "timestamp"},
        "s",
        said=["holds ratings from 0.5 to 5"],
    )


def _amazon_2018(r: _Rows) -> PublicLog:
    seconds = r.seconds() // 86_400 * 86_400
    table = {
        "overall": r.whole(1, 6).astype(float),
        "verified": r.pick(True, False),
        "reviewTime": [t.item().strftime("%m %d, %Y") for t in seconds.astype("datetime64[s]")],
        "reviewerID": r.users("A{}ZX"),
        "asin": r.ids(300, "B000{:05d}"),
        "reviewerName": r.users("Reader {}"),
        "reviewText": r.prose(),
        "summary": r.pick("Five Stars", "Good", "Not for me"),
        "unixReviewTime": seconds,
        "vote": pa.array([None if i % 3 else float(i % 40) for i in range(ROWS)]),
    }
    roles = {"user": "reviewerID", "item": "asin", "timestamp": "unixReviewTime"}
    return PublicLog(pa.table(table), roles, "s", said=["overall holds ratings from 1 to 5", "reviewText (free text)"])


def _amazon_2023(r: _Rows) -> PublicLog:
    table = {
        "rating": r.whole(1, 6).astype(float),
        "title": r.prose(),
        "text": r.prose(),
        "images": pa.array([[] for _ in range(ROWS)], pa.list_(pa.struct([("small_image_url", pa.string())]))),
        "asin": r.ids(300, "B0{:08d}"),
        "parent_asin": r.ids(200, "B1{:08d}"),
        "user_id": r.users("AE{}QXK"),
        "timestamp": r.seconds() * 1000,
        "helpful_vote": r.whole(0, 9),
        "verified_purchase": r.pick(True, False),
    }
    roles = {"user": "user_id", "item": "parent_asin", "timestamp": "timestamp"}
    return PublicLog(pa.table(table), roles, "ms", said=["known only after", "helpful_vote"])


def _retailrocket(r: _Rows) -> PublicLog:
    table = {
        "timestamp": r.seconds() * 1000,
        "visitorid": r.users(),
        "event": r.pick("view", "view", "addtocart", "transaction"),
        "itemid": r.ids(300),
        "transactionid": pa.array([None if i % 50 else float(i) for i in range(ROWS)]),
    }
    roles = {"user": "visitorid", "item": "itemid", "timestamp": "timestamp"}
    return PublicLog(pa.table(table), roles, "ms", said=["event tells kinds of events (addtocart, transaction, view)"])


def _yoochoose(r: _Rows) -> PublicLog:
    table = {"session_id": r.users(), "timestamp": r.stamps(), "item_id": r.ids(300), "category": r.pick("0", "S", "3")}
    return PublicLog(pa.table(table), {"user": "session_id", "item": "item_id", "timestamp": "timestamp"}, "auto")


def _criteo(r: _Rows) -> PublicLog:
    table: dict[str, Any] = {"label": r.clicks()}
    table |= {
        f"I{i}": pa.array([None if (i + k) % 7 == 0 else k % (40 + i) for k in range(ROWS)]) for i in range(1, 14)
    }
    table |= {f"C{i}": [f"{n:08x}" for n in r.whole(0, 10 * i + 3)] for i in range(1, 27)}
    said = ["which column is the user?", "which column is the item?", "C26"]
    return PublicLog(pa.table(table), {"user": "?", "item": "?", "label": "label"}, model="din", said=said)


def _criteo_attribution(r: _Rows) -> PublicLog:
    table = {
        "timestamp": np.sort(r.whole(0, 2_671_200)),
        "uid": r.users(),
        "campaign": r.ids(200),
        "conversion": r.clicks(0.1),
        "conversion_timestamp": np.where(r.clicks(0.1), r.whole(0, 2_671_200), -1),
        "conversion_id": r.whole(-1, 500),
        "attribution": r.clicks(0.05),
        "click": r.clicks(0.3),
        "click_pos": r.whole(-1, 5),
        "click_nb": r.whole(-1, 5),
        "cost": r.real(0, 1e-3),
        "cpo": r.real(0, 1),
        "time_since_last_click": r.whole(-1, 90_000),
        **{f"cat{i}": r.whole(0, 30) * 7919 for i in range(1, 10)},
    }
    roles = {"user": "uid", "item": "campaign", "timestamp": "timestamp", "label": "click"}
    return PublicLog(
        pa.table(table), roles, "order", "din", ["known only after", "click_pos", "is no time in s, ms, us or ns"]
    )


def _taobao(r: _Rows) -> PublicLog:
    table = {
        "user_id": r.users(),
        "item_id": r.ids(300),
        "category_id": r.ids(30),
        "behavior_type": r.pick("pv", "pv", "buy", "cart", "fav"),
        "timestamp": r.seconds(9),
    }
    said = ["behavior_type tells kinds of events (buy, cart, fav, pv)"]
    return PublicLog(pa.table(table), {"user": "user_id", "item": "item_id", "timestamp": "timestamp"}, "s", said=said)


def _taobao_ads(r: _Rows) -> PublicLog:
    clk = r.clicks()
    table = {
        "user": r.users(),
        "time_stamp": r.seconds(8),
        "adgroup_id": r.ids(300),
        "pid": r.pick("430548_1007", "430539_1007"),
        "nonclk": 1 - clk,
        "clk": clk,
    }
    roles = {"user": "user", "item": "adgroup_id", "timestamp": "time_stamp", "label": "clk"}
    return PublicLog(pa.table(table), roles, "s", "din", ["nonclk"])


def _kuairec(r: _Rows) -> PublicLog:
    seconds = r.seconds() + r.real(0, 1)
    table = {
        "user_id": r.users(),
        "video_id": r.ids(300),
        "play_duration": r.whole(0, 60_000),
        "video_duration": r.whole(5_000, 60_000),
        "time": [str(np.datetime64(int(t * 1000), "ms")).replace("T", " ") for t in seconds],
        "date": [int(str(np.datetime64(int(t), "s"))[:10].replace("-", "")) for t in seconds],
        "timestamp": seconds,
        "watch_ratio": r.real(0, 4),
    }
    roles = {"user": "user_id", "item": "video_id", "timestamp": "timestamp"}
    return PublicLog(pa.table(table), roles, "s", said=["play_duration, watch_ratio: by name known only after"])


def _kuairand(r: _Rows) -> PublicLog:
    table = {
        "user_id": r.users(),
        "video_id": r.ids(300),
        "date": r.pick(20220408, 20220409, 20220410),
        "hourmin": r.whole(0, 24) * 100,
        "time_ms": r.seconds(20) * 1000,
        "is_click": r.clicks(0.4),
        "is_like": r.clicks(0.02),
        "long_view": r.clicks(0.3),
        "play_time_ms": r.whole(0, 60_000),
        "duration_ms": r.whole(5_000, 60_000),
        "is_rand": np.zeros(ROWS, np.int64),
        "tab": r.whole(0, 6),
    }
    roles = {"user": "user_id", "item": "video_id", "timestamp": "time_ms", "label": "is_click"}
    return PublicLog(pa.table(table), roles, "ms", "din", ["is_like", "play_time_ms"])


def _lastfm_1k(r: _Rows) -> PublicLog:
    table = {
        "user_id": r.users("user_{:06d}"),
        "timestamp": r.stamps(),
        "artist_id": r.ids(60, "f1b1cf71-bd35-4e99-8624-{:012d}"),
        "artist_name": r.ids(60, "Band {}"),
        "track_id": r.ids(300, "0d2ab3f4-1c2e-4e99-9999-{:012d}"),
        "track_name": r.ids(300, "Song {}"),
    }
    roles = {"user": "user_id", "item": "track_id", "timestamp": "timestamp"}
    return PublicLog(pa.table(table), roles, "auto")


def _lastfm_360k(r: _Rows) -> PublicLog:
    table = {
        "user_id": r.users("00000c289a1829a808ac09c00daf10bc3c4e{:04d}"),
        "artist_id": r.ids(300, "3bd73256-3905-4f3a-97e2-{:012d}"),
        "artist_name": r.ids(300, "Band {}"),
        "plays": r.whole(1, 3_000),
    }
    said = ["pass --weight plays", "events are ordered as in the files"]
    return PublicLog(pa.table(table), {"user": "user_id", "item": "artist_id"}, model="two_tower", said=said)


def _steam(r: _Rows) -> PublicLog:
    table = {
        "app_id": r.ids(300),
        "helpful": r.whole(0, 9),
        "funny": r.whole(0, 9),
        "date": pa.array(r.seconds(900) // 86_400, pa.int32()).cast(pa.date32()),
        "is_recommended": r.pick(True, True, True, False),
        "hours": r.real(0, 900),
        "user_id": r.users(),
        "review_id": np.arange(ROWS),
    }
    roles = {"user": "user_id", "item": "app_id", "timestamp": "date", "label": "is_recommended"}
    return PublicLog(pa.table(table), roles, "auto", "din", ["hours", "review_id (every row has its own value)"])


def _steam_200k(r: _Rows) -> PublicLog:
    table = {
        "user-id": r.users(offset=151_603_712),
        "game-title": r.ids(300, "The Elder Game {}"),
        "behavior-name": r.pick("purchase", "play"),
        "value": r.real(0.1, 300),
    }
    said = ["behavior-name tells kinds of events (play, purchase)"]
    return PublicLog(pa.table(table), {"user": "user-id", "item": "game-title"}, model="two_tower", said=said)


def _outbrain(r: _Rows) -> PublicLog:
    table = {
        "display_id": np.arange(ROWS) // 5,
        "ad_id": r.ids(300),
        "clicked": r.clicks(),
        "uuid": r.users("cb8c55702adb{:02d}"),
        "document_id": r.ids(90),
        "timestamp": np.sort(r.whole(61, 1_295_999_990)),
        "platform": r.pick("1", "2", "3"),
        "geo_location": r.pick("US>CA>807", "US>MI>505", "GB"),
    }
    roles = {"user": "uuid", "item": "ad_id", "timestamp": "timestamp", "label": "clicked"}
    return PublicLog(
        pa.table(table), roles, "order", "din", ["is no time in s, ms, us or ns", "platform, geo_location"]
    )


def _mind(r: _Rows) -> PublicLog:
    table = {
        "impression_id": np.arange(ROWS) // 8,
        "user_id": r.users("U{}"),
        "time": r.stamps(6),
        "history": pa.array([["N12", f"N{i}"] for i in range(ROWS)]),
        "news_id": r.ids(300, "N{}"),
        "clicked": r.clicks(0.1),
    }
    roles = {"user": "user_id", "item": "news_id", "timestamp": "time", "label": "clicked"}
    return PublicLog(pa.table(table), roles, "auto", "din")


def _mind_raw(r: _Rows) -> PublicLog:
    table = {
        "Impression ID": np.arange(ROWS),
        "User ID": r.users("U{}"),
        "Time": r.stamps(6),
        "History": [f"N12 N{i} N7 N9" for i in range(ROWS)],
        "Impressions": [f"N{i}-0 N{i + 5}-1 N8-0" for i in range(ROWS)],
    }
    said = ["Impressions holds several items with their clicks a row: write one row per item shown"]
    return PublicLog(pa.table(table), {"user": "User ID", "item": "?", "timestamp": "Time"}, "auto", said=said)


def _hm(r: _Rows) -> PublicLog:
    table = {
        "t_dat": pa.array(r.seconds(700) // 86_400, pa.int32()).cast(pa.date32()),
        "customer_id": r.users("000058a12d5b43e67d225668fa1f8d618c13dc232df0cad8ffe7ad4a1091{:04d}"),
        "article_id": r.ids(300, "{:010d}", 108_775_015),
        "price": r.real(0.01, 0.2),
        "sales_channel_id": r.pick(1, 2),
    }
    roles = {"user": "customer_id", "item": "article_id", "timestamp": "t_dat"}
    return PublicLog(pa.table(table), roles, "auto", said=["candidates: price, sales_channel_id"])


def _otto(r: _Rows) -> PublicLog:
    table = {
        "session": r.users(),
        "aid": r.ids(300),
        "ts": r.seconds(28) * 1000,
        "type": r.pick("clicks", "carts", "orders"),
    }
    roles = {"user": "session", "item": "aid", "timestamp": "ts"}
    return PublicLog(pa.table(table), roles, "ms", said=["type tells kinds of events (carts, clicks, orders)"])


def _diginetica(r: _Rows) -> PublicLog:
    table = {
        "sessionId": r.users(),
        "userId": pa.array([None if i % 3 else float(i % 80) for i in range(ROWS)]),
        "itemId": r.ids(300),
        "timeframe": r.whole(0, 900_000),
        "eventdate": pa.array(r.seconds(150) // 86_400, pa.int32()).cast(pa.date32()),
    }
    return PublicLog(pa.table(table), {"user": "sessionId", "item": "itemId", "timestamp": "eventdate"}, "auto")


def _online_retail(r: _Rows) -> PublicLog:
    table = {
        "InvoiceNo": r.ids(200, "5{:05d}"),
        "StockCode": r.ids(300, "85{:03d}A"),
        "Description": r.ids(300, "WHITE HANGING HEART T-LIGHT HOLDER {}"),
        "Quantity": r.whole(-2, 30),
        "InvoiceDate": r.stamps(300),
        "UnitPrice": r.real(0.1, 20),
        "CustomerID": r.users(),
        "Country": r.pick("United Kingdom", "France"),
    }
    roles = {"user": "CustomerID", "item": "StockCode", "timestamp": "InvoiceDate"}
    return PublicLog(pa.table(table), roles, "auto", said=["Quantity"])


def _book_crossing(r: _Rows) -> PublicLog:
    table = {"User-ID": r.users(), "ISBN": r.ids(300, "{:010d}"), "Book-Rating": r.whole(0, 11)}
    said = ["Book-Rating holds ratings from 0 to 10"]
    return PublicLog(pa.table(table), {"user": "User-ID", "item": "ISBN"}, model="two_tower", said=said)


def _yelp(r: _Rows) -> PublicLog:
    table = {
        "review_id": [f"KU_O5udG6zpxOg-{i:07d}" for i in range(ROWS)],
        "user_id": r.users("mh_-eMZ6K5RLWhZyISBh{}"),
        "business_id": r.ids(300, "XQfwVwDr-v0ZS3_Cbb{}"),
        "stars": r.whole(1, 6),
        "useful": r.whole(0, 9),
        "text": r.prose(),
        "date": r.stamps(900),
    }
    roles = {"user": "user_id", "item": "business_id", "timestamp": "date"}
    return PublicLog(pa.table(table), roles, "auto", said=["stars holds ratings from 1 to 5", "text (free text)"])


LOGS: dict[str, Callable[[_Rows], PublicLog]] = {
    "movielens": _movielens,
    "amazon 2018": _amazon_2018,
    "amazon 2023": _amazon_2023,
    "retailrocket": _retailrocket,
    "yoochoose": _yoochoose,
    "criteo": _criteo,
    "criteo attribution": _criteo_attribution,
    "taobao behavior": _taobao,
    "taobao ads": _taobao_ads,
    "kuairec": _kuairec,
    "kuairand": _kuairand,
    "lastfm-1k": _lastfm_1k,
    "lastfm-360k": _lastfm_360k,
    "steam recommendations": _steam,
    "steam-200k": _steam_200k,
    "outbrain": _outbrain,
    "mind, one row per news shown": _mind,
    "mind": _mind_raw,
    "h&m": _hm,
    "otto": _otto,
    "diginetica": _diginetica,
    "online retail": _online_retail,
    "book-crossing": _book_crossing,
    "yelp": _yelp,
}


def public_log(name: str) -> PublicLog:
    return LOGS[name](_Rows(7))
