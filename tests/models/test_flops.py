"""FLOP formulas against what torch counts (whole passes are in tests/test_ledger.py)."""

from __future__ import annotations

import pytest

from nabla_rl.models.flops import FlopFormula
from tests import toys_hf as toys


@pytest.mark.parametrize("build", [toys.build_llama, toys.build_qwen2, toys.build_gpt2, toys.build_classifier])
def test_only_the_blocks_linear_weights_count(build):
    """Token and position tables and the head are no part of the weights that every token is multiplied with."""
    model = build()
    outside = ("embed_tokens", "wte", "wpe", "lm_head", "score")
    expected = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and not any(o in n for o in outside))
    formula = FlopFormula.of(model)
    assert formula.block_weights == expected
    assert formula.attention_width == 2 * 16
    assert formula.head_width == (1 if build is toys.build_classifier else toys.VOCAB)


def test_tied_embeddings_count_once_and_only_as_a_head():
    """With tied input and output embeddings the blocks' weights are the same as without."""
    tied, untied = (toys.build_qwen2(tie_word_embeddings=tie) for tie in (True, False))
    assert FlopFormula.of(tied) == FlopFormula.of(untied)
