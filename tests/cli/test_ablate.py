"""The ablate command end to end: both kinds of study, resumption, bad input, every YAML."""

from __future__ import annotations

import csv
import json
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from nabla_rl.cli import ablate as ablate_cli
from nabla_rl.cli import app as cli
from nabla_rl.cli.ablate import build_study
from nabla_rl.report.rows import Report
from nabla_rl.run_folder import flatten
from nabla_rl.studies.base import Design, Point, Watch
from nabla_rl.studies.exact import DualityExact
from nabla_rl.studies.grid import DecodeGrid
from nabla_rl.types import UserError
from tests.cli import toys_cli
from tests.studies.toys_studies import CONFIGS, options_of, study_options

DEFAULT = CONFIGS[0].parent / "duality_exact.yaml"
SMALL = {"max_steps": 30, "chains": 32, "run_steps": 8, "exact_steps": 10, "sampled_steps": 10, "batch_size": 8}


def write(folder: Path, **content: object) -> Path:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def exact(folder: Path, betas: Sequence[float], landscapes: Sequence[str] = ("table",)) -> list[str]:
    """The command line of a small exact study."""
    file = write(
        folder, study="duality_exact", grid={"landscape": list(landscapes), "beta": list(betas)}, exact=dict(SMALL)
    )  # fmt: skip
    return ["--config", str(file), "--run_dir", str(folder / "run")]


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "results.jsonl").read_text().split("\n")[:-1]]


def test_exact_study_writes_verdicts_tables_figures_and_a_page(tmp_path, capsys):
    assert cli.ablate(exact(tmp_path, [1.0, 0.2])) == 0
    shown = capsys.readouterr().out
    assert "identities hold in float64" in shown and "holds" in shown and "fails by" in shown
    run = tmp_path / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["points"] == summary["of"] == 2
    verdicts = {verdict["claim"]: verdict for verdict in summary["verdicts"]}
    assert verdicts["identities hold in float64"]["holds"]
    missed = verdicts["DTO, published samples the tilted policy (TV)"]
    assert not missed["holds"]
    assert missed["text"] == f"fails by {missed['measured'] - missed['bound']:.2g}"
    with (run / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(json.loads((run / "table.json").read_text())) == 2 * len(rows) // 2
    assert {row["kind"] for row in rows} == {"sampler", "rl", "decoder"}
    best = next(row for row in rows if row["name"] == "best of 4 by reward" and row["beta"] == "1.0")
    assert 0 < float(best["tv"]) < 1 and float(best["lambda_eff"]) > 0
    page = (run / "report.html").read_text()
    assert page.count("<svg ") == len(list((run / "figures").glob("*.svg"))) == 4
    assert len(list((run / "figures").glob("*.png"))) == 4
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )


def test_the_command_line_changes_single_options_of_grid_and_fixed(tmp_path, monkeypatch):
    """Two of one group, and of one section, both count."""
    seen = []
    monkeypatch.setattr(DecodeGrid, "__post_init__", lambda self: seen.append(self.design))
    monkeypatch.setattr(ablate_cli, "run", lambda *_: 0)
    file = write(
        tmp_path, study="decode", grid={"model.beta": [1.0, 2.0]}, fixed={"data.limit": 9, "data.split": "test"}
    )
    given = [
        "--config",
        str(file),
        "--run_dir",
        str(tmp_path / "run"),
        "--fixed.data.limit",
        "3",
        "--fixed.data.seed=1",
    ]
    given += ["--fixed.model.policy.name", "a", "--grid.model.beta", "[5]", "--grid.model.nabla.sweeps", "[1, 2]"]
    assert cli.ablate(given) == 0
    [design] = seen
    assert design.fixed == {"data.limit": 3, "data.split": "test", "data.seed": 1, "model.policy.name": "a"}
    values = [point.values for point in design.points()]
    assert values == [{"model.beta": 5, "model.nabla.sweeps": k} for k in (1, 2)]


def test_a_single_option_without_a_value_is_refused(capsys):
    assert cli.ablate(["--fixed.data.limit"]) == 2
    assert capsys.readouterr().err.startswith("error: --fixed.data.limit: expected a name and a value, found none.")


def stub_report(self, rows: Sequence[dict], folder: Path) -> Report:
    return Report(list(rows))


