"""`python scripts/train_tiny.py`: one of the embedded tiny models, from its YAML to its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import lightning as L
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedModel

from nabla_rl.cli.base import spelling, with_found_configs
from nabla_rl.data.problems import Problem, read_jsonl
from nabla_rl.data.tiny import FAMILIES, build_tokenizer
from nabla_rl.models.adapters import LoraOptions, build_adapter
from nabla_rl.models.loading import ASSETS, RewardOptions, load_classifier, load_policy, qualified
from nabla_rl.models.policy import Policy
from nabla_rl.models.prompts import special_id
from nabla_rl.rewards.base import check_shared_vocabulary
from nabla_rl.rewards.sequence_classifier import SequenceClassifierReward
from nabla_rl.tiny_world.card import write_card
from nabla_rl.tiny_world.judge import TinyJudge, judge_from_language_model, with_fresh_layers
from nabla_rl.tiny_world.language import TinyPretraining
from nabla_rl.tiny_world.taught import TinyTaught
from nabla_rl.types import UserError


@dataclass(frozen=True)
class LanguageModelShape:
    """Size of a tiny language model (a Llama configuration)."""

    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 352
    """Width of the feed-forward layers."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 4
    """Attention heads."""


@dataclass(frozen=True)
class JudgeOptions:
    """What a judge is built from."""

    policy: str = "tiny-policy"
    """Whose samples it learns on: an embedded model or a folder."""
    base: str = "tiny-strong"
    """The finished language model that it starts from: an embedded model or a folder."""
    extra_layers: int = 2
    """Fresh blocks on top: a token can only be compared with its own prediction one layer after that is complete. On
    top of `start`, if there is one."""
    agreement_steps: int = 500
    """First steps, in which the fresh blocks alone learn whether a token is what the base would have written."""
    base_learning_rate: float = 2e-4
    """Peak step size of the base's weights after that; the fresh blocks have the model's learning_rate."""
    start: str | None = None
    """Judge to go on from, an embedded model or a folder; null: the base with fresh blocks."""
    answer_weight: float = 0.0
    """Above 0: label the end token by the answer, not by whether every step before it is right, at this weight."""
    agreement_weight: float = 0.0
    """Weight of a second loss, two layers below the top: is each token what the base would have written? A judge that
    is asked for more than the first error has to see the later ones."""
    slips: bool = False
    """Learn on solutions with a wrong step that may come back to the right answer, too."""


@dataclass(frozen=True)
class TaughtOptions:
    """What a judge is taught its gradient from."""

    policy: str = "tiny-policy"
    """Whose completions and alternatives it learns on: an embedded model, a folder or a Hub name."""
    judge: str = "tiny-reward"
    """The judge that is copied, and whose exact changes are to be predicted: an embedded model, a folder or a Hub
    name."""
    alternatives: int = 8
    """The policy's likeliest tokens that are tried at each position."""
    problems: str | None = None
    """A JSONL file of problems to learn on (field `problem`); null: fresh ones of the family."""
    max_new_tokens: int | None = None
    """Tokens at most in one completion; null: the family's."""
    lora: LoraOptions | None = None
    """Train a PEFT LoRA on the copy, and save that alone; null: all weights of the copy."""


@dataclass(frozen=True)
class TrainTinyOptions:
    """One tiny model."""

    name: str
    """Embedded name, or a folder to save to."""
    family: Literal["words", "sorting"] = "words"
    """Which problems."""
    shape: LanguageModelShape = LanguageModelShape()
    """Size of a language model; a judge takes its base's."""
    judge: JudgeOptions | None = None
    """Set for a judge; null for a language model."""
    taught: TaughtOptions | None = None
    """Set for a judge that is taught its gradient."""
    max_steps: int = 1000
    """Optimiser steps."""
    stop_at: int | None = None
    """Stop after so many steps of the schedule: an early checkpoint of a longer run."""
    batch_size: int = 64
    """Sequences a step."""
    learning_rate: float = 2e-3
    """Peak step size of AdamW."""
    warmup: int = 100
    """Steps of linear warm-up."""
    decay: float = 0.25
    """Share of the steps, at the end, over which the step size falls to zero."""
    seed: int = 0
    """Of weights and data."""


