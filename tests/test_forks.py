"""What tests/forks.py starts is a process like any other: streams, folder, environment, exit code and signals are its own."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

import forks

pytestmark = pytest.mark.usefixtures("forked")
TOLD = "import json, os, sys; print(json.dumps([sys.argv[1:], os.getcwd(), os.environ.get('MINE'), sys.stdin.read(), os.getpid(), os.getsid(0)]))"


def both(command, **options):
    "A process that is forked, and one that is started."
    options |= dict(capture_output=True, text=True)
    mine = subprocess.run(command, check=False, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", forks.PLAIN)
        return mine, subprocess.run(command, check=False, **options)


def python(code, *words, **options):
    process = subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    assert process._status is not None
    return process


def test_streams_words_folder_and_environment_arrive(tmp_path):
    process = python(TOLD, "a", "b c", stdin=subprocess.PIPE, cwd=tmp_path, env={**os.environ, "MINE": "1"})
    said, complained = process.communicate("in")
    words, folder, mine, read, pid, session = json.loads(said)
    assert (words, folder, mine, read, complained) == (["a", "b c"], str(tmp_path), "1", "in", "")
    assert pid == session == process.pid != os.getpid() and process.returncode == 0
    assert "MINE" not in os.environ and python(TOLD, stdin=subprocess.DEVNULL).communicate()[0].split(", ")[2] == "null"


@pytest.mark.parametrize(
    "code", ["pass", "raise SystemExit(7)", "import sys; sys.exit('told')", "raise ValueError('no')", "import os; os._exit(3)", "import os; os.abort()", "import atexit, sys; atexit.register(print, 'last', file=sys.stderr); raise SystemExit(1)",
     "import sys, threading, time; threading.Thread(target=lambda: (time.sleep(0.1), print('thread', file=sys.stderr))).start()"]
)
def test_it_ends_as_python_ends(code):
    mine, plain = both([sys.executable, "-c", code])
    assert mine.returncode == plain.returncode
    assert mine.stderr.splitlines()[-1:] == plain.stderr.splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=str)
def test_a_signal_hits_the_process(number):
    heard = "signal.signal(signal.SIGINT, signal.default_int_handler)"  # also below a shell that ignores it, as for what it runs behind itself
    process = python(f"import signal, time; {heard}; print('here', flush=True)\ntry:\n    time.sleep(60)\nfinally:\n    print('cleared', flush=True)")
    assert process.stdout.readline() == "here\n" and process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(number)
    assert process.wait(timeout=20) == process.poll() == (1 if number == signal.SIGINT else -number)  # 1: as of any Python that has imported peft
    assert process.stdout.read() == ("cleared\n" if number == signal.SIGINT else "")
    assert ("KeyboardInterrupt" in process.stderr.read()) == (number == signal.SIGINT)
    with pytest.raises(ProcessLookupError):  # it is gone, and nobody has to wait for it
        os.kill(process.pid, 0)


def test_modules_scripts_and_programs_run_as_python_runs_them(tmp_path):
    (tmp_path / "beside.py").write_text("value = 3")
    (tmp_path / "script.py").write_text("import sys, beside\nif __name__ == '__main__':\n    print(sys.argv, beside.value, sys.path[0])")
    for words in (["script.py", "a"], ["-m", "script", "a"], ["-u", "-c", "import sys, beside; print(sys.argv, beside.value, repr(sys.path[0]), __name__)", "a"]):
        mine, plain = both([sys.executable, *words], cwd=tmp_path)
        assert mine.returncode == 0 and mine.stdout == plain.stdout
    mine, plain = both([str(Path(sys.executable).with_name("merge-lab")), "no-such-command"])
    assert (mine.returncode, mine.stdout, mine.stderr) == (plain.returncode, plain.stdout, plain.stderr)


def test_what_a_fork_could_not_do_is_started():
    for command, environment in (
        (["true"], {}),
        ([sys.executable, "-S", "-c", ""], {}),
        ([sys.executable, "-c", ""], {"PYTHONPATH": "elsewhere"}),
        ([sys.executable, "-c", ""], {"HF_HUB_CACHE": "elsewhere"}),
    ):
        process = subprocess.Popen(command, env={**os.environ, **environment})
        assert process._status is None and process.wait() == 0
    assert subprocess.run("exit 4", shell=True, check=False).returncode == 4


def test_libraries_are_there_and_this_package_is_not():
    "Nor is anything that a test of pictures and widgets looks for; random numbers are fresh, and nothing runs beside."
    code = (
        "import os, random, sys\n"
        "assert {'torch', 'transformers.trainer', 'peft'} <= set(sys.modules)\n"
        "assert not {'merge_lab', 'matplotlib', 'ipywidgets', 'IPython'} & set(sys.modules)\n"
        "assert len(os.listdir('/proc/self/task')) == 1\n"
        "import numpy; print(random.random(), numpy.random.rand())"
    )
    said = [python(code).communicate() for _ in range(2)]
    assert said[0][0] and said[0] != said[1] and not said[0][1]


def test_what_is_forked_forks():
    code = "import subprocess, sys\np = subprocess.Popen([sys.executable, '-c', 'raise SystemExit(5)'])\nprint(p._status is not None, p.wait())"
    assert python(code).communicate()[0] == "True 5\n"


def test_a_process_outlives_no_pipe_and_threads_may_wait_for_it():
    process, ends = python("import time; time.sleep(0.2)"), []
    waiting = [threading.Thread(target=lambda: ends.append(process.wait())) for _ in range(3)]
    for thread in waiting:
        thread.start()
    assert process.stdout.read() == ""
    for thread in waiting:
        thread.join()
    assert ends == [0] * 3


def test_the_server_ends_with_who_started_it():
    code = "import sys; sys.path.insert(0, sys.argv[1]); import forks; forks.asked_at('numpy'); print(forks._server[0].pid)"
    server = int(subprocess.run([sys.executable, "-S", "-c", code, str(Path(__file__).parent)], capture_output=True, text=True, check=True).stdout)
    end = time.monotonic() + 60
    while Path(f"/proc/{server}/cmdline").exists() and b"forks" in Path(f"/proc/{server}/cmdline").read_bytes():
        assert time.monotonic() < end
        time.sleep(0.05)
