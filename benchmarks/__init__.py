"""Measurements: our stack and its peers on the same machine, with the same prompts."""
