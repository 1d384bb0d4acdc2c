"""Where a suite's runs are made: in this process, in several on this machine, or on a Ray cluster.

A run is never split: several cores or GPUs are used by several runs.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess as Process
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

import torch

from abm_vision.runs.harness import Harness, Session, silent
from abm_vision.runs.run_suite import Executor, Made, Outcome, attempt
from abm_vision.runs.settings import AdapterSettings

Attempt = Callable[[], Outcome]
PATIENCE = 10.0  # seconds that a process without its parent has to close what is open


def in_this_process(harness: Harness, configs: Sequence[AdapterSettings], session: Session) -> Made:
    """One run after another, with all that they say of themselves."""
    for config in configs:
        yield config, attempt(harness, config, session)


def _unseen(session: Session) -> Session:
    """For runs of other processes, which show nothing."""
    return replace(session, quiet=True, say=silent)


def local(jobs: int) -> Executor:
    """`jobs` processes at a time, each run in one of its own, so that even one that the system kills ends alone.

    CPU threads are shared out evenly. Runs on CUDA go to the GPUs in turn; several may share one.

    Raises:
        ValueError: fewer than one job, or more than there are cores.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not 1 <= jobs <= cores:
        raise ValueError(f"jobs is {jobs}; it must be 1 to {cores}, the cores of this machine")

    def execute(harness: Harness, configs: Sequence[AdapterSettings], session: Session) -> Made:
        fixed = next((c.device for c in configs if ":" in c.device), None)
        if fixed and jobs > 1:
            raise ValueError(f"device is {fixed} for every run, but {jobs} jobs share the GPUs out: use device auto")
        gpus, threads, context = _gpus(), max(1, cores // jobs), _context(harness)
        slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            slots.put(slot)
        children: set[Process] = set()
        stopping = Event()

        def one(config: AdapterSettings) -> Outcome:
            slot = slots.get()
            try:
                gpu = gpus[slot % len(gpus)] if gpus else None
                attempted = partial(attempt, harness, config, _unseen(session))
                return _in_child(context, attempted, threads, gpu, children, stopping)
            finally:
                slots.put(slot)

        with ThreadPoolExecutor(jobs) as pool:
            futures = {pool.submit(one, config): config for config in configs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                stopping.set()
                for future in futures:
                    future.cancel()
                for child in tuple(children):
                    child.terminate()

    return execute


def _gpus() -> list[str]:
    """The CUDA devices that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    mask = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return mask.split(",")[:count] if mask else [str(k) for k in range(count)]


def _context(harness: Harness) -> BaseContext:
    """How processes are made: on Linux copies of one that has imported everything, and is as old as the first run.

    A harness of one's own is not imported there: if its module asked for CUDA, no copy could use it.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context, module = multiprocessing.get_context("forkserver"), harness.prepare.__module__
    context.set_forkserver_preload([__name__, *[module] * module.startswith(("abm_vision.", "nlp_ext."))])
    resource_tracker.ensure_running()  # of itself it is started by the first process, and unblocks Ctrl-C there
    return context


def _in_child(
    context: BaseContext, attempted: Attempt, threads: int, gpu: str | None, children: set[Process], stopping: Event
) -> Outcome:
    receiver, sender = context.Pipe(duplex=False)
    # No daemon: those may have no loader processes of their own.
    process = context.Process(target=_child, args=(attempted, threads, gpu, dict(os.environ), sender))
    with _deaf_to_interrupts():
        process.start()
    children.add(process)
    if stopping.is_set():  # it was made while the others were being ended
        process.terminate()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        return Outcome("failed", reason=_ending(process.exitcode))
    finally:
        process.join()
        children.discard(process)


@contextmanager
def _deaf_to_interrupts() -> Iterator[None]:
    """What this thread launches takes no Ctrl-C, which a terminal sends to all: the parent ends its children itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        return f"the process was ended by signal {-code}" + (", perhaps out of memory" if code == -9 else "")
    return f"the process ended with exit code {code}"


def _child(attempted: Attempt, threads: int, gpu: str | None, environment: dict[str, str], sender: Connection) -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # closing what is open
    Thread(target=_end_with_the_parent, daemon=True).start()
    os.environ.clear()  # that of the fork server is as old as the first run
    os.environ.update(environment)
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    sender.send(attempted())


def _end_with_the_parent() -> None:
    """A parent that is killed can end nobody: its children would go on, and keep their runs locked."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(1)


def on_ray(cpus: float = 1, gpus: float = 0, address: str | None = None) -> Executor:
    """Every run a task on a Ray cluster, whose nodes must all see `out`. Runs on nodes that are lost are made again.

    Args:
        cpus, gpus: what one run takes; several runs share a GPU if it is a fraction.
        address: of the cluster; by default the one that Ray finds, or a new one on this machine.

    Raises:
        ValueError: Ray is not installed, or the cluster has too little for one run.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ValueError('--executor ray needs the package ray: pip install -e ".[ray]"') from error
    if not ray.is_initialized():
        heeding = signal.getsignal(signal.SIGTERM)
        ray.init(address=address, log_to_driver=False, include_dashboard=False)
        if callable(heeding):  # Ray has put its own in its place, which says nothing
            signal.signal(signal.SIGTERM, heeding)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(node.get("CPU", 0) >= cpus and node.get("GPU", 0) >= gpus for node in nodes):
        largest = "; ".join(f"{node.get('CPU', 0):g} CPU, {node.get('GPU', 0):g} GPU" for node in nodes)
        raise ValueError(
            f"a run is to take {cpus:g} CPU and {gpus:g} GPU, and no node of the Ray cluster has as much ({largest})"
        )

    # A lost node's lock is free, and its run is resumed from the last checkpoint.
    @ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=5)
    def remote(config: AdapterSettings, harness: Harness, session: Session) -> Outcome:
        torch.set_num_threads(max(1, int(cpus)))
        return attempt(harness, config, session)

    def execute(harness: Harness, configs: Sequence[AdapterSettings], session: Session) -> Made:
        there = replace(_unseen(session), out=Path(session.out).absolute())
        left = {remote.remote(config, harness, there): config for config in configs}
        while left:
            ready, _ = ray.wait(list(left))
            for reference in ready:
                config = left.pop(reference)
                try:
                    yield config, ray.get(reference)
                except ray.exceptions.RayError as error:
                    yield config, Outcome("failed", reason=f"Ray: {str(error).splitlines()[0]}")

    return execute
