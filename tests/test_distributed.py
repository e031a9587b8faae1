"""Several processes: when they join, the numbers of one, the end of one, and one clear error for wrong set-ups."""

import http.server
import json
import os
import pathlib
import re
import runpy
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import helpers
import jax
import numpy as np
import pytest
from absl import flags

from retention_jax import train
from retention_jax.config import DataConfig, EvalConfig, TrainConfig, conversion
from retention_jax.evaluation import curves, journal, plan, rows
from retention_jax.models import gate_files, weights
from retention_jax.parallel import distributed

pytestmark = pytest.mark.slow  # every test starts several processes of jax

ROOT = pathlib.Path(__file__).parent.parent
TOGETHER = {"coordinator_address": "127.0.0.1:1234", "num_processes": 2, "process_id": 1}


def values_of(**given) -> flags.FlagValues:
    values = flags.FlagValues()
    distributed.define_flags(values)
    values([""] + [f"--{name}={value}" for name, value in given.items()])
    return values


@pytest.mark.parametrize(
    "changes, message",
    (
        ({"coordinator_address": None}, "missing: --coordinator_address"),
        ({"num_processes": None, "process_id": None}, "missing: --num_processes, --process_id"),
        ({"process_id": 2}, r"--process_id must be in \[0, --num_processes\), got 2 and 2"),
        ({"coordinator_address": "here"}, "--coordinator_address must be HOST:PORT, got 'here'"),
    ),
)
def test_incomplete_flags_are_refused(changes, message):
    given = {name: value for name, value in (TOGETHER | changes).items() if value is not None}
    with pytest.raises(ValueError, match=message), distributed.joined(values_of(**given)):
        pass


class Metadata(http.server.BaseHTTPRequestHandler):
    """A Google Cloud VM's metadata; `attributes` are the server's."""

    def do_GET(self):
        found = self.server.attributes.get(self.path.rsplit("/", 1)[1])  # pyright: ignore[reportAttributeAccessIssue]
        self.send_response(404 if found is None or self.headers["Metadata-Flavor"] != "Google" else 200)
        self.end_headers()
        self.wfile.write((found or "").encode())

    def log_message(self, *args):
        pass


