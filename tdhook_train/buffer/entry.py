"""An artifact in the manifest: what its rows look like, and how many are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tdhook_train.buffer.retention import Retention
from tdhook_train.buffer.schema import Schema

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """What is known of an artifact beside its rows.

    Args:
        schema: what every row looks like.
        retention: how many rows are kept, and which; None where the run's limits hold.
        checksums: whether values are stored with checksums.
    """

    schema: Schema
    retention: Retention | None = None
    checksums: bool = True

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain JSON values."""
        retention = None if self.retention is None else self.retention.to_json()
        return {"retention": retention, "checksums": self.checksums, **self.schema.to_json()}

    @classmethod
    def from_json(cls, text: Mapping[str, Any]) -> Entry:
        """Build the entry that :meth:`to_json` wrote."""
        retention = None if text["retention"] is None else Retention.from_json(text["retention"])
        return cls(Schema.from_json(text), retention, text["checksums"])
