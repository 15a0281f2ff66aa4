"""The sampler: tokens as a function of logits, history, parameters and seed."""

from engine.sampling.row import SampleRow, UnusableLogits
from engine.sampling.sampler import Sampler

__all__ = ["SampleRow", "Sampler", "UnusableLogits"]
