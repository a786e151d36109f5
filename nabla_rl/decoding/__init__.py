"""Decoders: one file each, one contract (`AbstractDecoder`), every cost on the ledger."""

from nabla_rl.decoding.base import AbstractDecoder, Candidate, Decoded, Edit, Sampling
from nabla_rl.decoding.best_of_n import BestOfN
from nabla_rl.decoding.nabla import Nabla
from nabla_rl.decoding.sampling import Greedy, Sample
from nabla_rl.decoding.self_consistency import SelfConsistency

__all__ = [
    "AbstractDecoder",
    "BestOfN",
    "Candidate",
    "Decoded",
    "Edit",
    "Greedy",
    "Nabla",
    "Sample",
    "Sampling",
    "SelfConsistency",
]