@pytest.mark.parametrize(
    "tpu, environment, metadata, many",
    (
        (False, {}, {"worker-network-endpoints": "a,b"}, False),  # a laptop: nobody is asked
        (False, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, {}, False),  # a batch script outside srun
        (False, {"SLURM_STEP_NUM_TASKS": "1"}, {}, False),
        (False, {"SLURM_STEP_NUM_TASKS": "4"}, {}, True),
        (True, {}, {"worker-network-endpoints": "::10.0.0.1", "tpu-env": "ZONE: 'z'"}, False),
        (True, {}, {"worker-network-endpoints": "::10.0.0.1,::10.0.0.2", "tpu-env": "ZONE: 'z'"}, True),
        (True, {}, {"worker-network-endpoints": "a", "tpu-env": "MEGASCALE_NUM_SLICES: '2'\n"}, True),
        (True, {}, {}, False),
        (True, {"TPU_WORKER_HOSTNAMES": "localhost"}, {"worker-network-endpoints": "a,b"}, False),
        (True, {"TPU_WORKER_HOSTNAMES": "a,b"}, {}, True),
        (True, {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, {}, True),
        (True, {"TPU_SKIP_MDS_QUERY": "1"}, {"worker-network-endpoints": "a,b"}, False),
    ),
)
def test_who_joins_others(monkeypatch, tpu, environment, metadata, many):
    for name in ("TPU_SKIP_MDS_QUERY", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES", "MEGASCALE_NUM_SLICES"):
        monkeypatch.delenv(name, raising=False)
    with http.server.HTTPServer(("127.0.0.1", 0), Metadata) as server:
        server.attributes = metadata  # pyright: ignore[reportAttributeAccessIssue]
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        for name, value in ({"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"} | environment).items():
            monkeypatch.setenv(name, value)
        joined, platforms = [], jax.config.jax_platforms  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: joined.append(arguments))
        jax.config.update("jax_platforms", "tpu,cpu" if tpu else None)
        try:
            with distributed.joined(values_of()):
                pass
        finally:
            jax.config.update("jax_platforms", platforms)
            jax.config.update("jax_enable_preemption_service", True)
            server.shutdown()
    assert bool(joined) == many


def test_one_process_agrees_with_itself():
    assert distributed.gather("grüße") == ["grüße"]
    assert distributed.largest(15) == 15


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    said = []
    monkeypatch.setattr(distributed, "gather", lambda text: said.append(text) or [text, ""])
    assert distributed.together(lambda: 3) == 3
    with pytest.raises(FileNotFoundError):
        distributed.together(lambda: pathlib.Path("/nowhere").read_text())
    assert said[0] == "" and said[1].startswith("FileNotFoundError: ")
    monkeypatch.setattr(distributed, "gather", lambda text: ["", text, "OSError: disk full"])
    with pytest.raises(RuntimeError, match="^process 2: OSError: disk full$"):
        distributed.together(lambda: 3)


def fields(folder: pathlib.Path) -> dict[str, Any]:
    """Of a tiny training run."""
    return {
        "backbone": str(folder / "backbone"),
        "gate.width": 8,
        "data.length": 24,
        "data.document_lengths": (24,),
        "data.batch_size": 8,
        "data.documents": 64,
        "data.cache_dir": str(folder / "cache"),
        "optimizer.warmup_steps": 2,
        "steps": 24,
        "checkpoint_every": 6,
        "log_every": 1,
        "eval.tasks": (),
    }


def command(folder: pathlib.Path, **mesh: int) -> list[str]:
    config = [f"--config.{name}={value}" for name, value in fields(folder).items()]
    config += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    return [sys.executable, "-m", "retention_jax.train", "--config=configs/recall.py", *config]


def launch(log: pathlib.Path, command: list[str], restarts: int = 0, devices: int = 4) -> subprocess.Popen:
    launcher = [sys.executable, "launch/local.py", f"--devices_per_process={devices}", f"--max_restarts={restarts}"]
    with log.open("w") as out:
        # A second start need not compile again.
        env = helpers.environment(JAX_ENABLE_COMPILATION_CACHE="true", XDG_CACHE_HOME=str(log.parent / "cache"))
        return subprocess.Popen([*launcher, "--", *command], cwd=ROOT, stdout=out, stderr=out, env=env)


def wait_for(running: subprocess.Popen, workdir: pathlib.Path, steps: int) -> None:
    """Returns when the run has told of so many steps, or has ended."""
    path = workdir / "metrics.jsonl"
    while running.poll() is None and not (path.exists() and len(path.read_text().splitlines()) >= steps):
        time.sleep(0.005)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    weights.save_backbone(helpers.tiny_model(vocab_size=64, num_heads=8), folder / "backbone")
    return folder


@pytest.fixture(scope="module")
def config(folder):
    values = runpy.run_path(str(ROOT / "configs" / "recall.py"))["get_config"]()
    values.update_from_flattened_dict(fields(folder))
    return conversion.from_config_dict(TrainConfig, values)


@pytest.fixture(scope="module")
def uninterrupted(config, folder):
    """The run on one device of this process."""
    train.train(config, folder / "uninterrupted")
    return folder / "uninterrupted"


def assert_same_outcome(workdir: pathlib.Path, wanted: pathlib.Path) -> None:
    losses, gates = [], []
    for run in (workdir, wanted):
        losses.append([json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()])
        gates.append(gate_files.read_gates(run / "gates").tensors)
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)
    assert gates[0].keys() == gates[1].keys()
    for name, gate in gates[1].items():
        helpers.assert_close(gates[0][name], gate, 1e-4)


@pytest.mark.one_version
def test_a_killed_process_is_noticed_and_the_run_ends_as_on_one_device(folder, uninterrupted, tmp_path):
    """The coordinator or the other one, at a random step; the gates' shards are in both."""
    workdir, log = tmp_path / "two", tmp_path / "log"
    victim, step = np.random.default_rng().integers((0, 7), (2, 17))
    running = launch(log, [*command(folder, fsdp=8), f"--workdir={workdir}"], restarts=1)
    wait_for(running, workdir, step)
    pid = re.search(rf"process {victim} is (\d+)", log.read_text())
    assert pid
    os.kill(int(pid[1]), signal.SIGKILL)
    killed = time.monotonic()
    while running.poll() is None and "starting all 2 again, 1 of 1" not in log.read_text():
        time.sleep(0.02)
    assert time.monotonic() - killed < 30
    assert running.wait(timeout=240) == 0, f"{victim} killed after step {step}: {log.read_text()[-3000:]}"
    assert log.read_text().count("[0] continuing after step ") == 1 and "[1] continuing" not in log.read_text()
    assert_same_outcome(workdir, uninterrupted)
    assert {p.name for p in (workdir / "checkpoints").iterdir()} == {"18", "24"}


@pytest.mark.one_version
def test_sigterm_stops_two_processes_and_one_goes_on(config, folder, uninterrupted, tmp_path):
    """Sequences are cut between the two processes, and nothing is cut when it goes on."""
    workdir, log = tmp_path / "two", tmp_path / "log"
    running = launch(log, [*command(folder, context=4, tensor=2), f"--workdir={workdir}"])
    wait_for(running, workdir, 3)
    running.terminate()
    assert running.wait(timeout=120) == 128 + signal.SIGTERM, log.read_text()[-3000:]
    [step] = re.findall(r"stopped by SIGTERM after step (\d+)", log.read_text())
    assert str(step) in {p.name for p in (workdir / "checkpoints").iterdir()}
    train.train(config, workdir)
    assert_same_outcome(workdir, uninterrupted)


