"""Workers that die are noticed, named and replaced; the others go on."""

import os
import signal
import time

import pytest

from med3dvlm.data.workers import Death, run_tasks


def twice():
    """Two results a task; the tasks "kill" and "fail" end the process after the first, "wait" takes a while."""

    def work(task):
        yield task, os.getpid()
        if task == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if task == "fail":
            raise SystemExit(7)
        if task == "wait":
            time.sleep(0.5)
        yield task, "done"

    return work


def test_every_result_of_every_task_arrives_whatever_dies():
    tasks = ["a", "kill", "b", "c", "fail", "d", "e"]
    results = list(run_tasks(twice, tasks, 2))
    finished = [task for task, result in results if not isinstance(result, Death) and result[1] == "done"]
    assert sorted(finished) == ["a", "b", "c", "d", "e"]
    deaths = {task: result for task, result in results if isinstance(result, Death)}
    assert deaths["kill"].results == deaths["fail"].results == 1
    assert "SIGKILL" in deaths["kill"].cause and "memory" in deaths["kill"].cause
    assert "exit code 7" in deaths["fail"].cause
    assert os.getpid() not in {result[1] for _, result in results if not isinstance(result, Death)}


def test_one_process_is_this_one():
    assert list(run_tasks(twice, ["a"], 1)) == [("a", ("a", os.getpid())), ("a", ("a", "done"))]


def test_a_task_added_after_a_death_is_done():
    class Tasks:
        todo = ["kill"]

        def __iter__(self):
            return self

        def __next__(self):
            if not self.todo:
                raise StopIteration
            return self.todo.pop()

    tasks = Tasks()
    results = []
    for _, result in run_tasks(twice, tasks, 2):
        results.append(result)
        if isinstance(result, Death):
            tasks.todo.append("again")
    assert results[-1] == ("again", "done")


def test_closing_lets_workers_end():
    results = run_tasks(twice, ["wait", "wait", "wait"], 2)
    pids = {next(results)[1][1]}
    results.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
