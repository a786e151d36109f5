"""The measured study end to end on toy models: points, adapters, resumption, tables, figures, bad input."""

from __future__ import annotations

import json
from itertools import islice

import pytest
import torch
import yaml

from nabla_rl.cli import app as cli
from nabla_rl.data.tiny import SORTING, generate
from nabla_rl.functional.seeding import seeded_generator
from nabla_rl.ledger import Ledger
from nabla_rl.models.loading import PolicyOptions, load_policy
from nabla_rl.studies import laws as measured_laws
from nabla_rl.studies.base import Design
from nabla_rl.studies.measured import Measured
from nabla_rl.studies.sources import Source
from nabla_rl.types import UserError
from tests.cli import toys_cli
from tests.studies.toys_studies import CONFIGS, options_of

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> dict:
    """A finished small study: its folder, its YAML, and what it printed nowhere."""
    folder = tmp_path_factory.mktemp("measured")
    models = toys_cli.save_models(folder / "models")
    fixed = options_of(models, data__limit=5, data__batch_size=3)
    family = fixed.pop("data.family")
    align = {
        "command": "align", "snapshots": [1], "model.policy.name": str(models / "policy"), "model.reward.name":
        str(models / "reward"), "model.gold.name": None, "model.rl.max_steps": 2, "data.eval_limit": 2,
        "model.rl.per_device_train_batch_size": 8, "model.rl.num_generations": 4, "model.rl.learning_rate": 0.01,
        "model.rl.max_completion_length": 8, "model.rl.report_to": "none", "model.rl.gradient_accumulation_steps": 1,
    }  # fmt: skip
    content = {
        "study": "measured",
        "grid": {"data.family": [family]},
        "fixed": fixed,
        "adapters": {"aligned": align},
        "variants": {
            "policy": {"curve": "policy", "samples": 32},
            "greedy": {"curve": "greedy", "decoder": "greedy"},
            "align": {"curve": "align", "beta": 1.0, "adapter": "aligned", "samples": 3},
            "align, step 1": {"curve": "align steps", "at": 1, "adapter": "aligned", "step": 1, "samples": 3},
            "loop": {"curve": "nabla", "beta": 1.0, "decoder": "nabla", "samples": 2},
            "DTO": {"curve": "dto steps", "at": 3, "decoder": "dto", "samples": 2,
                    "model.nabla.dto.num_steps": 3},
            "split": {"curve": "split pool", "beta": 1.0, "adapter": "aligned", "samples": 16, "tilt": 2.0},
        },
        "pairs": [["align", "tilted, β = 1"], ["loop", "greedy"], ["best of 4 by energy", "split"]],
    }  # fmt: skip
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    arguments = ["--config", str(file), "--run_dir", str(folder / "run"), "--adapters_dir", str(folder / "adapters")]
    assert cli.ablate(arguments) == 0
    return {"folder": folder, "content": content, "arguments": arguments, "models": models}


def table(study: dict) -> dict[str, dict]:
    return {row["distribution"]: row for row in json.loads((study["folder"] / "run" / "table.json").read_text())}


def lines(study: dict) -> dict[str, dict]:
    texts = (study["folder"] / "run" / "results.jsonl").read_text().split("\n")[:-1]
    return {row["decoder"]: row for row in map(json.loads, texts)}


def test_every_law_has_a_line_with_what_is_defined_for_it(study):
    rows = table(study)
    assert rows["policy"]["kl"] == 0.0 and rows["policy"]["samples"] == 32
    assert rows["align"]["kl"] > 0 and rows["align"]["kl_low"] <= rows["align"]["kl"] <= rows["align"]["kl_high"]
    assert rows["align"]["training_flops"] > 0 and rows["align, step 1"]["kl"] < rows["align"]["kl"]
    for name, by in (("greedy", "a point mass has the upper end"), ("loop", "no density"), ("DTO", "no density")):
        assert rows[name]["kl"] is None and by in rows[name]["kl_by"]
        assert rows[name]["kl_from"] <= rows[name]["kl_to"] == rows[name]["surprisal"]
    assert rows["tilted, β = 1"]["kl"] > 0 and rows["tilted, β = 1"]["reward"] > rows["policy"]["reward"]
    best = [rows[f"best of {n} by reward"] for n in (2, 4, 8, 16)]
    assert [row["kl"] for row in best] == sorted(row["kl"] for row in best)
    assert [row["reward"] for row in best] == sorted(row["reward"] for row in best)
    assert "best of 32 by reward" not in rows
    run = study["folder"] / "run"
    page = (run / "report.html").read_text()
    assert "Two distributions on the same problems" in page and page.count("<svg ") == 2
    assert {file.name for file in (run / "figures").glob("*.svg")} == {
        "reward_kl_sorting.svg", "over_optimisation_sorting.svg",
    }  # fmt: skip


