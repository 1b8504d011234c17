"""Python processes that need not import torch and transformers: forked from one that has.

`Popen` is `subprocess.Popen` but for where the process comes from. What it starts is a process like any other, with an id, a session,
a folder, an environment and streams of its own, that signals reach and that ends as Python ends. Only libraries are imported beforehand:
merge_lab is imported by each process anew. What a fork could not do alike is started as ever: other programs, other options of Python, an
environment that a library reads while it is imported. Tests of what is imported must not use it.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from pathlib import Path

LIBRARIES = "numpy torch transformers transformers.trainer peft accelerate datasets pandas safetensors.torch torch.distributed.run"
READ_AT_START = ("HF_", "HUGGINGFACE", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONWARNINGS", "TQDM_", "TRANSFORMERS_")
PLAIN = subprocess.Popen
_server = None  # the process that forks, and the folder of its socket
_place = None  # its socket, and what it has read of its environment


def read_at_start(environment) -> dict:
    "What libraries read of an environment while they are imported."
    return {name: value for name, value in environment.items() if name.startswith(READ_AT_START)}


def words_of_python(args) -> list[str] | None:
    "What follows `python` in a command that a fork can run; none for another."
    if isinstance(args, (str, bytes)) or sys.platform != "linux":
        return None
    program, *words = map(os.fspath, args)
    if program == sys.executable:
        first = next((word for word in words if word != "-u"), "-i")
        return words if first in ("-c", "-m") or not first.startswith("-") else None
    here = Path(sys.executable).parent
    if Path(program).parent != here or not Path(program).is_file():
        return None
    told = Path(program).read_bytes().partition(b"\n")[0].decode(errors="replace")  # a script of this environment says whose it is
    return [program, *words] if told.startswith("#!") and Path(told[2:]).parent.resolve() == here.resolve() else None


def asked_at(libraries: str = LIBRARIES) -> tuple[str, dict]:
    "Where to ask for a fork; the first call starts the server, which ends when this process does."
    global _server, _place
    if _place is None or _server and read_at_start(os.environ) != _place[1]:  # what was set since then is read by a server of its own
        folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # nothing may run beside a fork
        command = [sys.executable, __file__, os.path.join(folder.name, "forks"), libraries]
        server = PLAIN(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True)
        assert server.stdout.readline() == b"listens\n"
        _server, _place = (server, folder), (command[2], read_at_start(environment))
    return _place


class Popen(PLAIN):
    "A process that is forked where that does the same as starting it."

    _status = None  # where the end of a forked process is told

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others):
        words = None if executable or preexec_fn or pass_fds or shell else words_of_python(args)
        environment = dict(os.environ if env is None else env)
        if not words or read_at_start(environment) != asked_at()[1]:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, startupinfo, creationflags, shell, *others)
        pipes = others[:6]  # of stdin to read and write, of stdout, of stderr
        streams = [own if own != -1 else number for number, own in enumerate((pipes[0], pipes[3], pipes[5]))]
        request = json.dumps(dict(words=words, cwd=os.fspath(cwd or os.getcwd()), environment=environment)).encode()
        self._status = socket.socket(socket.AF_UNIX)
        self._status.connect(asked_at()[0])
        socket.send_fds(self._status, [len(request).to_bytes(4, "big")], streams)
        self._status.sendall(request)
        self.pid = number_from(self._status)
        self._child_created = True
        self._close_pipe_fds(*pipes)

    def poll(self):
        if self._status is None:
            return super().poll()
        with self._waitpid_lock:
            if self.returncode is None and select.select([self._status], [], [], 0)[0]:
                self.returncode = number_from(self._status)
        return self.returncode

    def wait(self, timeout=None):
        if self._status is None:
            return super().wait(timeout)
        if self.returncode is None and not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def __del__(self, *args, **options):
        if self._status is not None:
            self._status.close()
        super().__del__(*args, **options)


def bytes_from(connection: socket.socket, size: int) -> bytes:
    found = connection.recv(size, socket.MSG_WAITALL)
    if len(found) < size:
        raise EOFError("the process that forks has ended")
    return found


def number_from(connection: socket.socket) -> int:
    return int.from_bytes(bytes_from(connection, 4), "big", signed=True)


# What the server does


def serve(path: str, libraries: str) -> dict:
    "Fork whenever that is asked. Returns in each fork, with what it was asked for."
    global _place
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(64)
        print("listens", flush=True)
        _place = path, read_at_start(os.environ)
        subprocess.Popen = Popen  # of what is forked, too: torchrun starts its workers so
        for name in libraries.split():
            importlib.import_module(name)
        assert len(os.listdir("/proc/self/task")) == 1, "a thread would be missing in what is forked"
        gc.collect()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
        while True:
            if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
                os._exit(0)  # who started it is gone
            connection, _ = listener.accept()
            if os.fork() == 0:
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return keep(connection)


def keep(connection: socket.socket) -> dict:
    "Fork, and wait in the parent to tell the end. Returns in the child."
    size, streams, _, _ = socket.recv_fds(connection, 4, 3)
    request = json.loads(bytes_from(connection, int.from_bytes(size, "big")))
    process = os.fork()
    if process:
        for stream in streams:
            os.close(stream)  # or a pipe would not end with the process
        connection.sendall(process.to_bytes(4, "big"))
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        with contextlib.suppress(BrokenPipeError):  # who asked was killed
            connection.sendall(code.to_bytes(4, "big", signed=True))
        os._exit(0)
    connection.close()
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return request


def become(words: list[str], cwd: str, environment: dict):
    "Run a Python command as if Python had been started with it."
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.modules["numpy"].random.seed()
    if words[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        words = words[1:]
    if words[0] == "-c":
        sys.argv, sys.path[0] = ["-c", *words[2:]], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), main.__dict__)  # noqa: S102
    elif words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], cwd
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, os.path.dirname(os.path.abspath(words[0]))
        runpy.run_path(words[0], run_name="__main__")


def end(code: int):
    "As Python ends, but for taking apart all that was imported: that would copy it first."
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(request: dict):
    "Run what was asked for, to its end."
    try:
        become(**request)
        code = None
    except SystemExit as error:
        code = error.code
    except BaseException:  # noqa: BLE001
        sys.excepthook(*sys.exc_info())
        code = 1
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    end((code or 0) & 255)


if __name__ == "__main__":
    run(serve(*sys.argv[1:]))
