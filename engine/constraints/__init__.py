"""Constrained outputs: grammars over tokens, by llguidance. No torch: coordinators use it too.

    Constraint --schemas.py, grammar.py--> grammar text --compiler.py--> template, cached
               --copy--> Matcher: the state of one output

    schema       rewritten first, so that llguidance enforces all of it (schemas.py); a lenient
                 schema loses the parts that cannot be enforced (leniency.py)
    each step    drafts are cut to what the grammar allows, or made of what it forces;
                 masks are computed while the model runs (masks.py); they also end numbers
                 (numbers.py); accepted tokens advance the matcher

The state of a matcher is a function of its tokens: any process can rebuild it from them.
"""

from engine.constraints.checker import Checker
from engine.constraints.compiler import Compiler
from engine.constraints.grammar import Vocabulary
from engine.constraints.masks import Masks
from engine.constraints.matcher import Matcher

__all__ = ["Checker", "Compiler", "Masks", "Matcher", "Vocabulary"]