def train(options: TrainTinyOptions, *, run_dir: str | None = None, accelerator: str = "auto") -> Path:
    """Train one tiny model, resuming from the run folder where there is something, and save it in float16.

    Args:
        options: the model.
        run_dir: checkpoints (default: runs/train_tiny/<family>/<name>).
        accelerator: Lightning's: cpu, gpu or auto.

    Returns:
        The model's folder.
    """
    family = FAMILIES[options.family]
    folder = Path(run_dir or Path("runs/train_tiny") / options.family / Path(options.name).name)
    L.seed_everything(options.seed, verbose=False)
    module = _module(options, torch.device("cpu" if accelerator == "cpu" or not torch.cuda.is_available() else "cuda"))
    bar = RichProgressBar()
    checkpoints = ModelCheckpoint(folder, every_n_train_steps=100, save_last=True, filename="{step}")
    trainer = L.Trainer(
        max_steps=min(options.max_steps, options.stop_at or options.max_steps),
        max_epochs=-1,
        accelerator=accelerator,
        devices=1,
        logger=False,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        callbacks=[bar, checkpoints],
    )
    last = folder / "last.ckpt"
    trainer.fit(module, ckpt_path=str(last) if last.is_file() else None)
    output = ASSETS / options.family / options.name if "/" not in options.name else Path(options.name)
    if isinstance(module, TinyTaught) and module.adapter[0] is not None:
        module.adapter[0].save_pretrained(str(output), save_embedding_layers=False)
        return output
    if isinstance(module.model, LlamaForCausalLM) and module.model.generation_config is not None:
        module.model.generation_config.max_new_tokens = family.max_new_tokens
    save(module.model, output)
    build_tokenizer(family).save_pretrained(output)
    return output


def save(model: PreTrainedModel, output: Path) -> None:
    """Save weights in float16 as safetensors; the models run in float32."""
    model.cpu().half().save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)


def _module(options: TrainTinyOptions, device: torch.device) -> TinyPretraining | TinyJudge | TinyTaught:
    if options.taught is not None:
        return _taught(options, options.taught, device)
    return _judge(options) if options.judge is not None else _language_model(options)


def _taught(options: TrainTinyOptions, taught: TaughtOptions, device: torch.device) -> TinyTaught:
    family = options.family
    if taught.lora is not None and "/" not in options.name:
        raise UserError("name", "a folder to save the adapter to", f"'{options.name}'", "Write ./it.")
    problems = [] if taught.problems is None else _problems(taught.problems)
    policy = _policy(taught.policy, family, device, "taught.policy")
    name, argument = qualified(taught.judge, family), "taught.judge"
    judge, tokenizer = load_classifier(name, RewardOptions(), device=device, argument=argument)
    proposer, _ = load_classifier(name, RewardOptions(), device=device, argument=argument)
    # fused attention has no second derivative
    proposer.set_attn_implementation("eager")
    check_shared_vocabulary(policy.tokenizer, tokenizer, argument=argument)
    reward, adapter = SequenceClassifierReward(judge, tokenizer, proposer=proposer), None
    if taught.lora is not None:  # after the reward has frozen the copy's own weights
        adapter = build_adapter(proposer, taught.lora, seed=options.seed, argument="taught.lora")
    return TinyTaught(
        reward, policy, FAMILIES[family], alternatives=taught.alternatives, problems=problems,
        max_new_tokens=taught.max_new_tokens, adapter=adapter, **_schedule(options),
    )  # fmt: skip


def _problems(path: str) -> list[Problem]:
    try:
        return read_jsonl(path)[0]
    except UserError as error:
        raise error.renamed(lambda name: "taught.problems" if name == "data.path" else name) from error


def _policy(name: str, family: str, device: torch.device, setting: str) -> Policy:
    """The language model that a setting names; a bare name is that of the family's own."""
    try:
        return load_policy(qualified(name, family), device=device, argument=setting)
    except UserError as error:
        raise error.renamed(lambda option: option.removesuffix(".name")) from error


