"""The number of questions after which a student has paid for itself, and the plot of both models' total FLOPs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nabla_rl.functional.seeding import seeded_generator

if TYPE_CHECKING:
    from matplotlib.figure import Figure

POINTS_PER_DECADE = 8
RESAMPLES = 10_000


def amortise(
    *,
    fixed: float,
    student: float,
    teacher: float,
    student_accuracy: float | None = None,
    teacher_accuracy: float | None = None,
) -> dict[str, Any]:
    """Total FLOPs of a student and of its teacher as the number n of answered questions grows.

    The student costs `fixed` + n · `student`, the teacher n · `teacher`. They cross at
    n* = fixed / (teacher - student). A student that is less often right is also compared per right answer: fixed / n +
    student over its accuracy equals teacher over its accuracy at fixed / (a_s / a_t · teacher - student).

    Args:
        fixed: FLOPs spent before the first question, on the data and on training.
        student: FLOPs of one answer of the student.
        teacher: FLOPs of one answer of the teacher with its decoder.
        student_accuracy: The student's share of right answers; None where unknown.
        teacher_accuracy: The teacher's share of right answers; None where unknown.

    Returns:
        The arguments, `crossing` and `crossing_per_right_answer` (questions; None where the student never pays) and
        `curve`: rows of questions, student_flops, teacher_flops (totals), from 1 to ten times the crossing.
    """
    share = None
    if student_accuracy is not None and teacher_accuracy:
        share = student_accuracy / teacher_accuracy
    crossing = crossing_point(fixed, student, teacher)
    per_right = None if share is None else crossing_point(fixed, student, share * teacher)
    last = 10 * (crossing or per_right or 10_000.0)
    decades = max(1.0, math.log10(last))
    count = math.ceil(decades * POINTS_PER_DECADE) + 1
    questions = [10 ** (decades * place / (count - 1)) for place in range(count)]
    return {
        "fixed_flops": fixed,
        "student_flops": student,
        "teacher_flops": teacher,
        "student_accuracy": student_accuracy,
        "teacher_accuracy": teacher_accuracy,
        "crossing": crossing,
        "crossing_per_right_answer": per_right,
        "curve": [
            {"questions": n, "student_flops": fixed + n * student, "teacher_flops": n * teacher} for n in questions
        ],
    }


def crossing_point(fixed: float, student: float, teacher: float) -> float | None:
    """The n where fixed + n · student = n · teacher; None where the student is no cheaper per question."""
    return fixed / (teacher - student) if teacher > student else None


def recovered_share(before: Tensor, after: Tensor, teacher: Tensor, *, seed: int = 0) -> dict[str, float | None]:
    """How far a student has come towards its teacher: (after - before) / (teacher - before), over the same problems.

    Args:
        before, after, teacher: Whether each problem's answer is right, (problems,).
        seed: Random seed of the bootstrap over problems.

    Returns:
        `value` with the 95% percentile interval `low`, `high`; None where the teacher is no better.
    """
    table = torch.stack([before, after, teacher]).double()
    generator = seeded_generator(seed, "recovered")
    drawn = torch.randint(table.shape[1], (RESAMPLES, table.shape[1]), generator=generator)
    shares = _share(table[:, drawn].mean(-1))
    shares = shares[shares.isfinite()]
    value = float(_share(table.mean(-1)))
    if not math.isfinite(value) or not len(shares):
        return {"value": None, "low": None, "high": None}
    low, high = shares.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return {"value": value, "low": low, "high": high}


def _share(means: Tensor) -> Tensor:
    before, after, teacher = means
    return (after - before) / (teacher - before)


def draw_amortisation(amortisation: Mapping[str, Any]) -> Figure:
    """Draw total FLOPs against questions answered (left), and accuracy against FLOPs per question (right)."""
    # Slow to import, and only this picture needs it. No pyplot: it keeps global state and may look for a display.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    curve, crossing = amortisation["curve"], amortisation["crossing"]
    questions = [row["questions"] for row in curve]
    known = None not in (amortisation["student_accuracy"], amortisation["teacher_accuracy"])
    total, *others = figure.subplots(1, 2 if known else 1, squeeze=False)[0]
    for name, colour in (("student", "#0072B2"), ("teacher", "#D55E00")):
        spent = [row[f"{name}_flops"] for row in curve]
        label = "student" if name == "student" else "teacher with its decoder"
        total.plot(questions, spent, color=colour, label=label)
        for axes in others:
            each = [flops / n for flops, n in zip(spent, questions, strict=True)]
            accuracy = amortisation[f"{name}_accuracy"]
            axes.plot(each, [accuracy] * len(each), color=colour)
            axes.plot(each[-1], accuracy, "o", color=colour)
    if crossing is not None:
        total.axvline(crossing, color="#333", linestyle=":", linewidth=1)
        total.annotate(
            f"{crossing:,.0f} questions", (crossing, curve[0]["teacher_flops"]), (4, 4), textcoords="offset points"
        )
    total.set(xscale="log", yscale="log", xlabel="questions answered", ylabel="total FLOPs")
    total.legend(frameon=False)
    for axes in others:
        axes.set(xscale="log", xlabel="FLOPs per question", ylabel="accuracy", ylim=(0, 1))
    for axes in (total, *others):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
    return figure
