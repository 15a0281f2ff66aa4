"""`python -m engine.constraints`: see runner.py."""

from engine.constraints.runner import main

main()
