"""Raw values of a feature as the programs of a bundle take them. Needs nothing but Python."""

import bisect
import json
import math
import struct

M = 2**64 - 1


def read_features(path):
    """The entries of features.json, each with `ids`: {value: id}."""
    features = json.loads(path.read_text())
    for one in features:
        one["ids"] = {value: number + 2 for number, value in enumerate(one["vocabulary"] or [])}
    return features


def encode(f, value):
    """The id, list of ids or number of one value of the feature `f`."""
    if f["kind"] == "list":
        return [encode({**f, "kind": "categorical"}, x) for x in value or [] if x is not None and x == x]
    if f["kind"] == "numeric" or f["edges"] is not None:
        x = math.nan if value is None else float(value)
        if f["edges"] is not None:
            return 2 + bisect.bisect_right(f["edges"], x) if math.isfinite(x) else 0
        if not math.isfinite(x):
            return 0.0
        x = math.copysign(math.log1p(abs(x)), x) if f["log"] else x
        return min(max((x - f["mean"]) / f["std"], -10.0), 10.0)
    if value is None or value != value:
        return 0
    value = int(value) if isinstance(value, int) else str(value)
    return 2 + hash64(value) % f["hash_buckets"] if f["hash_buckets"] else f["ids"].get(value, 1)


def hash64(value):
    """Integers, and the SipHash-2-4 of text, through the finaliser of splitmix64."""
    x = (value + 0x9E3779B97F4A7C15) & M if isinstance(value, int) else siphash(value)
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & M
    x = (x ^ x >> 27) * 0x94D049BB133111EB & M
    return x ^ x >> 31


def siphash(value):
    data, (a, b) = value.encode(), struct.unpack("<2Q", b"0123456789123456")
    v = [a ^ 0x736F6D6570736575, b ^ 0x646F72616E646F6D, a ^ 0x6C7967656E657261, b ^ 0x7465646279746573]
    for (word,) in struct.iter_unpack("<Q", data + bytes(7 - len(data) % 8) + bytes([len(data) & 255])):
        v[3] ^= word
        _rounds(v, 2)
        v[0] ^= word
    v[2] ^= 0xFF
    _rounds(v, 4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


def _rounds(v, count):
    for i, j, k, n, s, t in ((0, 1, 2, 3, 13, 16), (2, 1, 0, 3, 17, 21)) * count:
        v[i], v[k] = (v[i] + v[j]) & M, (v[k] + v[n]) & M
        v[j], v[n] = ((v[j] << s | v[j] >> 64 - s) & M) ^ v[i], ((v[n] << t | v[n] >> 64 - t) & M) ^ v[k]
        v[i] = (v[i] << 32 | v[i] >> 32) & M
