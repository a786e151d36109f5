"""What a run found, for a person: a table for the terminal, one HTML page to keep or send."""

from nabla_rl.report.html import write_report
from nabla_rl.report.table import DEFAULT_COLUMNS, format_cell, format_table, present_columns

__all__ = ["DEFAULT_COLUMNS", "format_cell", "format_table", "present_columns", "write_report"]
