"""Launch scripts: clean shell, and the commands that --dry_run prints."""

import pathlib
import shlex
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

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
    [create] = say("create")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "n"]
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
    assert say("resume") == [delete, create, archive, copy, install, run]
    assert "--worker=0" in say("logs")[0] and "pkill -TERM" in say("stop")[0][7]


def test_a_gke_cluster_from_creation_to_the_end():
    say = lambda action: dry_run("xpk.sh", action, *XPK, "--dry_run", "--", *TRAINING)
    cluster, storage = say("create")
    assert cluster[:3] == ["xpk", "cluster", "create"] and {"--tpu-type=v5p-32", "--num-slices=2"} <= set(cluster)
    assert storage[:3] == ["xpk", "storage", "attach"] and "--mount-point=/bucket" in storage
    [run] = say("run")
    assert run[:3] == ["xpk", "workload", "create"] and {"--workload=w", "--max-restarts=50"} <= set(run)
    assert shlex.split(run[-1].split("retention_jax.train ")[1]) == list(TRAINING)
    assert say("logs")[1][:2] == ["kubectl", "logs"]
    assert say("stop")[0][:3] == ["xpk", "workload", "delete"] and say("delete")[0][:3] == ["xpk", "cluster", "delete"]


def test_slurm_runs_one_step_and_queues_again():
    step, again = dry_run("slurm.sh", "--dry_run", *TRAINING)
    assert step[0] == "srun" and step[-3:] == list(TRAINING) and again[:2] == ["scontrol", "requeue"]


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
