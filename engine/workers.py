"""Work in processes that may die: items of a data set, in order, decoded ahead of their use.

A decoder may abort its process on a damaged file, or never return. torch's DataLoader ends the run
then; here the item is lost, its process is replaced, and the rest goes on. Items travel as pickled
bytes through pipes: nothing lies in /dev/shm, and no item holds a file descriptor.
"""

import atexit
import multiprocessing
import os
import pickle
import signal
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Lock, Thread

import torch

STARTUP = 600.0         # seconds that a new process may take to import what it needs
STARTING = Lock()       # a fork must not inherit another's pipe: its end would never be seen


def end_with_parent() -> None:
    """Ends this process within a second of its parent, also when that was killed."""
    parent, above = multiprocessing.parent_process(), os.getppid()
    while parent.is_alive() and os.getppid() == above:
        time.sleep(1)
    os._exit(1)


def work(dataset, pipe) -> None:
    """A worker's life. The signals that end a run are the parent's business, as is CUDA."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(1)
    Thread(target=end_with_parent, daemon=True).start()
    pipe.send_bytes(b"started")
    while True:
        item = dataset[pipe.recv()]
        pipe.send_bytes(pickle.dumps(item, pickle.HIGHEST_PROTOCOL))


class Worker(Thread):
    """A thread that hands `jobs`, (index, Future) each, to a process of its own, which it replaces.

    A Future gets the item's bytes, or the reason (str) why it is lost.
    """

    def __init__(self, dataset, jobs: SimpleQueue, limit: float, context):
        super().__init__(daemon=True)
        self.dataset, self.jobs, self.limit, self.context = dataset, jobs, limit, context
        self.closed = False
        self.start_process()

    def start_process(self) -> None:
        with STARTING:
            if self.closed:
                return
            self.fresh = True
            self.pipe, theirs = self.context.Pipe()
            task = (self.dataset, theirs)
            self.process = self.context.Process(target=work, args=task, daemon=True)
            self.process.start()
            theirs.close()

    def run(self) -> None:
        for index, future in iter(self.jobs.get, None):
            try:
                future.set_result(self.answer(index))
            except (OSError, RuntimeError) as error:
                future.set_exception(error)
            if self.closed:
                return

    def answer(self, index: int) -> bytes | str:
        """The item's bytes; or why it is lost, and a new process stands ready. RuntimeError where
        the data set raised, which is a mistake in the program and not in a file."""
        try:
            if self.fresh:
                self.receive(STARTUP)
                self.fresh = False
            self.pipe.send(index)
            return self.receive(self.limit)
        except TimeoutError:
            reason = f"decoding took more than {self.limit:g} s"
        except (EOFError, OSError):
            self.process.join(10)
            code = self.process.exitcode or 0
            if code > 0:
                raise RuntimeError(f"item {index}: its process printed the error above") from None
            cause = signal.strsignal(-code) if code < 0 else "unasked"
            reason = f"decoding ended its process: {cause}"
        self.process.kill()
        self.process.join()
        self.pipe.close()
        self.start_process()
        return reason

    def receive(self, seconds: float) -> bytes:
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv_bytes()

    def close(self) -> None:
        """Ends the process and, once it has noticed, this thread."""
        with STARTING:
            self.closed = True
            self.process.kill()
        self.jobs.put(None)


def loader(dataset, indices: Sequence[int], workers: int, ahead: int = 4, limit: float = 120.0,
           method: str | None = None) -> Iterator:
    """Items dataset[i] in the order of `indices`, up to `ahead` for each worker before their use.

    An item that ends its process, or takes more than `limit` seconds, is dataset.lost(i, reason).
    workers: processes; 0 decodes in this one, unprotected. method: how they start ("fork",
    "forkserver", "spawn"; default: the platform's); but for fork, `dataset` must be picklable.
    No process is left when the iterator ends, is closed or forgotten, or when the parent dies.
    """
    if workers == 0:
        yield from map(dataset.__getitem__, indices)
        return
    jobs, waiting, pool = SimpleQueue(), deque(), []

    def close() -> None:
        for worker in pool:
            worker.close()

    def first_item():
        index, future = waiting.popleft()
        result = future.result()
        return dataset.lost(index, result) if isinstance(result, str) else pickle.loads(result)

    atexit.register(close)      # before multiprocessing's own, which would wait for the processes
    try:
        for _ in range(min(workers, len(indices))):
            pool.append(Worker(dataset, jobs, limit, multiprocessing.get_context(method)))
            pool[-1].start()
        for index in indices:
            waiting.append((index, Future()))
            jobs.put(waiting[-1])
            if len(waiting) > workers * ahead:
                yield first_item()
        while waiting:
            yield first_item()
    finally:
        close()
        for worker in pool:
            worker.join()
            worker.process.join()
        atexit.unregister(close)
