"""Jobs for the processes of constraints, which import them by name."""

from __future__ import annotations

import os
import time

from llguidance import LLTokenizer

from engine.constraints.grammar import Grammar


def pid(_tokenizer: LLTokenizer) -> Grammar:
    return Grammar(str(os.getpid()))


def sized(_tokenizer: LLTokenizer, text: str) -> Grammar:
    return Grammar(text)


def burn(_tokenizer: LLTokenizer) -> Grammar:
    while True:
        pass


def hog(_tokenizer: LLTokenizer) -> Grammar:
    kept = []
    while True:
        kept.append(bytearray(8 << 20))


def crash(_tokenizer: LLTokenizer) -> Grammar:
    os.kill(os.getpid(), 11)
    time.sleep(60)  # the signal may go to another thread, which has to run first
    return Grammar()


def fail(_tokenizer: LLTokenizer) -> Grammar:
    raise RuntimeError("as a library may")
