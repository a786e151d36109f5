"""The noisy siblings of DTO: Markov chains for the tilted policy, with the same `init` and `step`. Needs torch
alone."""
