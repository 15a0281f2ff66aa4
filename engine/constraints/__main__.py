"""`python -m engine.constraints` starts the fork server of runner.py."""

from engine.constraints.runner import main

main()
