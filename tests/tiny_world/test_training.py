"""Training of the tiny models: what a batch is, and that a run goes on where it stopped."""

from __future__ import annotations

import random
from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from transformers import LlamaConfig, LlamaForCausalLM

from nabla_rl.cli import app as cli
from nabla_rl.data.tiny import SORTING, STEP, WORDS, Family, build_tokenizer, generate, slip_word_solution
from nabla_rl.models.policy import Policy
from nabla_rl.tiny_world.judge import (
    AFTER_ERROR,
    FIRST_ERROR,
    JudgedBatches,
    TinyJudge,
    judge_from_language_model,
    process_labels,
    token_weights,
    with_fresh_layers,
)
from nabla_rl.tiny_world.language import SolutionBatches, TinyPretraining, warmup_stable_decay
from tests import toys_hf as toys

CONFIGS = Path(__file__).parents[2] / "configs" / "train_tiny"


def language_model(family: Family = SORTING) -> LlamaForCausalLM:
    torch.manual_seed(0)
    tokenizer = build_tokenizer(family)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.2,
        )  # fmt: skip
    )


def judge(max_steps: int, *, extra_layers: int = 0, agreement_steps: int = 2, **options) -> TinyJudge:
    model, tokenizer = language_model(), build_tokenizer(SORTING)
    torch.manual_seed(1)
    fresh = with_fresh_layers(judge_from_language_model(model, 1), extra_layers)
    return TinyJudge(
        fresh, model, Policy(model, tokenizer), SORTING, batch_size=4, max_steps=max_steps,
        agreement_steps=agreement_steps, **options,
    )  # fmt: skip


def pretraining(max_steps: int) -> TinyPretraining:
    return TinyPretraining(language_model(), build_tokenizer(SORTING), SORTING, batch_size=4, max_steps=max_steps)


def test_solution_batch_k_depends_on_the_seed_and_k_alone():
    def batches(start: int) -> SolutionBatches:
        return SolutionBatches(SORTING, build_tokenizer(SORTING), batch_size=3, seed=5, start=start)

    whole, rest = list(islice(batches(0), 4)), list(islice(batches(2), 2))
    for name in ("input_ids", "labels"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(whole[2:], rest, strict=True))
    assert not torch.equal(whole[0]["input_ids"], whole[1]["input_ids"])


def test_judged_batch_k_depends_on_the_seed_and_k_alone():
    model = language_model()

    def batches(start: int) -> JudgedBatches:
        policy = Policy(model, build_tokenizer(SORTING))
        return JudgedBatches(SORTING, policy, model, batch_size=4, seed=5, start=start, agreement_steps=1)

    whole, rest = list(islice(batches(0), 5)), list(islice(batches(3), 2))
    for name in ("input_ids", "labels", "weights"):
        assert all(torch.equal(a[name], b[name]) for a, b in zip(whole[3:], rest, strict=True))


def test_agreement_labels_say_what_the_language_model_would_have_written():
    model = language_model()
    batches = JudgedBatches(
        SORTING, Policy(model, build_tokenizer(SORTING)), model, batch_size=4, seed=0, start=0, agreement_steps=1
    )
    batch = next(iter(batches))
    expected = model(input_ids=batch["input_ids"]).logits.argmax(-1)[:, :-1] == batch["input_ids"][:, 1:]
    judged = batch["labels"][:, 1:] >= 0
    assert judged.any() and torch.equal(batch["labels"][:, 1:][judged].bool(), expected[judged])


def test_labels_fall_at_the_first_error_and_weights_mark_it():
    assert process_labels([5, 6, 9, 8], [5, 6, 7, 8]) == [1, 1, 0, 0]
    assert process_labels([5, 6, 7], [5, 6]) == [1, 1, 0]
    weights = token_weights(torch.tensor([[-100, 1, 1, 0, 0, 0]]))
    assert torch.equal(weights, torch.tensor([[1.0, 1.0, 1.0, FIRST_ERROR, AFTER_ERROR, AFTER_ERROR]]))


