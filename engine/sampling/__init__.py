"""The sampler: tokens as a function of logits, history, parameters and seed."""

from engine.sampling.row import SampleRow
from engine.sampling.sampler import Sampler, UnusableLogits

__all__ = ["SampleRow", "Sampler", "UnusableLogits"]
