"""The table [data.<source>]: options of the source that `data.source` names.

A source outside the package keeps its `Options` and its `read` in one file (recray/data/sources/README.md).
"""

from __future__ import annotations

from pydantic import Field

from recray.config.section import Section


class SourceOptions(Section):
    """Options of a source; its own `Options` extends it. What all sources share stands in [data]."""


class ParquetOptions(SourceOptions):
    """Parquet files are described by the keys of [data] alone."""


class SimulatedOptions(SourceOptions):
    """The behavior simulator (recray.data.sources.simulated)."""

    events: int = Field(200_000, ge=1_000, description="number of events, approximately")
    users: int = Field(4_000, ge=10, description="number of users")
    items: int = Field(2_000, ge=10, description="number of items")
    categories: int = Field(20, ge=2, description="number of item categories")
    interests: int = Field(16, ge=2, description="width of the latent interest vectors")
    drift: float = Field(0.05, ge=0, le=1, description="how far a user's interests move between two sessions")
    zipf: float = Field(0.9, ge=0, description="exponent of item popularity")


# Source name -> options. The source itself is recray/data/sources/<name>.py.
SHIPPED: dict[str, type[SourceOptions]] = {"parquet": ParquetOptions, "simulated": SimulatedOptions}
BASE = SourceOptions
