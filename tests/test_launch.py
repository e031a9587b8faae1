"""Launch scripts: clean shell, the commands that --dry_run prints, what they do when a run fails, stops or waits."""

import importlib
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
from absl import flags

pytestmark = pytest.mark.one_version

LAUNCH = pathlib.Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
TPU = ("--name=n", "--zone=z", "--type=v5p-32", "--version=v2-alpha-tpuv5", "--bucket=b", "--project=p", "--spot")
XPK = ("--cluster=c", "--zone=us-east5-a", "--project=p", "--type=v5p-32", "--bucket=b", "--workload=w", "--slices=2")
TRAINING = ("--config=configs/recall.py", "--config.eval.lengths=(24, 48)", "--workdir=bucket/a run")


def dry_run(script: str, *arguments: str) -> list[list[str]]:
    """The commands a script would run, each as its words."""
    command = ["bash", LAUNCH / script, *arguments]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    lexer = subprocess.run(  # bash itself reads what it quoted
        ["bash", "-c", f"p() {{ printf '%s\\0' \"$@\"; printf '\\1'; }}\n{_calls(printed)}"],
        capture_output=True,
        text=True,
    )
    return [call.split("\0")[:-1] for call in lexer.stdout.split("\1")[:-1]]


def _calls(printed: str) -> str:
    return "\n".join(f"p {line}" for line in printed.splitlines())


def test_shell_scripts_are_clean():
    shellcheck = pathlib.Path(sys.executable).with_name("shellcheck")
    checked = subprocess.run([shellcheck, *SCRIPTS], capture_output=True, text=True)
    assert SCRIPTS and checked.returncode == 0, checked.stdout


def test_a_tpu_slice_from_creation_to_the_end():
    say = lambda action: dry_run("tpu_vm.sh", action, *TPU, "--dry_run", "--", *TRAINING)
    create, asked = say("create")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "n"]
    assert asked[4] == "list"
    needed = {"--node-id=n", "--accelerator-type=v5p-32", "--runtime-version=v2-alpha-tpuv5", "--zone=z", "--project=p"}
    assert needed | {"--spot"} == set(create[6:])
    archive, copy, install = say("install")
    assert archive[:2] == ["git", "archive"] and copy[3:5] == ["tpu-vm", "scp"] and "--worker=all" in copy
    assert copy[5] in archive[3] and "gcsfuse" in install[7] and "--worker=all" in install
    [run] = say("run")
    assert run[3:7] == ["tpu-vm", "ssh", "n", "--worker=all"]
    # The worker's shell finds the arguments as they were given.
    told = run[7].split("' train ")[1].split(" >>train.log")[0]
    assert shlex.split(told) == list(TRAINING)
    assert subprocess.run(["bash", "-n", "-c", run[7].removeprefix("--command=")]).returncode == 0
    assert subprocess.run(["bash", "-n", "-c", install[7].removeprefix("--command=")]).returncode == 0
    [delete] = say("delete")
    assert delete[4:8] == ["delete", "n", "--force", "--quiet"]
    assert say("resume") == [asked, delete, create, asked, archive, copy, install, run]
    assert "--worker=0" in say("logs")[0] and "kill -TERM" in say("stop")[0][7]


def test_a_gke_cluster_from_creation_to_the_end():
    say = lambda action: dry_run("xpk.sh", action, *XPK, "--dry_run", "--", *TRAINING)
    cluster, storage = say("create")
    assert cluster[:3] == ["xpk", "cluster", "create"] and {"--tpu-type=v5p-32", "--num-slices=2"} <= set(cluster)
    assert storage[:3] == ["xpk", "storage", "attach"] and "--mount-point=/bucket" in storage
    assert "--mount-options=implicit-dirs,metadata-cache:ttl-secs:1,metadata-cache:negative-ttl-secs:0" in storage
    [run] = say("run")
    assert run[:3] == ["xpk", "workload", "create"]
    assert {"--workload=w", "--max-restarts=50", "--termination-grace-period-seconds=300"} <= set(run)
    assert shlex.split(run[-1].split("exec python -m retention_jax.train ")[1]) == list(TRAINING)
    assert say("logs")[1][:2] == ["kubectl", "logs"]
    assert say("stop")[0][:3] == ["xpk", "workload", "delete"] and say("delete")[0][:3] == ["xpk", "cluster", "delete"]


