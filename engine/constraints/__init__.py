"""Constrained answers: grammars over tokens, by llguidance. No torch here: coordinators check, too.

    Constraint --compile, in threads of its own--> a grammar, cached --copy--> Matcher: one answer's
                                                                                place in it
    a schema is mended first, so that all that it says is held (schemas.py); where it need not be
    held as a whole, what cannot be is left out (leniency.py)
    a step   drafts are cut by it, or made of what it forces
             masks of all positions that may give a token, while the model computes; numbers come
             to an end by them (numbers.py)
             tokens that stand move it on; where nothing can follow, the answer ends

A matcher is a function of the tokens it has been given: whoever has those can make it again.
"""

from engine.constraints.checker import Checker
from engine.constraints.compiler import Compiler
from engine.constraints.grammar import Vocabulary
from engine.constraints.masks import Masks
from engine.constraints.matcher import Matcher

__all__ = ["Checker", "Compiler", "Masks", "Matcher", "Vocabulary"]
