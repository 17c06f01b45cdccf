"""Sampling: logits rows to tokens, candidates, scores and log-probabilities."""

from octavo.sampling.sampler import Sampler

__all__ = ["Sampler"]
