"""What a decode run leaves for a person to read: its summary, and one page with the table and the completions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nabla_rl.report.html import facts, figure_block, rows_table, svg_text, write_page
from nabla_rl.report.summary import Line, acceleration_shares, finished_by_all, summarise
from nabla_rl.report.table import MISSING, Row, counted, format_power, is_missing
from nabla_rl.run_folder import RunFolder, as_user_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = (
    "decoder",
    "accuracy",
    "mean_reward",
    "gold_reward",
    "rollouts",
    "policy_calls",
    "reward_calls",
    "flops",
    "seconds",
    "acceptance_rate",
)
"""The page's table has room for more than a terminal's."""

SENTENCES = {
    "greedy": "Takes the policy's likeliest token at every position.",
    "sample": "Draws one completion from the policy.",
    "best_of_n": "Draws n completions from the policy and chooses one with the help of the reward model.",
    "self_consistency": "Draws n completions from the policy and returns one with the most frequent answer.",
    "beam": "Extends several partial completions step by step and keeps those of the best prefix value.",
    "mcts": "Searches a tree of partial completions, and expands branches whose rollouts had a high reward.",
    "nabla": "∇-Reasoner visits the completion token by token, lets gradient descent propose a replacement, rolls out "
    "the rest, and keeps the new completion if it passes the acceptance rule.",
    "edit_search": "Replaces one token anywhere in the completion, the most promising first, rolls out the rest, and "
    "keeps the new completion if it passes the acceptance rule.",
}
"""What each decoder does, for a reader of the page who has not read the documentation."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#333333")
"""The palette of Okabe and Ito, which colour-blind readers can distinguish, without its yellow."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def finish(
    folder: RunFolder,
    ids: Sequence[str],
    decoders: Sequence[str],
    *,
    title: str | None = None,
    more: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Merge the results of a run, and write summary.json and report.html.

    The summary and the table of a run that ended early are over the problems that every decoder has finished.

    Args:
        folder: The run's folder.
        ids: All problems, in order.
        decoders: All decoders, in the order of the table.
        title: Heading of the page; None is the folder's name.
        more: Further entries of the summary.

    Returns:
        `problems`, the entries of `more`, `rows` (see `summarise`) and `accelerations` (see `acceleration_shares`).
    """
    results = finished_by_all(folder.merge(list(ids), list(decoders)), decoders)
    summary: dict[str, Any] = {
        "problems": len({line["id"] for line in results}),
        **(more or {}),
        "rows": summarise(results, decoders),
        "accelerations": acceleration_shares(results),
    }
    folder.write_json("summary.json", summary)
    with as_user_error(folder.path):
        write_report(
            folder.path / "report.html",
            title or f"decode: {folder.path.name}",
            summary["rows"],
            results,
            described=what_was_run(folder.config),
        )
    return summary


def what_was_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts at the top of the page, read from a run's configuration; what it does not say is left out."""
    model, data = config.get("model", config), config.get("data", {})
    sampling = model.get("sampling") or {}

    def name(role: str) -> Any:
        given = model.get(role)
        return given.get("name") if isinstance(given, Mapping) else given

    described = {
        "policy": name("policy"),
        "reward model": name("reward"),
        "gold reward model": name("gold"),
        "problems": data.get("path") or ", ".join(str(data[key]) for key in ("family", "split") if data.get(key)),
        "β": model.get("beta"),
        "temperature": sampling.get("temperature"),
        "seed": config.get("seed"),
    }
    return {key: value for key, value in described.items() if value is not None and value != ""}


def write_report(
    path: str | Path,
    title: str,
    summary: Sequence[Row],
    results: Sequence[Line] = (),
    *,
    described: Mapping[str, Any] | None = None,
    sentences: Mapping[str, str] | None = None,
    columns: Sequence[str] = COLUMNS,
    max_problems: int = 10,
) -> Path:
    """Write the page: what was run, accuracy against arithmetic, the table, and the first problems' completions.

    Args:
        path: The file; its folder is made. An older page is replaced only once the new one is complete.
        title: The heading.
        summary: One row per decoder, as for `format_table`.
        results: Lines of results.jsonl.
        described: What was run, from name to value, in the order of the page.
        sentences: What each decoder does, by its name; null for `SENTENCES`.
        columns: The table's columns; those that carry no information are left out.
        max_problems: Number of problems shown. They are the first in the order of `results`, because a choice would
            flatter.

    Returns:
        The path written.
    """
    problems = len({line["id"] for line in results})
    head = {**(described or {}), "problems finished": f"{problems:,}"}
    known = SENTENCES if sentences is None else sentences
    explained = {str(row["decoder"]): known[row["decoder"]] for row in summary if row.get("decoder") in known}
    contents = [
        facts(head),
        f"<h2>Decoders</h2>\n{facts(explained, 'terms')}" if explained else "",
        _results(summary, results, columns),
        _problems(results, max_problems),
    ]
    return write_page(path, title, contents)


# The table and the figure


def _results(summary: Sequence[Row], results: Sequence[Line], columns: Sequence[str]) -> str:
    if not summary:
        return '<p class="note">No summary: the run finished no problem.</p>'
    parts = ["<h2>Results</h2>"]
    if any(not is_missing(row.get("accuracy")) for row in summary):
        label = "Accuracy of each decoder, with its 95% Wilson interval, against FLOPs per problem"
        parts.append(figure_block(svg_text(draw_accuracy(summary)), label))
    note = "Rewards and costs are means over problems."
    if any(not is_missing(row.get("gold_reward")) for row in summary):
        note += " The gold reward comes from a second reward model that no decoder sees."
    parts += [rows_table(summary, columns), f'<p class="note">{note}</p>']
    if shares := acceleration_shares(results):
        parts.append(
            f'<p class="note">The nabla loop skipped {shares["positions_skipped"]:.0%} of the positions, kept the '
            f"token unchanged at {shares['tokens_unchanged']:.0%} of the others, and computed "
            f"{shares['gradients_cached']:.0%} of its gradient steps without a model call.</p>"
        )
    return "\n".join(parts)