def _language_model(options: TrainTinyOptions) -> TinyPretraining:
    family, shape = FAMILIES[options.family], options.shape
    tokenizer = build_tokenizer(family)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        pad_token_id=special_id(tokenizer, "pad"),
        bos_token_id=special_id(tokenizer, "bos"),
        eos_token_id=special_id(tokenizer, "eos"),
    )
    return TinyPretraining(LlamaForCausalLM(config), tokenizer, family, **_schedule(options))


def _not_a_llama(option: str, model: PreTrainedModel) -> UserError:
    return UserError(
        option,
        "a Llama model, whose layers can be added to",
        f"a {type(model).__name__}",
        "Use a Llama model, or teach a judge that is there already (docs/taught_judge.md).",
    )


def _judge(options: TrainTinyOptions) -> TinyJudge:
    assert options.judge is not None
    cpu = torch.device("cpu")
    family, group = options.family, "judge"
    policy = _policy(options.judge.policy, family, cpu, f"{group}.policy")
    base = _policy(options.judge.base, family, cpu, f"{group}.base").backbone.model
    if not isinstance(base, LlamaForCausalLM):
        raise _not_a_llama(f"{group}.base", base)
    if options.judge.start is None:
        judge = judge_from_language_model(base, options.judge.extra_layers)
    else:
        start = qualified(options.judge.start, family)
        judge, _ = load_classifier(start, RewardOptions(), device=cpu, argument=f"{group}.start")
        if not isinstance(judge, LlamaForSequenceClassification):
            raise _not_a_llama(f"{group}.start", judge)
        judge = with_fresh_layers(judge, options.judge.extra_layers)
        judge.requires_grad_(True)
    return TinyJudge(
        judge,
        base,
        policy,
        FAMILIES[family],
        agreement_steps=options.judge.agreement_steps,
        base_learning_rate=options.judge.base_learning_rate,
        answer_weight=options.judge.answer_weight,
        slips=options.judge.slips,
        agreement_weight=options.judge.agreement_weight,
        **_schedule(options),
    )


def _schedule(options: TrainTinyOptions) -> dict:
    names = ("batch_size", "learning_rate", "warmup", "decay", "max_steps", "seed")
    return {name: getattr(options, name) for name in names}


def main(arguments: list[str]) -> int:
    """Train one model, or evaluate a family's models and write their card."""
    parser = ArgumentParser(
        prog="nabla-rl train-tiny",
        description=(
            "Make one of the embedded tiny models, or (--card) measure a family's models and write their card."
        ),
        exit_on_error=False,
    )
    parser.add_argument("--config", action="config", help="Name or path of a YAML file, such as words/tiny-policy.")
    parser.add_class_arguments(TrainTinyOptions, "model")
    parser.add_argument(
        "--run_dir", type=str, default=None, help="Folder of checkpoints; null is runs/train_tiny/<family>/<name>."
    )
    parser.add_argument("--accelerator", type=str, default="auto", help="Device: cpu, gpu or auto.")
    parser.add_argument("--card", type=str, default=None, help="Family whose card is measured and written instead.")
    parser.add_argument("--card_problems", type=int, default=400, help="Number of test problems for the card.")
    if not arguments:
        parser.print_help()
        return 0
    with spelling(parser):
        return run(parser, with_found_configs(arguments, "train_tiny"))


def run(parser: ArgumentParser, arguments: list[str]) -> int:
    """What the command line asks for."""
    card = _value_of(arguments, "--card")
    if card is not None:
        if card not in FAMILIES:
            raise UserError("card", f"one of {', '.join(FAMILIES)}", repr(card))
        problems = _value_of(arguments, "--card_problems") or "400"
        if not problems.isdigit() or not int(problems):
            raise UserError("card_problems", "a whole number of at least 1", repr(problems))
        print(write_card(FAMILIES[card], ASSETS / card, num_problems=int(problems)))  # noqa: T201
        return 0
    config = parser.parse_args(arguments)
    options = parser.instantiate(config)["model"]
    output = train(options, run_dir=config.run_dir, accelerator=config.accelerator)
    print(f"saved to {output}")  # noqa: T201
    return 0


def _value_of(arguments: list[str], name: str) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == name and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
    return None
