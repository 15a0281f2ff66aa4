"""The sampler: tokens as a function of logits, history, parameters and seed."""

from engine.sampling.sampler import Sampler
from engine.scheduling.rows import SampleRow, UnusableLogits

__all__ = ["SampleRow", "Sampler", "UnusableLogits"]
