"""What `make` does before anything else: look at the machine, then make or mend `.venv`.

    machine.py   what is here, what is missing, and the remedy of each
    venv.py      whether `.venv` can be used, and making it
    pip.py       pip with a line of progress every few seconds
    __main__.py  the order of things

The first Python in the path runs this: standard library only, syntax of Python 3.8.
"""
