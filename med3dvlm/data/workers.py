"""Processes that work on tasks and may die: one pipe each, so that it is known which task a death belongs to."""

import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from med3dvlm.data.command import TERMINATED, end_tidily

_END = "end of task"  # what a worker sends after the last result of a task
_PATIENCE = 10  # seconds for a worker to end, whose native code may have to return first


@dataclass(frozen=True)
class Death:
    """A worker ended in the middle of a task. results: how many it had sent. cause: what the system says of its end."""

    results: int
    cause: str


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection
    task: Any = None
    results: int = 0


def run_tasks(make: Callable[[], Callable], tasks: Iterable, count: int) -> Iterator[tuple[Any, Any]]:
    """Yield (task, result) for every result of every task, in the order in which they arrive.

    make: called once in each process; what it returns takes a task and gives an iterator of results.
    count: processes. With 1, this process does the work itself, and dies where a worker would.
    A worker that dies gives (task, Death), and another one takes its place. Closing the generator ends the workers in
    the middle of their tasks, whose results nobody would hear of; what they had in temporary files is removed. They end
    so, too, when this process is gone, however it ended.
    """
    if count == 1:
        work = make()
        yield from ((task, result) for task in tasks for result in work(task))
        return
    tasks = iter(tasks)
    workers: list[_Worker] = []
    try:
        for task in (task for _, task in zip(range(count), tasks, strict=False)):
            workers.append(_start(make))
            _hand_out(workers[-1], task)
        while workers:
            ready = wait([worker.pipe for worker in workers])
            for worker in [worker for worker in workers if worker.pipe in ready]:
                yield from _receive(worker, workers, tasks, make)
    finally:
        _stop(workers)


def _start(make: Callable) -> _Worker:
    # Fresh processes: a fork of a process that already runs threads may hang, and would keep the others' pipes open.
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, make), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _serve(pipe: Connection, make: Callable) -> None:
    """The life of a worker: until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group; the first process decides
    end_tidily()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work = make()
    try:
        while True:
            for result in work(pipe.recv()):
                pipe.send(result)
            pipe.send(_END)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody waits any more


def _end_with_parent() -> None:
    parent_process().join()
    signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)


def _hand_out(worker: _Worker, task) -> None:
    worker.task, worker.results = task, 0
    try:
        worker.pipe.send(task)
    except (BrokenPipeError, ConnectionResetError):
        pass  # it is dead: the next receive says so


def _receive(worker: _Worker, workers: list[_Worker], tasks: Iterator, make: Callable) -> Iterator[tuple[Any, Any]]:
    """Take one message, pass it on, and give the worker (or the one in its place) the next task."""
    try:
        message = worker.pipe.recv()
    except (EOFError, ConnectionResetError):
        worker.pipe.close()
        worker.process.join()
        workers.remove(worker)
        yield worker.task, Death(worker.results, _cause(worker.process.exitcode))
        message, worker = _END, None
    if message != _END:
        worker.results += 1
        yield worker.task, message
        return
    task = next(tasks, _END)
    if task == _END:
        if worker is not None:
            worker.pipe.close()
            workers.remove(worker)
            worker.process.join(_PATIENCE)
        return
    if worker is None:
        worker = _start(make)
        workers.append(worker)
    _hand_out(worker, task)


def _cause(code: int | None) -> str:
    if code == TERMINATED:
        code = -signal.SIGTERM
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = ", as the system does when memory runs out" if name == "SIGKILL" else ""
        return f"its process was ended by {name}{hint}"
    return f"its process ended with exit code {code}; see the messages above"


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        worker.process.terminate()
        worker.pipe.close()
    for worker in workers:
        worker.process.join(_PATIENCE)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