def test_where_answers_are_judged_the_end_token_is_about_the_answer():
    """Steps that go wrong and come back: wrong from the slip on, and right at the end."""
    model, tokenizer = language_model(), build_tokenizer(WORDS)
    right = [*tokenizer("9-2=7\n7-1=6\n\\boxed{6}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    back = [*tokenizer("9-2=5\n5-1=6\n\\boxed{6}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    wrong = [*tokenizer("9-2=5\n5-1=4\n\\boxed{4}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    for answer_weight, at_the_end in ((0.0, 0), (4.0, 1)):
        batches = JudgedBatches(
            WORDS, Policy(model, tokenizer), model, batch_size=4, seed=0, start=0, agreement_steps=0,
            answer_weight=answer_weight,
        )  # fmt: skip
        assert batches.label(back, right) == [1] * 4 + [0] * (len(back) - 5) + [at_the_end]
        assert batches.label(wrong, right)[-1] == 0 and batches.label(right, right)[-1] == 1
        batch = batches.collate([([1, 2], back, batches.label(back, right))])
        assert batch["weights"][0, -1] == (answer_weight or AFTER_ERROR)


def test_slips_have_a_wrong_step_and_some_come_back():
    """Every slip differs from the solution, stays among the numbers of the family, and about a third end right."""
    problems, rng, back = generate(WORDS, "train", 0), random.Random(0), 0
    for problem in islice(problems, 300):
        slipped = slip_word_solution(problem, rng)
        lines = [STEP.fullmatch(line) for line in slipped.split("\n")[:-1]]
        assert slipped != problem.solution and all(line is not None and int(line[4]) <= 99 for line in lines)
        back += WORDS.extract(slipped) == problem.answer
    assert 80 < back < 140


def test_where_slips_are_learnt_from_they_take_the_place_of_right_and_corrupted_solutions():
    model, tokenizer = language_model(WORDS), build_tokenizer(WORDS)
    rows = {}
    for slips in (False, True):
        batches = JudgedBatches(
            WORDS, Policy(model, tokenizer), model, batch_size=2, seed=0, start=0, agreement_steps=0,
            answer_weight=4.0, slips=slips,
        )  # fmt: skip
        batches.CHUNK = 8
        rows[slips] = {tuple(completion) for batch in batches.draw(0) for _, completion, _ in batch}
    # 16 problems: 8 samples, 4 corrupted, 4 right; the 4 in the middle of those 8 slip
    assert len(rows[False] & rows[True]) == 12


def test_fresh_layers_on_a_judge_change_nothing_yet():
    module = judge(1)
    ids = torch.arange(4, 10)[None]
    deeper = with_fresh_layers(module.model, 2).eval()
    assert deeper.config.num_hidden_layers == module.model.config.num_hidden_layers + 2
    torch.testing.assert_close(deeper(input_ids=ids).logits, module.model.eval()(input_ids=ids).logits)


def test_the_agreement_head_learns_and_is_not_kept():
    """Its loss moves the layers below it, and a saved judge does not have it."""
    weights = {}
    for weight in (0.0, 1.0):
        module = judge(2, extra_layers=2, agreement_steps=0, agreement_weight=weight)
        before = [p.clone() for p in module.agreement.parameters()]
        trainer(2).fit(module)
        moved = any(not torch.equal(p, q) for p, q in zip(before, module.agreement.parameters(), strict=True))
        assert moved == (weight > 0)
        weights[weight] = module.model.model.layers[0].mlp.up_proj.weight
    assert not torch.equal(weights[0.0], weights[1.0])
    assert not any("agreement" in name for name in module.model.state_dict())


def test_schedule_warms_up_holds_and_falls_to_zero():
    factors = [warmup_stable_decay(step, warmup=2, total=8, decay=0.5) for step in range(9)]
    assert factors == [0.5, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_fresh_layers_alone_move_while_they_learn_to_compare():
    module = judge(2)
    before = {name: value.clone() for name, value in module.model.state_dict().items()}
    trainer(2).fit(module)
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and not any(name.startswith(("model.embed_tokens", "model.layers.0.")) for name in changed)


def trainer(max_steps: int, folder=None) -> L.Trainer:
    callbacks = [ModelCheckpoint(folder, every_n_train_steps=1, save_last=True)] if folder else []
    return L.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", logger=False, gradient_clip_val=1.0,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(folder), callbacks=callbacks,
    )  # fmt: skip


@pytest.mark.parametrize("build", [pretraining, judge], ids=["language_model", "judge"])
def test_stopped_and_continued_gives_the_weights_of_an_unbroken_run(build, tmp_path):
    """To the bit, with the stop inside a chunk and, for the judge, on either side of the two tasks' border."""
    whole = build(5)
    trainer(5).fit(whole)
    trainer(1, tmp_path).fit(build(5))
    trainer(3, tmp_path).fit(build(5), ckpt_path=str(tmp_path / "last.ckpt"))
    resumed = build(5)
    trainer(5).fit(resumed, ckpt_path=str(tmp_path / "last.ckpt"))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            "--config sorting/tiny-reward.yaml --model.judge.policy nobody/none",
            "--model.judge.policy: expected a folder",
        ),
        ("--config sorting/tiny-reward.yaml --model.judge.base ./none", "--model.judge.base: expected a model folder"),
        (
            "--config sorting/tiny-taught.yaml --model.taught.judge nobody/none",
            "--model.taught.judge: expected a folder",
        ),
        ("--card words --card_problems many", "--card_problems: expected a whole number of at least 1, found 'many'"),
        ("--card chess", "--card: expected one of words, sorting, found 'chess'"),
    ],
)
def test_bad_input_is_one_line_that_names_the_option(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    words = [str(CONFIGS / word) if word.endswith(".yaml") else word for word in options.split()]
    assert cli.train_tiny(words) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith(f"error: {said}"), lines


def test_a_judge_of_another_architecture_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    toys.build_gpt2().save_pretrained("gpt2")
    toys.tokenizer().save_pretrained("gpt2")
    assert cli.train_tiny(["--config", str(CONFIGS / "sorting/tiny-reward.yaml"), "--model.judge.base", "gpt2"]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]  # bars of loading stand before it
    assert line.startswith("error: --model.judge.base: expected a Llama model") and "GPT2LMHeadModel" in line
