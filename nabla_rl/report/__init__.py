"""What a run found, for a person: a table for the terminal, and one HTML page to keep or to send."""

from nabla_rl.report.decoded import finish, write_report
from nabla_rl.report.table import DEFAULT_COLUMNS, counted, format_cell, format_table, present_columns

__all__ = [
    "DEFAULT_COLUMNS",
    "counted",
    "finish",
    "format_cell",
    "format_table",
    "present_columns",
    "write_report",
]