def test_without_options_runs_the_exact_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked: list = []
    monkeypatch.setattr(ablate_cli, "run", lambda study, path, arguments: asked.append((study, path)) or 0)
    assert cli.ablate([]) == 0 and cli.ablate(["--config", str(DEFAULT)]) == 0
    assert cli.ablate(["--config", "duality_exact"]) == 0
    assert asked[0] == asked[1] == asked[2] and asked[0][1] == Path("runs/ablate/duality_exact")
    assert isinstance(asked[0][0], DualityExact) and len(asked[0][0].points) == 15


def test_a_study_goes_on_point_by_point(tmp_path, monkeypatch, capsys):
    """Interrupted in its second point, it keeps the first; continued, it does the rest alone."""
    arguments, done, stop = exact(tmp_path, [1.0, 0.2]), [], [True]

    def run(self, point: Point, folder: Path, watch: Watch):
        if done and stop:
            raise KeyboardInterrupt
        done.append(point.id)
        return [{"decoder": "duality_exact", "beta": point.values["beta"]}]

    monkeypatch.setattr(DualityExact, "run_point", run)
    monkeypatch.setattr(DualityExact, "report_rows", stub_report)
    assert cli.ablate(arguments) == 130
    assert "interrupted" in capsys.readouterr().err
    first = lines(tmp_path)
    assert [line["id"] for line in first] == ["landscape=table_beta=1.0_seed=0"]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["points"] == 1
    stop.clear()
    # as if killed while it wrote the second line
    with (tmp_path / "run" / "results.jsonl").open("a") as file:
        file.write('{"id": "landscape=table_be')
    assert cli.ablate(arguments) == 0
    assert done == ["landscape=table_beta=1.0_seed=0", "landscape=table_beta=0.2_seed=0"]
    assert lines(tmp_path)[0] == first[0] and len(lines(tmp_path)) == 2
    assert cli.ablate(arguments) == 0
    assert len(done) == 2


def test_a_point_gives_the_same_result_twice(tmp_path):
    design = Design([3], {"landscape": ["table"], "beta": [0.5]})
    study = DualityExact(design, ablate_cli.ExactSettings(**SMALL))
    (point,) = study.points
    once, again = (
        json.dumps([{**row, "seconds": 0} for row in study.run_point(point, tmp_path, Watch())]) for _ in range(2)
    )
    assert once == again


