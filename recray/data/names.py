"""Words by which `recray init` knows columns: what logs call users, items, times, labels, and what no request knows."""

from __future__ import annotations


def _words(text: str) -> list[str]:
    return text.split()


# The likeliest first. A session is a user where nothing else is.
NOUNS = {
    "user": _words(
        """user uid customer cust visitor fullvisitor reviewer member client account subscriber consumer buyer shopper viewer
        listener reader player guest person profile learner student household login username steam uuid rater author
        anonymous 用户 会员 cookie device session"""
    ),
    "item": _words(
        """item product sku parent_asin asin article movie film video vod track song music book isbn game app podcast show
        series anime recipe course job listing offer adgroup ad creative campaign news story post stream business poi venue
        place hotel restaurant location stock merchandise goods good aid iid content document doc page artist album title 商品
        物品 视频 文章"""
    ),
}
LATE_USERS = {"author", "cookie", "device", "session"}
ID_WORDS = set(
    _words("id ids key code uuid guid hash hashed unique no nr num number idx index pk sk int str encoded anon")
)
ROW_WORDS = set(
    _words(
        """event row record impression request transaction order review invoice basket log line display search query
        conversion message trace"""
    )
)
TIMES = _words(
    """timestamp event_time event_timestamp time ts datetime time_stamp timestamp_ms time_ms event_ts click_time
    click_timestamp unix_time unixtime unix_timestamp unix_review_time occurred_at created_at date_time date event_date
    time_start start_time t_dat day week"""
)
# Times of something else than the event, and durations.
NO_TIMES = set(
    _words(
        """birth birthday dob signup registered registration joined expires expire expiry deadline updated inserted ingested
        ingest processed loaded load modified end stop release released published conversion since play watch dwell spent
        stay duration elapsed delay of"""
    )
)
LABELS = _words(
    """label target clicked click is_click is_clicked clk y is_recommended recommended like liked is_like purchase purchased
    bought conversion converted is_positive positive installed response engaged watched consumed"""
)
RATINGS = set(_words("rating ratings overall stars star score"))
COUNTS = set(_words("plays play_count playcount listens count quantity qty frequency playtime hours"))
WEIGHTS = ("weight", "sample_weight", "event_weight")
EVENT_KINDS = set(
    _words("event event_type behavior_type behaviour_type behavior_name behavior action action_type type")
)
# Known only after the item was shown or chosen.
OUTCOMES = set(
    _words(
        """position pos rank slot dwell watch watched watching play played playtime playing spent stay ratio completion
        completed percent progress quantity qty amount revenue paid cost cpo conversion converted purchase purchased bought
        refund returned like liked likes follow share shared comment forward hate dislike disliked rating ratings overall
        stars score review helpful funny vote votes feedback response skip skipped bounce reordered click clicks clicked clk
        nonclk attribution stop listened hours viewed view label target outcome"""
    )
)