def test_slurm_runs_one_step_and_queues_again():
    step, again = dry_run("slurm.sh", "--dry_run", *TRAINING)
    assert (
        step[0] == "srun"
        and {"--cpus-per-task=8", "--kill-on-bad-exit=0"} <= set(step)
        and step[-3:] == list(TRAINING)
        and again[:2] == ["scontrol", "requeue"]
    )


@pytest.fixture
def fakes(tmp_path):
    """Puts a program where it is found first, in `environment`; `calls` are those of all such programs."""
    folder, log = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    log.touch()

    def put(name: str, body: str, to: pathlib.Path = folder) -> None:
        to.mkdir(parents=True, exist_ok=True)
        (to / name).write_text(f'#!/bin/bash\necho {name} "$*" >>{log}\n{body}\n')
        (to / name).chmod(0o755)

    put.environment = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    put.calls = lambda: log.read_text().splitlines()
    return put


@pytest.mark.parametrize(
    "states, done",
    (
        # The place in the queue is kept, and an error of the network is neither a lost slice nor the end.
        (("WAITING_FOR_RESOURCES", "error", "PROVISIONING", "ACTIVE"), ("scp", "ssh", "ssh")),
        (("SUSPENDING", "SUSPENDED", "ACTIVE"), ("delete", "create", "scp", "ssh", "ssh")),
        (("", "ACTIVE"), ("create", "scp", "ssh", "ssh")),
        (("FAILED", "CREATING", "FAILED"), ("delete", "create")),
    ),
)
def test_resume_waits_for_a_slice_in_the_queue(fakes, tmp_path, states, done):
    left = tmp_path / "states"
    left.write_text("".join(f"{state}\n" for state in states))
    answer = f'read -r state <{left}; sed -i 1d {left}; [ "$state" != error ] || exit 1; echo "$state"'
    fakes("gcloud", f"if [ $4 = list ]; then {answer}; fi")
    fakes("git", "")
    fakes("sleep", "")
    command = ["bash", LAUNCH / "tpu_vm.sh", "resume", *TPU, "--", *TRAINING]
    ran = subprocess.run(command, env=fakes.environment, capture_output=True, text=True, timeout=20)
    assert ran.returncode == (2 if states[-1] == "FAILED" else 0), ran.stderr
    assert ("the queued resource n is FAILED" in ran.stderr) == (states[-1] == "FAILED")
    calls = [call.split()[4] for call in fakes.calls() if call.startswith("gcloud")]
    assert tuple(call for call in calls if call != "list") == done and left.read_text() == ""


def on_worker(fakes, action: str, *arguments: str) -> str:
    """What a worker answers to a command of tpu_vm.sh, done here."""
    [ssh] = dry_run("tpu_vm.sh", action, "--name=n", "--zone=z", "--dry_run", *arguments)
    command = ssh[7].removeprefix("--command=")
    return subprocess.run(
        ["bash", "-c", command], env=fakes.environment, capture_output=True, text=True, timeout=20, check=True
    ).stdout


def wait_for(text: str, file: pathlib.Path) -> None:
    deadline = time.monotonic() + 20
    while not (file.exists() and text in file.read_text()):
        assert time.monotonic() < deadline, file.exists() and file.read_text()
        time.sleep(0.02)


