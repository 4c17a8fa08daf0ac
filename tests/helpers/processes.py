"""`vlp train` as one or several processes that stall where a test wants: start, wait for a line, signal, exit codes.

The processes are forked from one that has imported everything, which saves most of their time to start.
"""

import contextlib
import ctypes
import errno
import json
import os
import pathlib
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings

from helpers import runs


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Run:
    """Processes of one run, or of several runs of one process. Leaving `with` ends what still lives."""

    def __init__(
        self, config, where, num=1, stall=None, devices=1, env=None, files=None, waiting=()
    ):
        """where: the workdir; a list of them: one process in each. stall: {process: arguments of `stalled`}.
        files: {process: limits of open files}. waiting: those that wait for a second process of their run."""
        several = isinstance(where, list)
        directories = where if several else [where] * num
        self.folder = pathlib.Path(f"{directories[0]}.processes.{time.monotonic_ns()}")
        self.folder.mkdir()
        port = free_port()
        specs = []
        for i, directory in enumerate(directories):
            argv = runs.arguments(config, directory)
            if i in waiting:
                argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process", "0"]
            elif len(directories) == 1 or several:
                argv += ["--coordinator", "none"]
            else:
                argv += ["--coordinator", f"127.0.0.1:{port}", "--processes", str(num)]
                argv += ["--process", str(i)]
            out, stop = str(self.folder / f"{i}"), (stall or {}).get(i)
            limits = (files or {}).get(i)
            specs.append({"argv": argv, "out": out, "stall": stop, "files": limits})
            for kind in ("out", "err"):
                pathlib.Path(f"{out}.{kind}").touch()
        env = (
            os.environ | {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PLATFORMS": "cpu"} | (env or {})
        )
        env |= {"PYTHONPATH": f"{runs.ROOT}{os.pathsep}{runs.ROOT / 'tests'}"}
        self._parent = subprocess.Popen(
            [sys.executable, __file__, json.dumps(specs)], cwd=runs.ROOT, env=env, text=True,
            stdout=subprocess.PIPE, stderr=(self.folder / "parent").open("w"),
        )  # fmt: skip
        first = self._parent.stdout.readline()
        assert first, (self.folder / "parent").read_text()
        self.pids = json.loads(first)
        self.codes = {}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for i in set(range(len(self.pids))) - self.codes.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pids[i], signal.SIGKILL)
        self._parent.communicate(timeout=60)

    def out(self, i):
        return pathlib.Path(self.folder / f"{i}.out").read_text()

    def err(self, i):
        return pathlib.Path(self.folder / f"{i}.err").read_text()

    def await_line(self, word, i=0, secs=240):
        until = time.monotonic() + secs
        while word not in self.out(i):
            assert time.monotonic() < until and self._parent.poll() is None, self.out(i) + self.err(
                i
            )
            time.sleep(0.02)

    def send(self, number, i=0):
        os.kill(self.pids[i], number)

    def finish(self, which=None, secs=300):
        """Waits for these processes; returns their exit codes."""
        which = range(len(self.pids)) if which is None else which
        while not set(which) <= self.codes.keys():
            line = self._parent.stdout.readline()
            assert line, "the parent has ended"
            number, code = json.loads(line)
            self.codes[number] = code
        return [self.codes[i] for i in which]


def block():
    """Never returns, in C: no signal handler runs in this thread, as while XLA compiles."""
    libc, mutex = ctypes.CDLL(None), (ctypes.c_byte * 64)()
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def freeze():
    """Stops the process, once its heartbeat has told the phase."""
    time.sleep(2.0)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.1)


def fail():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "the data")


def stalled(phase, how, step):
    """Patches `vlp` so that this process stalls at a step (from 1) in a phase.

    phase: "data", "compile", "step", "eval", "batch" (each batch of an evaluation), "save". how: "block" (in C, for
    ever), "freeze" (the process), "fail" (no memory), or a number of seconds. Prints "stalled" first.
    """
    import jax

    from vlp.ckpt.manager import Checkpoints
    from vlp.data.dataset import Dataset
    from vlp.evals import io as ios
    from vlp.evals.retrieval import Retrieval

    def stall():
        print("stalled", flush=True)
        {"block": block, "freeze": freeze, "fail": fail}.get(how, lambda: time.sleep(float(how)))()

    def before(owner, name, when):
        function = getattr(owner, name)

        def patched(*args, **kwargs):
            if when(*args, **kwargs):
                stall()
            return function(*args, **kwargs)

        setattr(owner, name, patched)

    if phase == "data":
        function = Dataset.train_iter

        def train_iter(self, **kwargs):
            first = kwargs["start"] // kwargs["batch"]
            for i, batch in enumerate(function(self, **kwargs), start=first + 1):
                if i == step:
                    stall()
                yield batch

        Dataset.train_iter = train_iter
    if phase in ("compile", "step"):
        before(jax.profiler, "StepTraceAnnotation", lambda _, step_num: step_num == step)
    if phase == "eval":
        calls = iter(range(1, 1000))
        before(Retrieval, "__call__", lambda *_: next(calls) == step)
    if phase == "batch":
        before(ios.interrupt, "poll", lambda: True)
    if phase == "save":
        before(Checkpoints, "save", lambda _self, number, *_: number == step)


def end_with_parent():
    """Ends this process when the one that made it has ended, also if it is frozen."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main():
    end_with_parent()
    warnings.simplefilter("ignore")  # JAX's, about forks: it has not started here
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401

    import vlp.cli.train
    import vlp.evals.retrieval
    import vlp.train.loop  # noqa: F401
    from vlp.core import interrupt

    specs, pids = json.loads(sys.argv[1]), []
    for spec in specs:
        if pid := os.fork():
            pids.append(pid)
            continue
        end_with_parent()
        for number, kind in ((1, "out"), (2, "err")):
            os.dup2(
                os.open(f"{spec['out']}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number
            )
        sys.stdout.reconfigure(line_buffering=True)
        if spec["files"]:
            resource.setrlimit(resource.RLIMIT_NOFILE, tuple(spec["files"]))
        code = 1
        try:
            sys.argv = ["vlp", *spec["argv"]]
            interrupt.watch(sigterm=True)
            from vlp import __main__ as program

            runs.logging.root.handlers.clear()
            runs.register_toy()
            if spec["stall"]:
                stalled(*spec["stall"])
            code = program.main()
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
        os._exit(code)
    print(json.dumps(pids), flush=True)
    for _ in pids:
        pid, status = os.wait()
        print(json.dumps([pids.index(pid), os.waitstatus_to_exitcode(status)]), flush=True)


if __name__ == "__main__":
    main()