def test_decode_study_has_a_run_folder_for_every_point(tmp_path, capsys):
    models = toys_cli.save_models(tmp_path / "models")
    fixed = options_of(models, data__limit=3, data__batch_size=3) | {"model.decoders": ["greedy", "nabla"]}
    grid = {"model.beta": [1.0, 0.1]}
    file = write(tmp_path, study="decode", grid=grid, fixed=fixed, seeds=[0, 1])
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "run")]) == 0
    found = lines(tmp_path)
    assert len(found) == 2 * 2 * 2  # β, seeds, decoders
    for line in found:
        point = toys_cli.read_results(tmp_path / "run" / "points" / line["id"])
        mine = [row for row in point if row["decoder"] == line["decoder"]]
        assert line["rewards"] == [row["reward"] for row in mine] and len(mine) == 3
    table = json.loads((tmp_path / "run" / "table.json").read_text())
    assert [(row["model.beta"], row["decoder"]) for row in table] == [
        (1.0, "greedy"), (1.0, "nabla"), (0.1, "greedy"), (0.1, "nabla"),
    ]  # fmt: skip
    for row in table:
        assert row["seeds"] == 2 and row["problems"] == 3
        assert row["mean_reward_low"] <= row["mean_reward"] <= row["mean_reward_high"]
    greedy = [row["mean_reward"] for row in table if row["decoder"] == "greedy"]
    assert greedy[0] == greedy[1]  # greedy decoding does not know β
    with (tmp_path / "run" / "table.csv").open() as written:
        rows = list(csv.DictReader(written))
    for row, line in zip(rows, table, strict=True):
        for name in ("accuracy_low", "accuracy", "accuracy_high", "mean_reward_low", "gold_reward_high"):
            assert float(row[name]) == pytest.approx(line[name]), name
    assert (tmp_path / "run" / "figures" / "grid.svg").is_file()
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg ") == 1 and f"{table[0]['mean_reward']:.4g} [" in page
    assert "mean reward" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_code_two(tmp_path, capsys):
    good = exact(tmp_path, [1.0])

    def complaint(arguments: list[str]) -> str:
        assert cli.ablate(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")
        return error

    assert (
        "--study: expected one of duality_exact, decode, frontier, distill, measured, curves, found 'magic'"
        in complaint([*good, "--study", "magic"])
    )
    assert "--exact.chainz: expected an option" in complaint([*good, "--exact.chainz", "3"])
    assert "--exact.chains: expected a larger number, found 1" in complaint([*good, "--exact.chains", "1"])
    assert "expected a YAML file" in complaint(["--config", str(tmp_path / "none.yaml")])
    for grid, words in (
        ({}, "found none"),
        ({"beta": 1.0}, "expected a list of values for beta"),
        ({"beta": []}, "expected a list of values for beta"),
        ({"landscape": ["moon"], "beta": [1.0]}, "found 'moon'"),
        ({"landscape": ["table"], "beta": [0.0]}, "positive, finite numbers for beta, found 0.0"),
        ({"landscape": ["table"]}, "numbers for beta, found None"),
        ({"landscape": ["table"], "beta": [1.0, 1.0]}, "twice"),
        ({"model.beta": [1.0]}, "found 'model.beta'"),
    ):
        file = write(tmp_path, study="duality_exact", grid=grid)
        assert words in complaint(["--config", str(file), "--run_dir", str(tmp_path / "other")]), grid
    file = write(tmp_path, study="decode", grid={"model.betta": [1.0]}, fixed={"data.limit": 1})
    assert (
        "--grid.model.betta: expected an option of decode, found an unknown one. Did you mean model.beta?"
        in complaint(["--config", str(file), "--run_dir", str(tmp_path / "other2")])
    )
    file = write(tmp_path, study="decode", grid={"beta": [1.0]})
    assert "--grid.beta: expected a dotted option of decode" in complaint(["--config", str(file)])
    file = write(tmp_path, study="decode", grid={"model.beta": [1.0]}, fixed={"model.beta": 2.0})
    assert "that the grid does not vary" in complaint(["--config", str(file)])
    assert "Did you mean duality_exact?" in complaint(["--config", "duality"])
    assert "--flops: expected none with a decode study" in complaint([*good, "--flops", "[1.0]"])
    file = write(tmp_path, study="decode", variants={"a": {"model.beta": 0.0}})
    assert "variants.a.model.beta: expected a positive number, found 0.0" in complaint(["--config", str(file)])
    file = write(tmp_path, study="decode", variants={"a": {"decoder": "greedy"}})
    assert "variants.a.decoder: expected a dotted option" in complaint(["--config", str(file)])


def test_a_folder_of_another_study_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        DualityExact, "run_point",
        lambda self, point, *_: [{"decoder": "duality_exact", "beta": point.values["beta"]}],
    )  # fmt: skip
    monkeypatch.setattr(DualityExact, "report_rows", stub_report)
    arguments = exact(tmp_path, [1.0])
    assert cli.ablate(arguments) == 0
    assert cli.ablate([*arguments, "--exact.chains", "64"]) == 2
    assert "exact.chains = 32 there and 64 now" in capsys.readouterr().err
    # a larger grid is the same study, gone on with
    assert cli.ablate(exact(tmp_path, [1.0, 0.5])) == 0
    assert [line["beta"] for line in lines(tmp_path)] == [1.0, 0.5]
    assert cli.ablate([*arguments, "--seed", "7"]) == 0
    assert lines(tmp_path)[-1]["id"].endswith("seed=7")


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_yaml_is_a_study_that_can_run(file):
    """To build a study is to check every option of every variant against the verbs' own."""
    study = build_study(study_options(file))
    assert 1 < len(study.points) <= 40
    if not isinstance(study, DecodeGrid):
        return
    for point in (study.points[0], study.points[-1]):
        decoding, given = study.decoding(point), study.design.options(point, "decode")
        config = flatten(decoding.config)
        assert config["data.split"] == "validation" and config["data.limit"] <= 200
        for name in {**study.design.fixed, **study.design.options_of(point.label)}:
            if name.split(".")[1] in (*decoding.decoders, "beta", "sampling", "policy", "reward", "split", "family"):
                assert config[name] == given[name], name


def test_every_kind_of_study_has_a_shipped_file():
    assert {study_options(file).study for file in CONFIGS} == set(ablate_cli.STUDIES)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_a_shipped_file_says_how_it_is_run_and_names_no_folder_of_one_machine(file):
    text = file.read_text()
    assert f"nabla-rl ablate --config {file.stem}" in text
    for name, value in flatten(yaml.safe_load(text)).items():
        assert not (isinstance(value, str) and Path(value).is_absolute()), name


def test_points_are_every_combination_for_every_seed():
    points = Design([0, 5], {"a.b": [1, 2], "c": ["x"]}).points()
    assert [point.id for point in points] == ["b=1_c=x_seed=0", "b=1_c=x_seed=5", "b=2_c=x_seed=0", "b=2_c=x_seed=5"]
    with pytest.raises(UserError, match="seeds: expected different whole numbers"):
        Design([], {"a": [1]}).points()


def test_variants_are_held_to_the_first_one_on_the_same_problems(tmp_path):
    """One part changed at a time: paired differences, and the share of FLOPs that a change saves."""
    models = toys_cli.save_models(tmp_path / "models")
    fixed = {
        "data.family": "sorting", "data.limit": 4, "model.decoders": ["best_of_n"], "model.policy.name": "POLICY",
        "model.sampling.max_new_tokens": 8, "model.gold.name": None,
    }  # fmt: skip
    fixed |= {"model.policy.name": str(models / "policy"), "model.reward.name": str(models / "reward")}
    variants = {"eight": {"model.best_of_n.n": 8}, "two": {"model.best_of_n.n": 2}}
    file = write(tmp_path, study="decode", fixed=fixed, variants=variants)
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "run")]) == 0
    first, second = json.loads((tmp_path / "run" / "table.json").read_text())
    assert (first["variant"], second["variant"]) == ("eight", "two") and "difference" not in first
    assert second["difference"] == pytest.approx(second["accuracy"] - first["accuracy"])
    assert second["flops_saved"] == pytest.approx(1 - second["flops"] / first["flops"])
    assert 0.3 < second["flops_saved"] < 1


