"""What a study has found, as plain rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

Row = dict[str, Any]


@dataclass
class Report:
    """What a study has found.

    Attributes:
        rows: The table as plain values. A key with `_low` and `_high` beside it has an interval.
        claims: Rows with claim, holds, and a text for each landscape; empty for a study that claims nothing.
        figures: Captions and SVG files.
        summary: Anything else that is worth keeping.
        tables: Further tables, each with its heading.
        shown: Columns that the terminal has room for; empty is all.
        printed: The table for the terminal, where the study has a form of its own for it.
        files: Files with the rows and figures that the study has written itself; empty for the common ones.
        title: What the table is about; empty for the number of points.
    """

    rows: list[Row]
    claims: list[Row] = field(default_factory=list)
    figures: list[tuple[str, Path]] = field(default_factory=list)
    summary: Row = field(default_factory=dict)
    tables: list[tuple[str, list[Row]]] = field(default_factory=list)
    shown: Sequence[str] = ()
    printed: Table | None = None
    files: Sequence[str] = ()
    title: str = ""


def finite(value: Any) -> Any:
    """A plain value as JSON can hold it, with null for what is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(entry) for name, entry in value.items()}
    return [finite(entry) for entry in value] if isinstance(value, (list, tuple)) else value
