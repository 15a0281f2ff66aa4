"""Systems under measurement; `base` is the contract."""