def draw_accuracy(rows: Sequence[Row]) -> Figure:
    """Accuracy with its interval against FLOPs per problem on a log axis; a bar for each decoder without FLOPs."""
    # Slow to import, and only this picture needs it. No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    graded = [(index, row) for index, row in enumerate(rows) if not is_missing(row.get("accuracy"))]
    costed = all(row.get("flops") for _, row in graded)
    for index, row in graded:
        value = row["accuracy"]
        low, high = (value if is_missing(row.get(end)) else row[end] for end in ("accuracy_low", "accuracy_high"))
        axes.errorbar(
            [row["flops"] if costed else index], [value], [[max(value - low, 0)], [max(high - value, 0)]],
            color=COLOURS[index % len(COLOURS)], marker=MARKERS[index % len(MARKERS)], markersize=8, capsize=4,
            linestyle="none", elinewidth=1.5, label=f"{row.get('decoder', '?')}  {value:.2f}",
        )  # fmt: skip
    axes.set(ylabel="accuracy", ylim=(0, 1.02))
    if costed:
        spent = [row["flops"] for _, row in graded]
        axes.set(xscale="log", xlabel="FLOPs per problem", xlim=(min(spent) / 2, max(spent) * 2))
    else:
        axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=11)
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


# The problems


def _problems(results: Sequence[Line], max_problems: int) -> str:
    groups: dict[str, list[Line]] = {}
    for line in results:
        groups.setdefault(line["id"], []).append(line)
    if not groups:
        return ""
    shown = list(groups.items())[:max_problems]
    which = f"The first {len(shown)} of {len(groups)} problems, not selected." if len(shown) < len(groups) else ""
    parts = ["<h2>Problems</h2>", f'<p class="note">{which}</p>' if which else ""]
    return "\n".join([*parts, *(_problem(key, lines) for key, lines in shown)])


def _problem(key: str, lines: Sequence[Line]) -> str:
    expected = lines[0]["expected"]
    parts = [
        f'<section class="problem">\n<h3>{escape(key)}</h3>',
        f'<p class="question">{escape(lines[0]["prompt"])}</p>',
        "" if expected is None else f"<p>Expected answer: <strong>{escape(expected)}</strong></p>",
        '<div class="answers">',
        *map(_card, lines),
        "</div>\n</section>",
    ]
    return "\n".join(parts)


def _card(line: Line) -> str:
    """One decoder's completion of one problem."""
    verdict = {None: "", True: "right", False: "wrong"}[line["correct"]]
    badge = f'<span class="badge {verdict}">{"✓" if line["correct"] else "✗"} {verdict}</span>' if verdict else ""
    answer = "no answer found" if line["answer"] is None else f"answer <strong>{escape(line['answer'])}</strong>"
    numbers = [
        f"{name} {_number(line[key])}"
        for name, key in (("reward", "reward"), ("gold reward", "gold_reward"))
        if not is_missing(line[key])
    ]
    numbers += [f"{format_power(line['cost']['flops'])} FLOPs", counted(len(line["rollouts"]), "rollout")]
    return "\n".join(
        [
            f'<article class="card {f"is-{verdict}" if verdict else ""}">',
            f"<header><h4>{escape(line['decoder'])}</h4>{badge}</header>",
            f"<pre>\n{escape(line['completion'])}</pre>",  # a parser drops the first line break
            f"<p>{answer}{'' if line['finished'] else ', cut off at the maximum length'}</p>",
            f'<p class="note">{" · ".join(numbers)}</p>',
            _trace(line["trace"]),
            "</article>",
        ]
    )


def _trace(trace: Sequence[Mapping[str, Any]]) -> str:
    """The edits in the order in which they were tried: the accepted ones at once, the rejected ones folded away."""
    if not trace:
        return ""
    numbered = list(enumerate(trace, start=1))
    accepted = [_edit(number, edit) for number, edit in numbered if edit["accepted"]]
    rejected = [_edit(number, edit) for number, edit in numbered if not edit["accepted"]]
    parts = [f"<p>{counted(len(trace), 'edit')} tried, {len(accepted)} accepted</p>"]
    if accepted:
        parts.append(_edits(accepted))
    if rejected:
        parts.append(
            f"<details><summary>{counted(len(rejected), 'rejected edit')}</summary>\n{_edits(rejected)}\n</details>"
        )
    return "\n".join(parts)


def _edits(items: Sequence[str]) -> str:
    return '<ul class="edits">\n' + "\n".join(items) + "\n</ul>"


def _edit(number: int, edit: Mapping[str, Any]) -> str:
    verdict, mark = ("accepted", "✓") if edit["accepted"] else ("rejected", "✗")
    return (
        f'<li class="{verdict}">{number}. position {edit["position"]}: {_token(edit["old_token"])} → '
        f'{_token(edit["new_token"])} <span class="change">reward {_number(edit["reward_before"])} → '
        f'{_number(edit["reward_after"])}</span> <span title="{verdict}">{mark}</span></li>'
    )


def _token(text: str) -> str:
    """A token with its white space made visible."""
    shown = text.replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥") or "(special token)"
    return f'<span class="token">{escape(shown)}</span>'


def _number(value: float | None) -> str:
    return MISSING if value is None or is_missing(value) else f"{value:.2f}".replace("-", "−")
