"""What a run of decoders leaves behind besides its lines: the summary and the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nabla_rl.report.html import write_report
from nabla_rl.report.summary import acceleration_shares, summarise
from nabla_rl.run_folder import RunFolder


def finish(
    folder: RunFolder,
    ids: Sequence[str],
    decoders: Sequence[str],
    *,
    title: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge the results of a run, and write summary.json and report.html.

    The summary of a run that ended early has the problems that every decoder has finished.

    Args:
        folder: The run's folder.
        ids: All problems, in order.
        decoders: All decoders, in order.
        title: Heading of the page; None is the folder's name.
        more: Further entries of the summary.

    Returns:
        The summary: problems, rows (one for each decoder), accelerations, and `more`.
    """
    results = folder.merge(list(ids), list(decoders))
    finished = [key for key in ids if all((key, name) in folder.rows for name in decoders)]
    kept = set(finished)
    results = [row for row in results if row["id"] in kept]
    summary: dict[str, Any] = {
        "problems": len(finished),
        **(more or {}),
        "rows": summarise(results, decoders),
        "accelerations": acceleration_shares(results),
    }
    folder.write_json("summary.json", summary)
    write_report(
        folder.path / "report.html", title or f"decode: {folder.path.name}", summary["rows"], results,
        config=folder.config,
    )  # fmt: skip
    return summary
