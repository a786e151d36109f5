"""Decoders: one file each, one contract (`AbstractDecoder`), every cost on the ledger."""

from nabla_rl.budget import Budget, Point
from nabla_rl.decoding.base import AbstractDecoder, Candidate, Decoded, Edit, Setting
from nabla_rl.decoding.beam import BeamSearch
from nabla_rl.decoding.best_of_n import BestOfN
from nabla_rl.decoding.edit_search import EditSearch
from nabla_rl.decoding.mcts import MCTS
from nabla_rl.decoding.nabla import Nabla
from nabla_rl.decoding.sampling import Greedy, Sample
from nabla_rl.decoding.self_consistency import SelfConsistency
from nabla_rl.models.sampling import Sampling

DECODERS: dict[str, type[AbstractDecoder]] = {
    decoder.name: decoder
    for decoder in (Greedy, Sample, BestOfN, SelfConsistency, BeamSearch, MCTS, Nabla, EditSearch)
}
"""Every decoder by its name."""

__all__ = [
    "DECODERS",
    "AbstractDecoder",
    "BeamSearch",
    "BestOfN",
    "Budget",
    "Candidate",
    "Decoded",
    "Edit",
    "EditSearch",
    "Greedy",
    "MCTS",
    "Nabla",
    "Point",
    "Sample",
    "Sampling",
    "SelfConsistency",
    "Setting",
]