def test_pairs_are_compared(study):
    found = json.loads((study["folder"] / "run" / "two_distributions_on_the_same_problems.json").read_text())
    assert [(row["first"], row["second"]) for row in found] == [tuple(pair) for pair in study["content"]["pairs"]]
    for row in found:
        assert 0 <= row["overlap"] <= 1 and 0 <= row["gold_wins"] <= 1 and 0 < row["probe_p"] <= 1
        assert row["overlap_low"] <= row["overlap"] <= row["overlap_high"]


def test_values_are_those_of_the_models(study):
    """Recomputed one completion at a time: likelihoods under the base policy, and the KL of the adapter."""
    row = lines(study)["align"]
    problems = {p: k for k, p in enumerate(row["problems"])}
    base = load_policy(PolicyOptions(name=str(study["models"] / "policy")), device=CPU)
    adapter = study["folder"] / "adapters" / "aligned_sorting_seed=0" / "adapter"
    options = PolicyOptions(name=str(study["models"] / "policy"), adapter=str(adapter))
    aligned = load_policy(options, device=CPU)
    given = {p.id: p for p in islice(generate(SORTING, "test", 0), 5)}
    for key, k in problems.items():
        kls = []
        for j, ids in enumerate(row["completions"][k]):
            logps = []
            for policy in (base, aligned):
                prefix = policy.prefill([policy.encode_prompt(given[key].problem)], torch.zeros(1).long(), Ledger(1))
                logps.append(policy.next_logits(prefix).log_softmax(-1))
                tokens = torch.tensor([ids])
                encoded = policy.backbone.encode(prefix, tokens, torch.ones_like(tokens).bool())
                logps[-1] = policy.logits(encoded.hidden[0, :-1]).log_softmax(-1).double()
            picked = [law.gather(-1, torch.tensor(ids)[:, None]).sum() for law in logps]
            assert row["surprisal"][k][j] == pytest.approx(-float(picked[0]), abs=1e-4)
            assert row["log_ratio"][k][j] == pytest.approx(float(picked[1] - picked[0]), abs=1e-4)
            kls.append(float((logps[1].exp() * (logps[1] - logps[0])).sum()))
        assert row["kl"][k] == pytest.approx(sum(kls) / len(kls), abs=1e-4)


def test_a_finished_study_draws_nothing_anew_and_takes_further_laws(study, monkeypatch):
    content, drawn = dict(study["content"]), []
    content["variants"] = {**content["variants"], "more": {"curve": "greedy", "decoder": "greedy"}}
    file = study["folder"] / "more.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    original = Measured.run_point
    monkeypatch.setattr(
        Measured, "run_point", lambda self, point, *more: drawn.append(point.id) or original(self, point, *more)
    )
    assert cli.ablate(["--config", str(file), *study["arguments"][2:]]) == 0
    assert len(drawn) == 1 and "variant=more" in drawn[0]
    assert cli.ablate(study["arguments"]) == 0
    assert len(drawn) == 1


def test_a_law_that_was_changed_under_its_label_is_refused(study, capsys):
    content = dict(study["content"])
    content["variants"] = {**content["variants"], "align": {**content["variants"]["align"], "beta": 3.0}}
    file = study["folder"] / "changed.yaml"
    file.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    assert cli.ablate(["--config", str(file), *study["arguments"][2:]]) == 2
    assert (
        "expected results of 'align' as it is defined now, found those of another definition"
        in capsys.readouterr().err
    )


def test_an_adapter_of_other_options_is_not_taken_for_the_studys(study, tmp_path, capsys):
    """Its folder is there, and finished: of another β."""
    aligned = {**study["content"]["adapters"]["aligned"], "model.rl.beta": 0.3}
    laws = {"align": study["content"]["variants"]["align"]}
    file = tmp_path / "other.yaml"
    content = {**study["content"], "adapters": {"aligned": aligned}, "variants": laws, "pairs": []}
    file.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    adapters = ["--adapters_dir", str(study["folder"] / "adapters")]
    assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "run"), *adapters]) == 2
    error = capsys.readouterr().err
    assert "--adapters_dir: expected" in error and "Traceback" not in error
    assert "found model.rl.beta = 1.0 there and 0.3 now" in error