def test_a_run_on_a_worker_fails_twice_or_stops(fakes, tmp_path):
    home = tmp_path / "retention_jax"
    trains = lambda body: fakes("python", body, to=home / ".venv" / "bin")
    started = lambda: sum(call.startswith("python") for call in fakes.calls())
    ended = lambda: subprocess.run(["flock", "--timeout=20", home / "lock", "true"], check=True)
    fakes("sleep", "")
    trains("exit 134")
    on_worker(fakes, "run", "--max_restarts=3", "--", "--config=c")
    wait_for("attempt 3", home / "train.log")
    ended()
    trains("echo wrong; exit 1")
    on_worker(fakes, "run", "--", "--config=c")
    wait_for("failed twice", home / "train.log")
    ended()
    assert started() == 4 + 2

    # Stopped while it trains: it saves, and meanwhile no other starts.
    saves = "until [ -e saved ]; do /bin/sleep 0.05; done; exit 143"
    trains(f"trap '{saves}' TERM; echo training; while :; do /bin/sleep 0.05; done")
    on_worker(fakes, "run", "--", "--config=c")
    wait_for("training", home / "train.log")
    on_worker(fakes, "stop")
    assert "a run is going on" in on_worker(fakes, "run", "--", "--config=c")
    (home / "saved").touch()
    ended()
    assert started() == 4 + 2 + 1

    # Stopped while it waits to start again: it does not.
    fakes("sleep", "exec /bin/sleep 5")
    trains("exit 1")
    (tmp_path / "calls").write_text("")
    on_worker(fakes, "run", "--", "--config=c")
    wait_for("sleep 10", tmp_path / "calls")
    on_worker(fakes, "stop")
    ended()
    assert started() == 1


