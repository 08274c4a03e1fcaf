"""Ctrl-C in one line, at any moment of `python train.py`: while it imports, learns, or is wound up.

What this is: two signal handlers. Imports nothing large, so that they are in place before torch is imported.
Which STEPs: none.
"""
import os
import shlex
import signal
import sys

GO_ON = [f"go on with: {shlex.join(['python', 'train.py', *sys.argv[1:]])}"]  # what at_once() says


def at_once(*_):
    """Ctrl-C before there is a run, or while one is being wound up: one line, and the end.

    Not an exception: one in the middle of an import may come out of it as another.
    """
    # trap: not print(), in the middle of which the signal may have come
    os.write(2, f"\ntrain.py: interrupted [nothing is lost; {GO_ON[-1]}]\n".encode(errors="replace"))
    os._exit(130)  # as shells call a program that Ctrl-C ended


def in_order(*_):
    """Ctrl-C while a run learns: it is wound up, unless a second one comes."""
    signal.signal(signal.SIGINT, at_once)
    raise KeyboardInterrupt


def handle():
    """From now on Ctrl-C is answered in one line."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, at_once)


def wind_up(go_on):
    """From now on Ctrl-C ends a run in good order, if handle() was called. go_on: how the run is taken up again."""
    GO_ON.append(go_on)
    if signal.getsignal(signal.SIGINT) is at_once:
        signal.signal(signal.SIGINT, in_order)


def hand_back():
    """Ctrl-C is the system's again: an end without a word."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