def test_bad_input_is_one_line_and_exit_code_two(study, tmp_path, capsys):
    def complaint(**changes: object) -> str:
        file = tmp_path / "bad.yaml"
        file.write_text(yaml.safe_dump({**study["content"], **changes}, allow_unicode=True))
        assert cli.ablate(["--config", str(file), "--run_dir", str(tmp_path / "none")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.startswith("error: ")
        return error

    curve = {"curve": "policy"}
    assert "variants.x.curve: expected the line of a figure, found none" in complaint(variants={"x": {"samples": 2}})
    assert "variants.x.colour: expected one of curve" in complaint(variants={"x": {**curve, "colour": 1}})
    assert "variants.x.samples: expected at least 1, found 0" in complaint(variants={"x": {**curve, "samples": 0}})
    assert "variants.x.tilt: expected a positive number, found -1" in complaint(variants={"x": {**curve, "tilt": -1}})
    assert "variants.x.tilt: expected none but with samples of a policy" in complaint(
        variants={"x": {**curve, "tilt": 1.0, "decoder": "greedy"}}
    )
    assert "variants.x.adapter: expected one of --adapters, found 'nobody'" in complaint(
        variants={"x": {**curve, "adapter": "nobody"}}
    )
    assert "variants.x.step: expected a step among [1], found 7" in complaint(
        variants={"x": {**curve, "adapter": "aligned", "step": 7}}
    )
    assert "variants.x.model.betta: expected an option of decode" in complaint(
        variants={"x": {**curve, "model.betta": 1.0}}, pairs=[]
    )
    assert "adapters.aligned.command: expected one of align, distill, found 'paint'" in complaint(
        adapters={"aligned": {"command": "paint", "snapshots": [1]}}
    )
    assert "adapters.aligned.model.rl.bata: expected an option of align" in complaint(
        adapters={"aligned": {"command": "align", "snapshots": [1], "model.rl.bata": 1.0}}, pairs=[]
    )
    assert "--pairs: expected two labels of --variants" in complaint(pairs=[["policy", "moon"]])
    assert "--grid: expected data.family alone" in complaint(grid={"data.family": ["sorting"], "model.beta": [1.0]})


def test_reweighting_a_pool_by_nothing_leaves_it_as_it_is():
    generator = seeded_generator("pool")
    values = {name: torch.randn(20, 32, generator=generator).double() for name in ("rewards", "gold", "correct")}
    values |= {
        "surprisal": torch.rand(20, 32, generator=generator).double(),
        "log_ratio": torch.zeros(20, 32).double(),
    }
    completions = [[(j,) for j in range(32)] for _ in range(20)]
    pool = measured_laws.Sample("policy", "policy", None, None, "known", [str(k) for k in range(20)], completions,
                                values, torch.zeros(20).double(), "")  # fmt: skip
    same = measured_laws.tilt(pool, 1e9, label="same", curve="tilted", beta=None)
    torch.testing.assert_close(same.mean("rewards"), pool.mean("rewards"), atol=1e-6, rtol=0)
    assert float(same.kl.abs().max()) < 1e-6  # pyright: ignore
    hard = measured_laws.tilt(pool, 1e-3, label="hard", curve="tilted", beta=None)
    torch.testing.assert_close(hard.mean("rewards"), values["rewards"].max(1).values)
    best = values["rewards"].argmax(1).tolist()
    assert hard.completions == [[(k,)] * measured_laws.REDRAWN for k in best]


def test_what_a_source_cannot_be_is_refused():
    with pytest.raises(UserError, match="beta: expected a positive number"):
        Source("x", beta=0.0)
    with pytest.raises(UserError, match="grid: expected data.family alone"):
        Measured(Design(variants={"x": {"curve": "policy"}}))


@pytest.mark.parametrize("name", ["frontier.yaml", "frontier_words.yaml", "composition.yaml"])
def test_shipped_studies_name_what_they_use(name):
    """Every curve has a colour, every adapter is used, and a pair's derived law has its β."""
    from nabla_rl.report.laws import CURVES

    content = yaml.safe_load((CONFIGS[0].parent / name).read_text(encoding="utf-8"))
    variants = content["variants"]
    assert {v["curve"] for v in variants.values()} <= CURVES.keys()
    betas = {v.get("beta") for v in variants.values()}
    for pair in content["pairs"]:
        for label in pair:
            tilted = label.startswith("tilted, β = ") and float(label.removeprefix("tilted, β = ")) in betas
            assert label in variants or tilted or label.startswith("best of ")