def test_a_variant_with_another_decoder_is_compared_too(tmp_path):
    models = toys_cli.save_models(tmp_path / "models")
    fixed = options_of(models, data__limit=3) | {"model.decoders": ["edit_search"]}
    control = {"model.decoders": ["nabla_rl.studies.controls.RandomEdits"], "model.random_edits.max_rollouts": 3}
    file = write(tmp_path, study="decode", fixed=fixed, variants={"default": {}, "random": control})
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "run")]) == 0
    first, second = json.loads((tmp_path / "run" / "table.json").read_text())
    assert (first["decoder"], second["decoder"]) == ("edit_search", "random_edits")
    assert "difference" in second and "flops_saved" in second


def test_it_shows_that_it_is_alive(tmp_path, monkeypatch, capsys):
    """A line at the start and after every point where there is no terminal; bars on one."""
    monkeypatch.setattr(
        DualityExact, "run_point", lambda self, point, *_: [{"decoder": "duality_exact", **point.values}]
    )
    monkeypatch.setattr(DualityExact, "report_rows", stub_report)
    assert cli.ablate(exact(tmp_path, [1.0, 0.5])) == 0
    first, *points = capsys.readouterr().err.splitlines()
    assert first == f"run: 2 points, results in {tmp_path / 'run'}/"
    assert [line.rpartition(" (")[0] for line in points] == [
        "1 of 2: landscape=table_beta=1.0_seed=0", "2 of 2: landscape=table_beta=0.5_seed=0",
    ]  # fmt: skip
    watch = ablate_cli.BarWatch()
    watch.start("two points")
    watch.begin(1, 2, "the first")
    watch.step(3, 10, "problem 4 of 10")
    whole, part = watch.progress.tasks
    assert (whole.description, part.description, part.completed) == ("the first", "  problem 4 of 10", 3)
    watch.end()
    watch.stop()
    assert (whole.completed, whole.total) == (1, 2)


def test_kill_9_in_the_middle_of_a_point_loses_no_batch(tmp_path):
    models = toys_cli.save_models(tmp_path / "models")
    fixed = options_of(models, data__limit=12, data__batch_size=1) | {"model.decoders": ["nabla"]}
    file = write(tmp_path, study="decode", fixed=fixed, grid={"model.beta": [1.0, 0.1]})
    process = toys_cli.start_script("ablate", ["--config", str(file), "--run_dir", str(tmp_path / "run")])
    first = tmp_path / "run" / "points" / "beta=1.0_seed=0" / "results.jsonl"
    deadline = time.monotonic() + 120
    while not (first.is_file() and first.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate(timeout=60)
    assert not (tmp_path / "run" / "summary.json").exists(), "the run was over before it was killed"
    kept = first.read_bytes()
    kept = kept[: kept.rfind(b"\n") + 1]
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "run")]) == 0
    assert first.read_bytes().startswith(kept)
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "other")]) == 0
    tables = [json.loads((tmp_path / name / "table.json").read_text()) for name in ("run", "other")]
    assert [[{**row, "seconds": 0} for row in table] for table in tables][0] == [
        {**row, "seconds": 0} for row in tables[1]
    ]
