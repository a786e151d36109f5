"""How a problem becomes a prompt: by the tokenizer's chat template where it has one, else the problem and a line
break."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from nabla_rl.types import UserError

COMPLETION_MARK = "\u241fcompletion\u241f"


def encode_prompt(tokenizer: PreTrainedTokenizerBase, problem: str, *, system_prompt: str | None = None) -> list[int]:
    """Ids of the prompt that asks `problem`, ready for a completion to follow.

    Raises:
        UserError: the problem is empty, or a system prompt is given to a tokenizer without a chat template.
    """
    check_problem(tokenizer, problem, system_prompt)
    if tokenizer.chat_template is None:
        return list(tokenizer(f"{problem}\n").input_ids)
    text = tokenizer.apply_chat_template(_turns(problem, system_prompt), tokenize=False, add_generation_prompt=True)
    return list(tokenizer(str(text), add_special_tokens=False).input_ids)


def encode_judged(
    tokenizer: PreTrainedTokenizerBase, problem: str, *, system_prompt: str | None = None
) -> tuple[list[int], list[int]]:
    """Ids before and after the completion in the conversation that a reward model reads.

    The second list is what its own template writes after an assistant's turn, without a leading end-of-sequence
    token (a finished completion already ends with it).
    """
    if tokenizer.chat_template is None:
        return encode_prompt(tokenizer, problem, system_prompt=system_prompt), []
    check_problem(tokenizer, problem, system_prompt)
    turns = [*_turns(problem, system_prompt), {"role": "assistant", "content": COMPLETION_MARK}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    before, _, after = text.partition(COMPLETION_MARK)
    tail = list(tokenizer(after, add_special_tokens=False).input_ids)
    if tail[:1] == [tokenizer.eos_token_id]:
        tail = tail[1:]
    return list(tokenizer(before, add_special_tokens=False).input_ids), tail


def special_id(tokenizer: PreTrainedTokenizerBase, name: str) -> int | None:
    """The id of a special token ("pad", "bos", "eos") of a tokenizer; None where it has none."""
    value = getattr(tokenizer, f"{name}_token_id")
    return value if isinstance(value, int) else None


def check_problem(tokenizer: PreTrainedTokenizerBase, problem: str, system_prompt: str | None) -> None:
    """Refuse what cannot be asked."""
    if not problem.strip():
        raise UserError("problem", "a non-empty text", "an empty one", "Remove it or fill it in.")
    if system_prompt and tokenizer.chat_template is None:
        raise UserError(
            "system_prompt", "a tokenizer with a chat template", "one without", "Leave the system prompt out."
        )


def _turns(problem: str, system_prompt: str | None) -> list[dict[str, str]]:
    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    return [*system, {"role": "user", "content": problem}]
