"""Work in processes that may die: items of a data set, in order, made ahead of their use.

A decoder may abort its process on a damaged file, or never return. torch's DataLoader ends the run
then; here the item is lost, its process is replaced, and the rest goes on. Items travel as bytes
through pipes: nothing lies in /dev/shm, and no item holds a file descriptor.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
from collections.abc import Iterator, Sequence
from queue import Queue
from threading import Thread

import torch

AHEAD = 4               # items of each process that wait here for their use


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def work(dataset, indices: Sequence[int], pipe, limit: float) -> None:
    """A process' life: makes an item and sends it, which waits until it is read (or small)."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)       # the parent heeds what ends a run
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)       # ends this process, also in a decoder
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    Thread(target=end_with_parent, daemon=True).start()
    for index in indices:
        signal.setitimer(signal.ITIMER_REAL, limit)
        item = pickle.dumps(dataset[index], pickle.HIGHEST_PROTOCOL)
        signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(item)


def receive(pipe, ready: Queue) -> None:
    """A thread's life: takes a process' items as they come; None when it has ended."""
    try:
        while True:
            ready.put(pipe.recv_bytes())
    except (EOFError, OSError):
        ready.put(None)


def start(dataset, indices: Sequence[int], limit: float) -> tuple:
    """A process, and the queue to which the items of its indices will come."""
    ours, theirs = multiprocessing.Pipe(duplex=False)
    task = (dataset, indices, theirs, limit)
    process = multiprocessing.Process(target=work, args=task, daemon=True)
    process.start()
    theirs.close()                                      # else its end would not be seen
    atexit.register(process.kill)                       # before multiprocessing waits for it
    ready: Queue = Queue(AHEAD)
    Thread(target=receive, args=(ours, ready), daemon=True).start()
    return process, ready


def why_lost(index: int, code: int, limit: float) -> str:
    """What an exit code means. RuntimeError where the data set raised: a mistake in the program."""
    if code > 0:
        raise RuntimeError(f"item {index}: its process printed the error above")
    if code == -signal.SIGALRM:
        return f"decoding took more than {limit:g} s"
    return f"decoding ended its process: {signal.strsignal(-code) if code else 'unasked'}"


def loader(dataset, indices: Sequence[int], workers: int, limit: float = 120.0) -> Iterator:
    """Items dataset[i] in the order of `indices`; each process is some AHEAD of what is used. An
    item that ends its process, or takes more than `limit` seconds, is dataset.lost(i, reason).
    workers: processes; 0: in this one, unprotected. `dataset` must be picklable. No process is left
    when the iterator ends, is closed or forgotten, or when the parent dies."""
    workers = min(workers, len(indices))
    if workers == 0:
        yield from map(dataset.__getitem__, indices)
        return
    team = [start(dataset, indices[first::workers], limit) for first in range(workers)]
    try:
        for turn, index in enumerate(indices):
            process, ready = team[turn % workers]
            sent = ready.get()
            if sent is None:                            # it ended before it had sent the item
                process.join()
                reason = why_lost(index, process.exitcode, limit)
                team[turn % workers] = start(dataset, indices[turn + workers::workers], limit)
                yield dataset.lost(index, reason)
            else:
                yield pickle.loads(sent)
    finally:
        for process, ready in team:
            process.kill()
            process.join()
            ready.maxsize = 1 << 30                     # lets its thread go on, and so end
            with ready.mutex:
                ready.not_full.notify_all()