def test_sigterm_reaches_the_training_in_a_pod(fakes):
    """As xpk runs a command: in a shell, to which alone it passes the signal on."""
    run = dry_run("xpk.sh", "run", *XPK, "--dry_run", "--", *TRAINING)[0][-1].removeprefix("--command=")
    fakes("pip", "")
    fakes("python", "trap 'echo saved; exit 143' TERM; echo ready; while :; do sleep 0.05; done")
    pod = f"trap 'kill -TERM $!' TERM; ({run}) & wait $!; wait $!"
    with subprocess.Popen(["bash", "-c", pod], env=fakes.environment, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline() == "ready\n"
        running.terminate()
        assert running.stdout.readline() == "saved\n" and running.wait(timeout=10) == 143


def test_slurm_counts_crashes_and_not_time_limits(fakes, tmp_path):
    fakes("scontrol", "")
    queued = []
    for status in (143, 143, 143, 143, 1, 134, 143, 137, 1, 0):
        fakes("srun", f"exit {status}")
        before = fakes.calls().count("scontrol requeue 7")
        environment = fakes.environment | {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(len(queued))}
        ran = subprocess.run(["bash", LAUNCH / "slurm.sh", *TRAINING], cwd=tmp_path, env=environment, timeout=20)
        assert ran.returncode == status
        queued.append(fakes.calls().count("scontrol requeue 7") - before)
    assert queued == [1, 1, 1, 1, 1, 1, 1, 1, 0, 0]


def local(script: str, *arguments: str, launcher: pathlib.Path = LAUNCH / "local.py") -> subprocess.Popen[str]:
    """The local launcher with two processes of a shell script."""
    command = [sys.executable, launcher, *arguments, "--", "bash", "-c", script, "bash"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_failure_at_the_start_is_tried_twice_and_ends_with_its_error(tmp_path):
    fails = "echo starting; [[ $* = *process_id=1 ]] && exec sleep 60; seq 1000; echo ValueError: wrong >&2; exit 3"
    with local(fails) as running:
        told = running.communicate(timeout=20)[0]
    assert running.returncode == 3 and told.count("starting all 2 again") == 1
    assert told.endswith(
        "[launcher] process 0 ended with status 3: ValueError: wrong\n"
        "[launcher] failed twice within 60 s of the start: not started again\n"
    )
    assert told.count("[0] 1000\n[0] ValueError: wrong\n") == 2  # nothing of its output is lost

    # Killed processes and later failures are tried again as often as asked.
    with local("[[ $* = *process_id=1 ]] && kill -9 $$; sleep 60", "--max_restarts=2") as running:
        assert "starting all 2 again, 2 of 2" in running.communicate(timeout=20)[0] and running.returncode == 137
    text = (LAUNCH / "local.py").read_text()
    (tmp_path / "local.py").write_text(
        text.replace("_SOON = 60", "_SOON = 0").replace("__file__", repr(str(LAUNCH / "local.py")))
    )
    with local(fails, "--max_restarts=2", launcher=tmp_path / "local.py") as running:
        assert "starting all 2 again, 2 of 2" in running.communicate(timeout=20)[0] and running.returncode == 3


def lines_until(running: subprocess.Popen[str], text: str, count: int) -> str:
    assert running.stdout is not None
    told = ""
    while told.count(text) < count:
        told += running.stdout.readline()
    return told


@pytest.mark.parametrize(
    "first, second, status, message",
    (
        ("exit 143", "exit 143", 143, ""),
        ("exit 0", "exit 0", 0, ""),
        ("exit 143", "echo OSError: full; exit 1", 1, "process 1 ended with status 1: OSError: full"),
        ("exit 143", "", 137, "1 s after the signal processes [1] still ran, and were killed"),
    ),
)
def test_the_status_after_a_signal_is_true(first, second, status, message):
    trap = f"case $* in *process_id=1) trap '{second}' TERM ;; *) trap '{first}' TERM ;; esac"
    with local(f"{trap}; echo ready; while :; do sleep 0.05; done", "--grace=1") as running:
        lines_until(running, "ready", 2)
        running.terminate()
        told = running.communicate(timeout=20)[0]
    assert running.returncode == status
    assert message in told and bool(message) == bool(told)


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel of Linux")
def test_nothing_outlives_the_launcher(tmp_path):
    """Neither what a dead process had started, nor the processes of a launcher that was killed."""
    states = lambda pids: subprocess.run(["ps", "-o", "state=", *pids], capture_output=True, text=True).stdout
    with local("sleep 60 >/dev/null & echo child $!; sleep 0.2; exit 3", "--max_restarts=0") as running:
        told = running.communicate(timeout=20)[0]
    children = set(re.findall(r"child (\d+)", told))
    assert len(children) == 2 and set(states(children)) <= set("Z\n")  # a zombie is only not counted yet

    with local("echo ready; exec sleep 60") as running:
        told = lines_until(running, "ready", 2)
        running.send_signal(signal.SIGKILL)
    time.sleep(0.2)
    processes = re.findall(r"process \d is (\d+)", told)
    assert len(processes) == 2 and set(states(processes)) <= set("Z\n")


@pytest.mark.parametrize(
    "script, arguments, message",
    (
        ("tpu_vm.sh", ("create", "--name=n", "--zone=z"), "create needs --type and --version"),
        ("tpu_vm.sh", ("run", "--zone=z"), "--name and --zone are needed"),
        ("tpu_vm.sh", ("run", "--nam=n"), "unknown argument --nam=n"),
        ("xpk.sh", ("run", *XPK[:3]), "run needs --type"),
        ("slurm.sh", (), "the training's arguments are needed"),
    ),
)
def test_what_is_missing_is_said(script, arguments, message):
    ran = subprocess.run(["bash", LAUNCH / script, *arguments], capture_output=True, text=True, timeout=20)
    assert ran.returncode == 2 and message in ran.stderr


def test_what_measures_a_gpu_calls_benchmarks_that_exist(tmp_path, monkeypatch):
    """Both ways of each operation, within ten minutes; a step that fails does not end the others."""
    for name, does in (("nvidia-smi", ""), ("python", 'echo "$RETENTION_JAX_KERNELS $*" >> calls; exit 3')):
        (tmp_path / name).write_text(f"#!/bin/bash\ncd {tmp_path}\n{does}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHON", str(tmp_path / "python"))
    script = LAUNCH / "measure_gpu.sh"
    done = subprocess.run(["bash", script, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0 and "attention-triton: status 3" in done.stdout, done.stderr
    tests, *benches = [shlex.split(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert tests[-1] == "tests/kernels/test_device.py" and (LAUNCH.parent / tests[-1]).is_file()
    monkeypatch.syspath_prepend(LAUNCH)
    benchmark = importlib.import_module("benchmark")
    for _, script, command, *arguments in benches:
        assert script == "launch/benchmark.py" and command in benchmark.COMMANDS
        values = flags.FlagValues()
        benchmark.define_flags(values)
        assert values(["benchmark", *arguments]) == ["benchmark"]
        benchmark.make_settings(values)
    assert [b[0] for b in benches] == ["xla", "triton"] * (len(benches) // 2)
    seconds = re.findall(r"of (\d+) s at most", done.stdout)
    assert len(seconds) == len(benches) + 1 and sum(map(int, seconds)) <= 600
