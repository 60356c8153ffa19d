"""A data set whose items end or hold up their process; in a file of its own, so that a process
started by "spawn" need not import a test."""

import faulthandler
import os
import signal
import time


def endless(index):
    while True:
        time.sleep(60)


def abort(index):
    faulthandler.disable()                              # pytest's would print a page
    os.abort()


def wrong(index):
    raise KeyError(f"a mistake in the program, at {index}")


FAULTS = {"abort": abort, "endless": endless, "wrong": wrong,
          "killed": lambda index: os.kill(os.getpid(), signal.SIGKILL),
          "asked": lambda index: os.kill(os.getpid(), signal.SIGTERM)}


class Faulty:
    """[index] -> (index, the process' id, `size` bytes), but for the faults {index: name}."""

    def __init__(self, faults, folder=None, size=0):
        self.faults, self.folder, self.size = faults, folder, size

    def __getitem__(self, index):
        if self.folder:
            (self.folder / f"{index}").write_text(str(os.getpid()))
        if index in self.faults:
            FAULTS[self.faults[index]](index)
        return index, os.getpid(), bytes(self.size)

    def lost(self, index, reason):
        return index, reason, b""
