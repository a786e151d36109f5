"""Prompts are written by the tokenizer's own chat template, where it has one."""

from __future__ import annotations

import pytest

from nabla_rl.models.policy import Policy
from nabla_rl.models.prompts import encode_judged, encode_prompt
from nabla_rl.types import UserError
from tests import toys_hf as toys


@pytest.mark.parametrize("system_prompt", [None, "sort"])
def test_a_prompt_is_the_chat_template(system_prompt: str | None):
    """Policy prompts equal apply_chat_template with a generation prompt, the system turn included."""
    tokenizer = toys.chat_tokenizer()
    policy = Policy(toys.build_llama(), tokenizer, system_prompt=system_prompt)
    turns = [{"role": "user", "content": "cab"}]
    if system_prompt:
        turns = [{"role": "system", "content": system_prompt}, *turns]
    expected = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=True)["input_ids"]
    assert policy.encode_prompt("cab") == list(expected)
    assert expected[0] == tokenizer.bos_token_id and tokenizer.decode(expected).endswith("assistant\n")


@pytest.mark.parametrize("system_prompt", [None, "sort"])
def test_a_judged_conversation_is_the_chat_template(system_prompt: str | None):
    """What stands before and after a completion that ended is what the template writes around an assistant's turn."""
    tokenizer = toys.chat_tokenizer()
    before, after = encode_judged(tokenizer, "cab", system_prompt=system_prompt)
    turns = [{"role": "user", "content": "cab"}, {"role": "assistant", "content": "abc"}]
    if system_prompt:
        turns = [{"role": "system", "content": system_prompt}, *turns]
    expected = tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"]
    completion = tokenizer("abc", add_special_tokens=False).input_ids
    assert [*before, *completion, tokenizer.eos_token_id, *after] == list(expected)
    assert after == tokenizer("\n", add_special_tokens=False).input_ids


def test_without_a_template_a_prompt_is_the_problem_and_a_line_break():
    """A base model's prompt is its text with the tokenizer's special tokens, for policy and judge alike."""
    tokenizer = toys.tokenizer()
    expected = [tokenizer.bos_token_id, *tokenizer("cab\n", add_special_tokens=False).input_ids]
    assert encode_prompt(tokenizer, "cab") == expected
    assert encode_judged(tokenizer, "cab") == (expected, [])


@pytest.mark.parametrize("encode", [encode_prompt, encode_judged])
@pytest.mark.parametrize("made", [toys.tokenizer, toys.chat_tokenizer])
def test_an_empty_problem_is_refused(encode, made):
    """A problem of blanks is an error with or without a template."""
    with pytest.raises(UserError, match="problem: expected a non-empty text"):
        encode(made(), " \n")


@pytest.mark.parametrize("encode", [encode_prompt, encode_judged])
def test_a_system_prompt_needs_a_template(encode):
    """A system prompt that no template would write is an error, for policy and judge, not dropped in silence."""
    with pytest.raises(UserError, match="system_prompt: expected a tokenizer with a chat template"):
        encode(toys.tokenizer(), "cab", system_prompt="sort")
