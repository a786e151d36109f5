"""The ablate command end to end: both kinds of study, resumption, bad input, every YAML."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from nabla_rl.alignment.aligner import PolicyAligner
from nabla_rl.alignment.data import AlignmentData
from nabla_rl.cli import ablate as ablate_cli
from nabla_rl.cli import align as align_cli
from nabla_rl.cli import app as cli
from nabla_rl.cli import distill as distill_cli
from nabla_rl.distillation.data import DistillationData
from nabla_rl.distillation.distiller import PolicyDistiller
from nabla_rl.studies import base as ablate
from nabla_rl.studies.base import DecodeGrid, DualityExact, Point, build_points
from nabla_rl.studies.measured import Measured
from nabla_rl.studies.training import DistillGrid
from nabla_rl.types import UserError
from tests.cli import toys_cli
from tests.cli.test_configs import parse

FILES = sorted(ablate_cli.CONFIGS.glob("*.yaml"))
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
    monkeypatch.setattr(DecodeGrid, "check", lambda self, points: seen.append((self.fixed, points)))
    monkeypatch.setattr(DecodeGrid, "run", lambda self, point, folder: [{"decoder": "nabla"}])
    monkeypatch.setattr(DecodeGrid, "report", stub_report)
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
    [(fixed, points)] = seen
    assert fixed == {"data.limit": 3, "data.split": "test", "data.seed": 1, "model.policy.name": "a"}
    assert [point.values for point in points] == [{"model.beta": 5, "model.nabla.sweeps": k} for k in (1, 2)]


def test_a_single_option_without_a_value_is_refused(capsys):
    assert cli.ablate(["--fixed.data.limit"]) == 2
    assert capsys.readouterr().err.startswith("error: --fixed.data.limit: expected a name and a value, found none.")


def stub_report(self, rows: Sequence[dict], folder: Path) -> ablate.Report:
    return ablate.Report(list(rows))


def test_without_options_runs_the_exact_study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked: list = []
    monkeypatch.setattr(
        ablate_cli, "run_points", lambda study, points, folder: asked.append((study, points, folder.path))
    )
    assert cli.ablate([]) == 0 and cli.ablate(["--config", str(ablate_cli.DEFAULT)]) == 0
    assert asked[0] == asked[1] and asked[0][2] == Path("runs/ablate/duality_exact")
    assert isinstance(asked[0][0], DualityExact) and len(asked[0][1]) == 15


def test_a_study_goes_on_point_by_point(tmp_path, monkeypatch, capsys):
    """Interrupted in its second point, it keeps the first; continued, it does the rest alone."""
    arguments, done, stop = exact(tmp_path, [1.0, 0.2]), [], [True]

    def run(self, point: Point, folder: Path):
        if done and stop:
            raise KeyboardInterrupt
        done.append(point.id)
        return [{"decoder": "duality_exact", "beta": point.values["beta"]}]

    monkeypatch.setattr(DualityExact, "run", run)
    monkeypatch.setattr(DualityExact, "report", stub_report)
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
    study, point = DualityExact(ablate_cli.ExactSettings(**SMALL)), Point({"landscape": "table", "beta": 0.5}, 3)
    once, again = (json.dumps([{**row, "seconds": 0} for row in study.run(point, tmp_path)]) for _ in range(2))
    assert once == again


def test_decode_study_runs_the_decode_command_at_every_point(tmp_path, capsys):
    models = toys_cli.save_models(tmp_path / "models")
    given = toys_cli.options(models)
    fixed = {name.removeprefix("--"): value for name, value in zip(given[::2], given[1::2], strict=True)}
    fixed |= {"model.decoders": ["greedy", "nabla"], "data.limit": 3, "data.batch_size": 3}
    fixed = {name: int(v) if isinstance(v, str) and v.isdigit() else v for name, v in fixed.items()}
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

    assert "expected one of duality_exact, decode, distill, measured, found 'magic'" in complaint(
        [*good, "--study", "magic"]
    )
    assert "--exact.chainz: expected an option" in complaint([*good, "--exact.chainz", "3"])
    assert "settings.chains: expected a larger number, found 1" in complaint([*good, "--exact.chains", "1"])
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
    assert "--model.betta" in complaint(["--config", str(file), "--run_dir", str(tmp_path / "other2")])
    file = write(tmp_path, study="decode", grid={"beta": [1.0]})
    assert "dotted options of decode.py" in complaint(["--config", str(file)])
    file = write(tmp_path, study="decode", grid={"model.beta": [1.0]}, fixed={"model.beta": 2.0})
    assert "that the grid does not vary" in complaint(["--config", str(file)])


def test_a_folder_of_another_study_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        DualityExact, "run", lambda self, point, folder: [{"decoder": "duality_exact", "beta": point.values["beta"]}]
    )
    monkeypatch.setattr(DualityExact, "report", stub_report)
    arguments = exact(tmp_path, [1.0])
    assert cli.ablate(arguments) == 0
    assert cli.ablate([*arguments, "--exact.chains", "64"]) == 2
    assert "exact.chains = 32 there and 64 now" in capsys.readouterr().err
    # a larger grid is the same study, gone on with
    assert cli.ablate(exact(tmp_path, [1.0, 0.5])) == 0
    assert [line["beta"] for line in lines(tmp_path)] == [1.0, 0.5]
    assert cli.ablate([*arguments, "--seed", "7"]) == 0
    assert lines(tmp_path)[-1]["id"].endswith("seed=7")


def parse_training(command: str, options: dict[str, Any]) -> Any:
    """The options of a training command as it reads them; nothing is built."""
    kind, module, data = {
        "distill": (distill_cli.DistillCLI, PolicyDistiller, DistillationData),
        "align": (align_cli.AlignCLI, PolicyAligner, AlignmentData),
    }[command]

    class ParsedOnly(kind):
        def instantiate_classes(self) -> None:
            pass

    words = [(f"--{name}", value if isinstance(value, str) else json.dumps(value)) for name, value in options.items()]
    return ParsedOnly(
        module, data, run=False, args=[word for pair in words for word in pair], seed_everything_default=False,
        save_config_callback=None, auto_configure_optimizers=False,
        parser_kwargs={"exit_on_error": False},
    ).config  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_yaml_is_a_study_that_can_run(file):
    options = ablate_cli.build_parser().parse_args(["--config", str(file)])
    variants = options.variants
    points = build_points(ablate_cli.whole_grid(options.grid, variants), options.seeds)
    assert 1 < len(points) <= 40
    if options.study == "duality_exact":
        DualityExact().check(points)
        return
    study = ablate_cli.build_study(options)
    if isinstance(study, DistillGrid):
        study.check(points)
        for label, variant in variants.items():
            parsed = parse_training(variant.get("command", "distill"), study.options(label))
            assert parsed.data.eval_split in ("validation", "test") and parsed.data.family in ("sorting", "words")
        return
    study.check(points)
    if isinstance(study, Measured):
        for label in variants:
            parse(study.arguments(study.source(label), "sorting", 0, None))
        return
    assert isinstance(study, DecodeGrid)
    for point in (points[0], points[-1]):
        config = parse(study.arguments(point, Path("unused")))
        assert config["model"]["decoders"] == options.fixed["model.decoders"]
        assert config["data"]["split"] == "validation" and config["data"]["limit"] <= 200
        chosen = variants.get(point.values.get("variant"), {})
        for name, value in {**point.values, **chosen}.items():
            if name == "variant":
                continue
            found = config
            for part in name.split("."):
                found = found[part]
            assert found == value, name


def test_points_are_every_combination_for_every_seed():
    points = build_points({"a.b": [1, 2], "c": ["x"]}, [0, 5])
    assert [point.id for point in points] == ["b=1_c=x_seed=0", "b=1_c=x_seed=5", "b=2_c=x_seed=0", "b=2_c=x_seed=5"]
    with pytest.raises(UserError, match="--seeds: expected different whole numbers"):
        build_points({"a": [1]}, [])


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
