"""Several processes: when they join, the numbers of one, the end of one, and one clear error for wrong set-ups."""

import http.server
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from flax import nnx

from retention_jax import config_io, distributed, evaluate, train
from retention_jax.config import DataConfig, EvalConfig, TrainConfig
from retention_jax.evaluation import journal, rows
from retention_jax.models import weights
from retention_jax.models.gate import GateParam

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


def command(folder: pathlib.Path, **changes) -> list[str]:
    """A tiny training run."""
    fields = {
        "backbone": folder / "backbone",
        "gate.width": 8,
        "data.length": 24,
        "data.document_lengths": "(24,)",
        "data.batch_size": 8,
        "data.documents": 64,
        "data.cache_dir": folder / "cache",
        "optimizer.warmup_steps": 2,
        "steps": 20,
        "checkpoint_every": 5,
        "log_every": 1,
        "eval.tasks": "()",
    }
    config = [f"--config.{name}={value}" for name, value in (fields | changes).items()]
    return [sys.executable, "-m", "retention_jax.train", "--config=configs/recall.py", *config]


def launch(log: pathlib.Path, command: list[str], restarts: int = 0, devices: int = 4) -> subprocess.Popen:
    launcher = [sys.executable, "launch/local.py", f"--devices_per_process={devices}", f"--max_restarts={restarts}"]
    with log.open("w") as out:
        # A second start need not compile again.
        env = helpers.environment(JAX_ENABLE_COMPILATION_CACHE="true", XDG_CACHE_HOME=str(log.parent / "cache"))
        return subprocess.Popen([*launcher, "--", *command], cwd=ROOT, stdout=out, stderr=out, env=env)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    weights.save_backbone(helpers.tiny_model(vocab_size=64), folder / "backbone")
    return folder


def losses_of(workdir: pathlib.Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_killed_process_is_noticed_and_the_run_ends_as_on_one_device(folder, tmp_path):
    workdir, log = tmp_path / "two", tmp_path / "log"
    kill_after = np.random.default_rng(0).integers(6, 15)
    running = launch(log, [*command(folder), f"--workdir={workdir}"], restarts=1)
    while running.poll() is None and not (
        (workdir / "metrics.jsonl").exists() and len((workdir / "metrics.jsonl").read_text().splitlines()) >= kill_after
    ):
        time.sleep(0.005)
    victim = re.search(r"process 1 is (\d+)", log.read_text())
    assert victim
    os.kill(int(victim[1]), signal.SIGKILL)
    killed = time.monotonic()
    while running.poll() is None and "starting all 2 again" not in log.read_text():
        time.sleep(0.02)
    assert time.monotonic() - killed < 30
    assert running.wait(timeout=120) == 0, log.read_text()[-3000:]
    assert log.read_text().count("[0] continuing after step ") == 1 and "[1] continuing" not in log.read_text()

    # 8 devices of 2 processes against one device of this one, which then goes on from what those had saved.
    config = config_io.from_dict(TrainConfig, json.loads((workdir / "config.json").read_text()))
    alone = train.train(config, tmp_path / "one")
    np.testing.assert_allclose(losses_of(workdir), losses_of(tmp_path / "one"), rtol=1e-5)
    kept = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert kept == [15, 20]
    (workdir / "checkpoints" / "20" / "data" / "metadata").write_text("")  # so that there is something to go on with
    resumed = train.train(config, workdir)
    assert len(losses_of(workdir)) == 20
    for got, want in zip(*(jax.tree.leaves(nnx.state(m, GateParam)) for m in (resumed, alone)), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "differs, message",
    (
        (
            "--workdir={0}/shared --config.seed=$$",
            r"different configurations: seed is \d+ in process 0 and \d+ in process 1",
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
    assert running.wait(timeout=120) == 1
    told = (tmp_path / "log").read_text()
    assert re.search(message, told), told[-3000:]
    assert "training gates" not in told


@pytest.mark.slow
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
    alone = evaluate.run(weights.load(folder / "backbone", None, "float32"), config, DataConfig(), None)
    measured = dict(seconds=0.0, tokens_per_second=0.0, peak_bytes=None)
    assert [row._replace(**measured) for row in found] == [row._replace(**measured) for row in alone]
