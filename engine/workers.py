"""Work in processes that may die: items of a data set, in order, made ahead of their use.

A decoder may abort its process on a damaged file, or never return. torch's DataLoader ends the run
then; here the item is lost, its process is replaced, and the rest goes on. Items travel as pickled
bytes through pipes: nothing lies in /dev/shm, and no item holds a file descriptor.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

import torch


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(dataset, pipe, limit: float) -> None:
    """A process' life: make the items asked for, in order, or be ended by an alarm."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # the parent heeds what ends a run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)       # ends this process, also in a decoder
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    Thread(target=end_with_parent, daemon=True).start()
    while True:
        index = pipe.recv()
        signal.setitimer(signal.ITIMER_REAL, limit)
        item = pickle.dumps(dataset[index], pickle.HIGHEST_PROTOCOL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(item)


def take_in(pipe, made: SimpleQueue) -> None:
    """Keeps a pipe empty, so that its process can go on ahead; None where the process ended."""
    with suppress(EOFError, OSError):
        while True:
            made.put(pipe.recv_bytes())
    made.put(None)


class Worker:
    """A process, replaced when it dies, and the indices whose items it still owes."""

    def __init__(self, dataset, limit: float):
        self.dataset, self.limit, self.owed = dataset, limit, deque()
        self.start()

    def start(self) -> None:
        self.pipe, theirs = multiprocessing.Pipe()
        task = (self.dataset, theirs, self.limit)
        self.process = multiprocessing.Process(target=work, args=task, daemon=True)
        self.process.start()
        theirs.close()                                  # else its end would not be seen
        atexit.register(self.process.kill)              # before multiprocessing waits for it
        self.made = SimpleQueue()
        Thread(target=take_in, args=(self.pipe, self.made), daemon=True).start()
        owed, self.owed = self.owed, deque()
        for index in owed:
            self.ask(index)

    def ask(self, index: int) -> None:
        self.owed.append(index)
        with suppress(OSError):                         # of a dead process: `take` will see it
            self.pipe.send(index)

    def take(self):
        """The item owed the longest; what stands for it where it ended its process, since items
        are made and sent one by one; RuntimeError where the data set raised."""
        index, item = self.owed.popleft(), self.made.get()
        if item is not None:
            return pickle.loads(item)
        self.process.join()
        code = self.process.exitcode
        if code > 0:
            raise RuntimeError(f"item {index}: its process printed the error above")
        cause = signal.strsignal(-code) if code else "unasked"
        reason = f"decoding ended its process: {cause}"
        if code == -signal.SIGALRM:
            reason = f"decoding took more than {self.limit:g} s"
        self.start()
        return self.dataset.lost(index, reason)


def loader(dataset, indices: Sequence[int], workers: int, ahead: int = 4,
           limit: float = 120.0) -> Iterator:
    """Items dataset[i] in the order of `indices`, up to `ahead` for each worker before their use.

    An item that ends its process, or takes more than `limit` seconds, is dataset.lost(i, reason).
    workers: processes; 0 decodes in this one, unprotected. `dataset` must be picklable. No process
    is left when the iterator ends, is closed or forgotten, or when the parent dies.
    """
    if workers == 0:
        yield from map(dataset.__getitem__, indices)
        return
    pool, room = [], workers * ahead
    try:
        for _ in range(min(workers, len(indices))):
            pool.append(Worker(dataset, limit))
        for turn in range(len(indices) + room):
            if turn < len(indices):
                pool[turn % len(pool)].ask(indices[turn])
            if turn >= room:
                yield pool[(turn - room) % len(pool)].take()
    finally:
        for worker in pool:
            worker.process.kill()
            worker.process.join()