@pytest.mark.slow  # compiles every program in two processes; test_gates_in_training.py has one
def test_two_processes_score_their_checkpoints(folder, uninterrupted, tmp_path):
    """The model lies across both, and only the first writes."""
    workdir, log = tmp_path / "two", tmp_path / "log"
    of_eval = {"tasks": "('recall',)", "policies": "('full','retention')", "budgets": "(4,)", "lengths": "(24,)"}
    flags = [f"--config.eval.{name}={value}" for name, value in (of_eval | {"examples": 2, "seeds": 2}).items()]
    given = [flag for flag in command(folder, fsdp=8) if "eval.tasks" not in flag]
    running = launch(log, [*given, *flags, "--config.eval_every=12", f"--workdir={workdir}"])
    assert running.wait(timeout=400) == 0, log.read_text()[-3000:]
    assert [(at.step, len(at.rows)) for at in curves.read(workdir / "curves")] == [(12, 2), (24, 2)]
    assert (workdir / "curves" / "curves.png").exists() and (workdir / "eval" / "results.json").exists()
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    (workdir / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines if "loss" in json.loads(line)))
    assert_same_outcome(workdir, uninterrupted)


@pytest.mark.one_version
def test_a_run_goes_on_with_fewer_devices_and_other_meshes(folder, uninterrupted, tmp_path):
    workdir = tmp_path / "run"
    legs = ((8, dict(fsdp=2, context=2, tensor=2), 4), (4, dict(context=4), 9), (2, dict(tensor=2), None))
    for devices, mesh, stop_after in legs:
        env = helpers.environment()
        env["XLA_FLAGS"] += f" --xla_force_host_platform_device_count={devices}"
        log = tmp_path / f"{devices}.log"
        with log.open("w") as out:
            arguments = [*command(folder, **{"data": 1, **mesh}), f"--workdir={workdir}"]
            running = subprocess.Popen(arguments, cwd=ROOT, stdout=out, stderr=out, env=env)
        if stop_after:
            wait_for(running, workdir, stop_after)
            running.terminate()
        assert running.wait(timeout=120) == (128 + signal.SIGTERM if stop_after else 0), log.read_text()[-3000:]
        assert (devices < 8) == ("continuing after step" in log.read_text())
    assert_same_outcome(workdir, uninterrupted)


@pytest.mark.one_version
@pytest.mark.parametrize(
    "differs, message",
    (
        (
            "--workdir={0}/shared --config.mesh.fsdp=$$",
            r"different configurations: mesh.fsdp is \d+ in process 0 and \d+ in process 1",
        ),
        ("--workdir={0}/$$", r"must be one that all processes share; .* not in .*/\d+ of process 1"),
    ),
    ids=("configs", "folders"),
)
def test_wrong_set_ups_are_one_error_before_the_model(folder, tmp_path, differs, message):
    script = f'exec "$0" {differs.format(tmp_path)} "$@"'  # $$ is another number in each process
    python, *arguments = command(folder)
    running = launch(
        tmp_path / "log",
        ["sh", "-c", script.replace('"$0"', f"{python} {' '.join(arguments[:3])}"), "sh", *arguments[3:]],
        devices=1,
    )
    assert running.wait(timeout=120) == 2
    told = (tmp_path / "log").read_text()
    assert re.search(message, told), told[-3000:]
    assert "training gates" not in told


@pytest.mark.one_version
def test_two_processes_share_a_sweep(folder, tmp_path):
    output = tmp_path / "two"
    python = [sys.executable, "-m", "retention_jax.evaluate", "--config=configs/recall.py"]
    chosen = ["--policies=full,streaming", "--budgets=3", "--lengths=36", "--config.eval.seeds=3"]
    small = ["--config.eval.recent=6", "--config.eval.examples=2", f"--config.backbone={folder / 'backbone'}"]
    running = launch(tmp_path / "log", [*python, *chosen, *small, f"--output={output}"], devices=1)
    assert running.wait(timeout=120) == 0, (tmp_path / "log").read_text()[-3000:]

    units = [
        [json.loads(line)["unit"] for line in (output / f"journal-{process}.jsonl").read_text().splitlines()[1:]]
        for process in range(2)
    ]
    both = {journal.Unit(**unit) for of_process in units for unit in of_process}
    assert list(map(len, units)) == [3, 3] and len(both) == 6  # two policies, three seeds: none twice
    found = rows.load(output / "results.json")
    config = EvalConfig(policies=("full", "streaming"), budgets=(3,), lengths=(36,), seeds=3, recent=6, examples=2)
    alone = plan.run(weights.load(folder / "backbone", None, "float32"), config, DataConfig(), None)
    measured = dict(seconds=0.0, tokens_per_second=0.0, peak_bytes=None)
    assert [row._replace(**measured) for row in found] == [row._replace(**measured) for row in alone]
