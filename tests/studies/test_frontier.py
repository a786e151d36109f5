"""The frontier run: what it leaves behind, that it can be killed at any moment, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from nabla_rl.budget import Budget, Point, point_at
from nabla_rl.cli import app as cli
from nabla_rl.cli.ablate import build_study
from nabla_rl.decoding.run import Job
from nabla_rl.report.frontier import QUANTITIES, ROW
from nabla_rl.run_folder import flatten
from nabla_rl.studies import jobs
from nabla_rl.studies.frontier import Frontier
from tests.cli.toys_cli import options, save_models, start_script
from tests.studies.toys_studies import CONFIGS, options_of, study_options

IDS = [f"sorting-test-0-{number}" for number in range(4)]
VARIANTS = {
    "greedy": {"decoder": "greedy"},
    "best_of_n": {"decoder": "best_of_n", "model.best_of_n.n": 6},
    "by_reward": {"decoder": "best_of_n", "model.best_of_n": {"n": 6, "choose_by": "reward"}},
}
FRONTIER = {
    "study": "frontier", "seeds": [0, 5], "flops": [1e6, 2e6, 3e6], "baseline": "best_of_n", "variants": VARIANTS,
}  # fmt: skip
CELLS = ["best_of_n/seed0", "best_of_n/seed5", "by_reward/seed0", "by_reward/seed5", "greedy/seed0"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory) -> Path:
    """The folder of a run that nothing disturbed. Not to be written to."""
    folder = tmp_path_factory.mktemp("whole")
    assert cli.ablate(arguments(models, folder / "run")) == 0
    return folder / "run"


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch) -> None:
    """Drawing takes longer than a small run; `whole` is made before this and has its pictures."""
    monkeypatch.setattr("nabla_rl.report.frontier.PLOTS", ())


@pytest.fixture
def decoded(monkeypatch) -> list[tuple[str, int, str]]:
    """The (problem, seed, decoder) triples that are really decoded, in order."""
    triples: list[tuple[str, int, str]] = []
    lines = Job.lines

    def noted(self, decoder, problems, **more):
        triples.extend((problem.id, self.seed, decoder.name) for problem in problems)
        return lines(self, decoder, problems, **more)

    monkeypatch.setattr(Job, "lines", noted)
    return triples


def arguments(models: Path, run_dir: Path, frontier: dict | None = None, **changes: object) -> list[str]:
    run_dir.parent.mkdir(exist_ok=True)
    file = run_dir.parent / "frontier.yaml"
    content = {**FRONTIER, "fixed": options_of(models, **changes), **(frontier or {})}
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return ["--config", str(file), "--run_dir", str(run_dir)]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().split("\n")[:-1]]


def timeless(run_dir: Path) -> dict:
    """The frontier without what no two runs share."""
    content = json.loads((run_dir / "frontier.json").read_text())
    for row in content["rows"]:
        del row["seconds"]
    return content


def timeless_lines(folder: Path) -> list[dict]:
    rows = lines(folder)
    for row in rows:
        del row["seconds"]
        for point in row["curve"]:
            point[3] = None
    return rows


# What a run leaves behind


def test_the_folder_has_everything(whole):
    names = "accuracy_flops accuracy_sequential_calls accuracy_seconds rewards".split()
    pictures = [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
    files = ["config.yaml", "frontier.json", "frontier.csv", "frontier.html", *pictures]
    assert sorted(os.listdir(whole)) == sorted([*files, *VARIANTS])
    cells = sorted(str(file.parent.relative_to(whole)) for file in whole.rglob("results.jsonl"))
    assert cells == CELLS  # greedy has no randomness: one seed is enough
    assert yaml.safe_load((whole / "config.yaml").read_text())["variants"] == {
        k: flatten(v) for k, v in VARIANTS.items()
    }


def test_schema(whole):
    content = json.loads((whole / "frontier.json").read_text())
    assert (content["problems"], content["seeds"]) == (4, [0, 5])
    assert all(tuple(row) == ROW for row in content["rows"])
    assert [row["variant"] for row in content["rows"] if row["budget_flops"] is None] == ["greedy"]
    for row in content["rows"]:
        assert 0 <= row["accuracy_low"] <= row["accuracy"] <= row["accuracy_high"] <= 1
        assert row["flops"] > 0 and row["seconds"] > 0 and row["rollouts"] >= 1
        assert isinstance(row["reward"], float) and isinstance(row["gold_reward"], float)
    assert {entry["variant"] for entry in content["comparisons"]} == {"greedy", "by_reward"}
    for entry in content["comparisons"]:
        assert entry["baseline"] == "best_of_n" and entry["problems"] == 4
        assert entry["low"] <= entry["difference"] <= entry["high"]
        assert 0 <= entry["mcnemar_p"] <= 1


def test_each_line_has_its_curve_and_every_answer_that_it_names(whole):
    for cell in CELLS:
        for row in lines(whole / cell):
            assert [answer["index"] for answer in row["answers"]] == sorted({point[-1] for point in row["curve"]})
            for answer in row["answers"]:
                assert answer["correct"] is (answer["text"].strip() == row["expected"])
                assert isinstance(answer["reward"], float) and isinstance(answer["gold_reward"], float)
            final = next(answer for answer in row["answers"] if answer["index"] == row["curve"][-1][-1])
            assert final["text"] == row["completion"] and final["correct"] is row["correct"]
            assert final["reward"] == pytest.approx(row["reward"], abs=1e-4)
            assert row["curve"][-1][1] == pytest.approx(row["cost"]["flops"])
            assert row["curve"][-1][2] == row["cost"]["sequential_calls"]
            assert row["rollouts"] == row["trace"] == []


def test_what_a_smaller_budget_gives_is_what_a_run_with_it_gives(models, whole, tmp_path):
    """The reading off a curve against an ordinary run that was stopped there."""
    found = 0
    for flops in FRONTIER["flops"]:
        given = options(models, tmp_path / f"{flops}", model__best_of_n__n=6, model__decoders="[best_of_n]")
        assert cli.decode([*given, "--model.budget.flops", str(flops)]) == 0
        stopped = {row["id"]: row for row in lines(tmp_path / f"{flops}")}
        for row in lines(whole / "best_of_n" / "seed0"):
            point = point_at([Point(*entry) for entry in row["curve"]], Budget(flops=flops))
            answer = next(answer for answer in row["answers"] if answer["index"] == point.chosen)
            assert answer["text"] == stopped[row["id"]]["completion"]
            assert point.rollouts == len(stopped[row["id"]]["rollouts"])
            assert point.flops == pytest.approx(stopped[row["id"]]["cost"]["flops"])
            found += point.rollouts < len(row["curve"])
    assert found  # some budget did end some problem early


def test_rows_are_means_of_what_the_lines_say(whole):
    content = json.loads((whole / "frontier.json").read_text())
    for row in content["rows"]:
        if row["variant"] != "by_reward":
            continue
        points, right = [], []
        for seed in (0, 5):
            for line in lines(whole / "by_reward" / f"seed{seed}"):
                points.append(point_at([Point(*entry) for entry in line["curve"]], Budget(flops=row["budget_flops"])))
                right += [answer["correct"] for answer in line["answers"] if answer["index"] == points[-1].chosen]
        assert row["accuracy"] == pytest.approx(sum(right) / 8)
        for name in ("rollouts", "flops", "sequential_calls", "seconds"):
            assert row[name] == pytest.approx(sum(getattr(point, name) for point in points) / 8)
    assert set(QUANTITIES) - {"correct"} <= set(ROW)


def test_without_the_second_judge(models, tmp_path):
    assert cli.ablate(arguments(models, tmp_path / "run", model__gold__name=None, data__limit=2)) == 0
    content = json.loads((tmp_path / "run" / "frontier.json").read_text())
    assert {row["gold_reward"] for row in content["rows"]} == {None}


def test_the_table_is_printed(models, tmp_path, capsys):
    assert cli.ablate(arguments(models, tmp_path / "run", data__limit=2)) == 0
    out, err = capsys.readouterr()
    for label in VARIANTS:
        assert len([line for line in out.splitlines() if f" {label} " in line]) == 1
    assert "2 problems (sorting, test split), seeds 0, 5" in out and "frontier.html" in out
    assert "error" not in err and "Traceback" not in err


# Interruptions


def test_finished_work_is_not_done_again(models, whole, tmp_path, decoded):
    run_dir = tmp_path / "run"
    assert cli.ablate(arguments(models, run_dir)) == 0
    assert timeless(run_dir) == timeless(whole)
    before = {cell: (run_dir / cell / "results.jsonl").read_bytes() for cell in CELLS}
    decoded.clear()
    assert cli.ablate(arguments(models, run_dir)) == 0
    assert decoded == []
    assert {cell: (run_dir / cell / "results.jsonl").read_bytes() for cell in CELLS} == before


def test_a_killed_run_goes_on_where_it_was(models, whole, tmp_path, decoded):
    """As a kill leaves it: the first batch everywhere but in the last cell, where a line is torn."""
    run_dir = tmp_path / "run"
    for cell in CELLS:
        (run_dir / cell).mkdir(parents=True)
        (run_dir / cell / "config.yaml").write_bytes((whole / cell / "config.yaml").read_bytes())
        written = (whole / cell / "results.jsonl").read_bytes().splitlines(keepends=True)
        kept = b"".join(written[:2]) if cell != "by_reward/seed5" else written[0][:60]
        (run_dir / cell / "results.jsonl").write_bytes(kept)
    assert cli.ablate(arguments(models, run_dir)) == 0
    torn = [(key, 5, "best_of_n") for key in IDS[:2]]
    assert decoded[:2] == torn and len(decoded) == 2 + 2 * len(CELLS)
    assert timeless(run_dir) == timeless(whole)
    for cell in CELLS:
        assert timeless_lines(run_dir / cell) == timeless_lines(whole / cell)


def test_kill_9_and_again(models, tmp_path):
    changes = {"data__limit": 12, "data__batch_size": 1}
    run_dir = tmp_path / "run"
    process = start_script("ablate", arguments(models, run_dir, **changes))
    first = run_dir / "greedy" / "seed0" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (first.is_file() and first.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not (run_dir / "frontier.json").exists(), "the run was over before it was killed"
    kept = first.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert cli.ablate(arguments(models, run_dir, **changes)) == 0
    assert first.read_bytes().startswith(kept)
    assert cli.ablate(arguments(models, tmp_path / "other" / "run", **changes)) == 0
    assert timeless(run_dir) == timeless(tmp_path / "other" / "run")


def test_ctrl_c_leaves_the_frontier_of_what_is_finished(models, tmp_path, monkeypatch, capsys):
    lines_of, calls = Job.lines, []

    def interrupted(self, decoder, problems, **more):
        calls.append(decoder.name)
        if len(calls) == len(CELLS) + 2:
            raise KeyboardInterrupt
        return lines_of(self, decoder, problems, **more)

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(Job, "lines", interrupted)
    assert cli.ablate(arguments(models, tmp_path / "run")) == 130
    assert signal.getsignal(signal.SIGINT) == handler
    assert "the 2 finished of 4 problems" in capsys.readouterr().out
    assert timeless(tmp_path / "run")["problems"] == 2


def test_interrupted_before_any_problem_was_finished(models, tmp_path, monkeypatch, capsys):
    lines_of, calls = Job.lines, []

    def interrupted(self, decoder, problems, **more):
        calls.append(decoder.name)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return lines_of(self, decoder, problems, **more)

    monkeypatch.setattr(Job, "lines", interrupted)
    assert cli.ablate(arguments(models, tmp_path / "run")) == 130
    assert timeless(tmp_path / "run")["rows"] == []
    assert "error: interrupted" in capsys.readouterr().err


def test_variants_seeds_and_smaller_budgets_can_be_added(models, tmp_path, decoded):
    run_dir = tmp_path / "run"
    assert cli.ablate(arguments(models, run_dir)) == 0
    decoded.clear()
    more = {"flops": [5e5, *FRONTIER["flops"]], "variants": VARIANTS | {"vote": {"decoder": "self_consistency"}}}
    assert cli.ablate(arguments(models, run_dir, more)) == 0
    assert {name for *_, name in decoded} == {"self_consistency"}
    assert len(decoded) == 8


# What is refused


@pytest.fixture
def refused(models, tmp_path, capsys):
    def run(frontier: dict, *more: str, **changes: object) -> str:
        capsys.readouterr()
        assert cli.ablate([*arguments(models, tmp_path / "run", frontier, **changes), *more]) == 2
        out, err = capsys.readouterr()
        error = err.splitlines()[-1]
        assert out == "" and error.startswith("error: ") and err.count("error: ") == 1 and "Traceback" not in err
        return error

    return run


def only(**variant: object) -> dict:
    """A frontier of one variant."""
    return {"variants": {"a": variant}, "baseline": None}


@pytest.mark.parametrize(
    ("frontier", "fragments"),
    [
        (only(decoder="gredy"),
         ["variants.a.decoder: expected one of", "'gredy'", "Did you mean greedy?"]),
        (only(), ["variants.a.decoder: expected the name of a decoder", "found None"]),
        (only(decoder="no_such.module.Decoder"), ["variants.a.decoder: expected one of", "which cannot be imported"]),
        ({"variants": {"a/b": {"decoder": "greedy"}}, "baseline": None}, ["expected labels of letters", "'a/b'"]),
        (only(decoder="best_of_n", **{"model.best_of_n.m": 2}),
         ["variants.a.model.best_of_n.m: expected an option of decode", "Did you mean model.best_of_n"]),
        (only(decoder="best_of_n", **{"model.best_of_n.n": "x"}),
         ["variants.a.model.best_of_n.n: expected a whole number, found 'x'"]),
        (only(decoder="best_of_n", **{"model.best_of_n.n": 0}),
         ["variants.a.model.best_of_n.n: expected at least 1, found 0"]),
        (only(decoder="beam", **{"model.beam.width": 0}),
         ["variants.a.model.beam.width: expected at least 1, found 0"]),
        (only(decoder="greedy", **{"model.reward.name": "x"}),
         ["variants.a.model.reward.name: expected an option of the decoder", "--fixed.model.reward.name"]),
        (only(decoder="greedy", **{"data.limit": 1}), ["variants.a.data.limit: expected an option of the decoder"]),
        (only(decoder="greedy", seed=[0]),
         ["variants.a.seed: expected one of decoder, seeds", "Did you mean seeds?"]),
        (only(decoder="greedy", seeds=[7]),
         ["variants.a.seeds: expected some of the study's seeds, [0, 5], found [7]"]),
        ({"baseline": "best"}, ["--baseline: expected one of greedy, best_of_n, by_reward, found 'best'"]),
        ({"flops": []}, ["--flops: expected a list of positive budgets, found []"]),
        ({"flops": [-1.0]}, ["--flops: expected a list of positive budgets"]),
        ({"flops": "much"}, ["--flops: expected", "much"]),
        ({"seeds": [1, 1]}, ["--seeds: expected different whole numbers, found [1, 1]"]),
        ({"sedes": [1]}, ["--sedes: expected an option"]),
        ({"grid": {"model.beta": [1.0]}}, ["--grid: expected none with a frontier study"]),
        ({"variants": {}, "baseline": None}, ["--variants: expected labels and their options"]),
    ],
)  # fmt: skip
def test_bad_frontiers(refused, frontier, fragments, monkeypatch):
    monkeypatch.setattr(jobs, "load_policy", lambda *_, **__: pytest.fail("models were loaded"))
    message = refused(frontier)
    for fragment in fragments:
        assert fragment in message, message


def test_a_bad_budget_for_every_decoder(refused):
    message = refused({}, "--fixed.model.budget.rollouts", "0")
    assert "--fixed.model.budget.rollouts: expected a positive number" in message


def test_a_changed_configuration_is_refused(models, refused, tmp_path):
    assert cli.ablate(arguments(models, tmp_path / "run", data__limit=2)) == 0
    place = tmp_path / "run" / "best_of_n" / "seed0"
    before = (place / "results.jsonl").read_bytes()
    changed = {**VARIANTS, "best_of_n": {"decoder": "best_of_n", "model.best_of_n.n": 7}}
    message = refused({"variants": changed}, data__limit=2)
    assert f"--run_dir: expected {place} to hold this configuration" in message
    assert "model.best_of_n.n = 6 there and 7 now" in message
    assert (place / "results.jsonl").read_bytes() == before
    assert "data.limit = 2 there and 4 now" in refused({})
    assert "model.budget.flops = 3000000.0 there" in refused({"flops": [1e6, 4e6]}, data__limit=2)


def test_the_folder_of_an_ordinary_run_is_refused(models, refused, tmp_path):
    assert cli.decode(options(models, tmp_path / "run", model__decoders="[greedy]", data__limit=1)) == 0
    assert "found another run in" in refused({})


def test_models_are_loaded_once_for_all_cells(models, tmp_path, monkeypatch):
    loaded, load = [], jobs.load_policy
    monkeypatch.setattr(jobs, "load_policy", lambda given, **more: loaded.append(given) or load(given, **more))
    assert cli.ablate(arguments(models, tmp_path / "run", data__limit=2)) == 0
    assert len(loaded) == 1


# The shipped files


@pytest.mark.parametrize(
    "file", [f for f in CONFIGS if yaml.safe_load(f.read_text())["study"] == "frontier"], ids=lambda file: file.stem
)
def test_every_variant_of_the_shipped_files_is_one(file):
    study, given = build_study(study_options(file)), yaml.safe_load(file.read_text())
    assert isinstance(study, Frontier)
    assert {point.label for point in study.points} == set(given["variants"])
    for point, decoding in zip(study.points, study.decodings, strict=True):
        variant = given["variants"][point.label]
        assert variant["decoder"] in (decoding.decoder.name, f"{type(decoding.decoder).__module__}."
                                      f"{type(decoding.decoder).__name__}")  # fmt: skip
        assert decoding.seed == point.seed == decoding.config["seed"]
        found = flatten(decoding.config)
        for name, value in variant.items():
            if "." in name:
                assert found[name] == value, name


def test_options_of_other_decoders_do_not_decide(models):
    study = Frontier(jobs_design(models), [1e6])
    configs = {point.label: d.config["model"] for point, d in zip(study.points, study.decodings, strict=True)}
    assert "best_of_n" not in configs["greedy"] and configs["best_of_n"]["best_of_n"]["n"] == 6
    assert all("mcts" not in config for config in configs.values())


def jobs_design(models: Path):
    from nabla_rl.studies.base import Design

    return Design([0], {}, options_of(models), VARIANTS)
