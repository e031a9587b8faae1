"""Every command: a wrong input is one line on standard error and status 2, and nothing is written."""

import importlib
import pathlib
import runpy
import signal
import subprocess
import sys
import types

import pytest
from absl import flags
from helpers import environment

from retention_jax import evaluate, train
from retention_jax.data import show
from retention_jax.dilution import __main__ as dilution
from retention_jax.report import __main__ as report
from retention_jax.report import trace
from retention_jax.runtime import command, files

# ml_collections loads config files in a way that Python is about to drop.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = pathlib.Path(__file__).parent.parent
BACKBONE = f"--config={ROOT / 'configs' / 'recall_backbone.py'}"
RECALL = f"--config={ROOT / 'configs' / 'recall.py'}"


@pytest.fixture
def launch(monkeypatch):
    """Imports a command of launch/ by name."""
    monkeypatch.syspath_prepend(ROOT / "launch")
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("benchmark", "benchmarks", "chips", "compare_meshes", "hlo", "model_shapes"):
            del sys.modules[name]


@pytest.fixture
def outcome(tmp_path, monkeypatch, capfd):
    """Status and standard error of a command's main with flags of its own, as `command.run` has it."""

    def outcome(module, arguments):
        # ml_collections looks for overrides of fields there.
        monkeypatch.setattr(sys, "argv", ["command", *arguments])
        monkeypatch.chdir(tmp_path)
        values = flags.FlagValues()
        values["verbosity"] = flags.FLAGS["verbosity"]
        module.define_flags(values)
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended, command.one_line_errors(debug=False):
            module.main(command.parse(values, sys.argv), values)
        return ended.value.code, capfd.readouterr().err

    return outcome


def assert_refused(found: tuple[object, str], told: str, folder: pathlib.Path) -> None:
    status, err = found
    assert status == 2 and told in err
    assert err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err
    assert list(folder.iterdir()) == []


WORKDIR = "--workdir=run"
TRAIN = (
    ([RECALL], "--workdir is needed"),
    ([WORKDIR], "--config is needed"),
    (["--config=nowhere.py", WORKDIR], "--config=nowhere.py: No such file or directory"),
    ([RECALL, WORKDIR, "extra"], "unexpected arguments: ['extra']"),
    ([RECALL, WORKDIR, "--config.stepz=3"], "--config.stepz: the configuration has no field 'stepz'"),
    ([RECALL, WORKDIR, "--config.steps=many"], "--config.steps=many"),
    ([RECALL, WORKDIR, "--config.steps=0"], "config: steps must be at least 1, got 0"),
    ([RECALL, WORKDIR, "--config.loss.kl=forwards"], "config.loss.kl must be one of 'forward', 'reverse'"),
    ([RECALL, WORKDIR, "--config.backbone=nowhere"], "nowhere: no such checkpoint folder"),
    ([RECALL, WORKDIR, "--config.mesh.fsdp=3"], "the axes must multiply to the 8 devices there are"),
    ([RECALL, WORKDIR, "--num_processes=2"], "several processes need"),
    ([f"--config={ROOT / 'configs' / 'qwen3_math.py'}:99b", WORKDIR], "must have one of 1.7b, 4b, 8b, 14b, got '99b'"),
)
CHAT = f"--config={ROOT / 'configs' / 'chat.py'}"
SHOW = (
    ([], "--config is needed"),
    (["--config=nowhere.py"], "--config=nowhere.py: No such file or directory"),
    ([RECALL], "data.task='chat' has text to show, got 'recall'"),
    ([CHAT, "--rows=-1"], "--rows=-1"),
    ([CHAT, "--rows=x"], "--rows=x"),
    ([CHAT, "extra"], "unexpected arguments: ['extra']"),
    ([CHAT, "--config.backbone=/nowhere"], "/nowhere: no such checkpoint folder"),
    ([CHAT, "--config.data.too_long=cutt"], "config.data.too_long must be one of 'cut', 'drop', got 'cutt'"),
    ([CHAT, "--config.data.length=1"], "length must be at least 2, got 1"),
    ([CHAT, "--config.dat.length=1"], "has no field 'dat'"),
)
REPORT = (
    ([], "--output is needed"),
    (["--results=."], "--output is needed"),
    (["--output=a.html"], "--results is needed"),
    (["--results=nowhere", "--output=a.html"], "nowhere"),
    (["--results=.", "--output=a.html"], ""),
    (["--results=.", "--output=a.txt"], "--output must end in .html, got a.txt"),
    (["--results=.", "--output=a.html", "--most_entries=0"], "--most_entries=0"),
    (["--results=.", "--output=a.html", "--most_entries=x"], "--most_entries=x"),
    (["--results=.", "--output=a.html", "extra"], "unexpected arguments: ['extra']"),
    (["--results=.", "--output=a.html", "--titel=x"], "Unknown command line flag 'titel'"),
)
OUT = ["--output=out", "--budget=8"]
TRACE = (
    ([RECALL], "--output is needed"),
    ([RECALL, "--output=out"], "--budget is needed"),
    ([*OUT, "--config=nowhere.py"], "--config=nowhere.py: No such file or directory"),
    ([*OUT, RECALL, "extra"], "unexpected arguments: ['extra']"),
    ([*OUT, RECALL, "--length=0"], "--length must be at least"),
    ([*OUT, RECALL, "--sequences=0"], "--sequences must be at least 1, got 0"),
    ([*OUT, RECALL, "--policy=retentio"], "retentio"),
    ([*OUT, RECALL, "--checkpoint=/nowhere"], "/nowhere"),
    ([*OUT, RECALL, "--seed=x"], "--seed=x"),
    ([*OUT, RECALL, "--recent=0"], "recent must be at least 1, got 0"),
)
SCORE = (  # of evaluate and of dilution
    ([], "--config is needed"),
    (["--config=nowhere.py"], "--config=nowhere.py: No such file or directory"),
    ([RECALL], "--checkpoint must name a gate folder or a training workdir"),
    ([RECALL, "--checkpoint=/nowhere"], "/nowhere"),
    ([RECALL, "--policies=retentoin"], "unknown policy 'retentoin'"),
    ([RECALL, "--budgets=8,x"], "--budgets must be whole numbers separated by commas, got 'x'"),
    ([RECALL, "--budgets=0"], "budgets must be at least 1"),
    ([RECALL, "--lengths=1"], "lengths must be at least 2"),
    ([RECALL, "--policies=full,streaming", "--config.eval.horizon=8"], "horizon=8"),
    ([RECALL, "--config.eval.observ=8"], "has no field 'observ'"),
    ([RECALL, "extra"], "unexpected arguments: ['extra']"),
)
# As a program, not imported: `retention_jax.generate` is the function.
generate = types.SimpleNamespace(
    **{**runpy.run_module("retention_jax.generate", run_name="command"), "__name__": "generate"}
)
MODEL = ["--model=builtin:recall", "--prompt=a"]
GENERATE = (
    ([], "--model is needed"),
    (MODEL, "--budget is needed"),
    ([*MODEL, "--budget=0"], "budget must be at least 1, got 0"),
    ([*MODEL, "--budget=8", "--policy=snapvk"], "the nearest is 'snapkv'"),
    ([*MODEL, "--budget=8", "--horizon=0"], "horizon must be at least 1, got 0"),
    ([*MODEL, "--budget=8", "--policy=streaming", "--horizon=4"], "horizon belongs to the policies retention"),
    ([*MODEL, "--budget=8", "--chat"], "give one of --prompt, --chat, or --prompts together with --output"),
    ([*MODEL, "--budget=8", "--policy=streaming", "--mesh=rows:8"], "--mesh must be as in data:2,fsdp:4"),
    (["--model=/nowhere", "--prompt=a", "--budget=8", "--policy=streaming"], "/nowhere: no such checkpoint folder"),
    ([*MODEL, "--budget=8", "--temperatur=1"], "Unknown command line flag 'temperatur'"),
    ([*MODEL, "--budget=8", "extra"], "unexpected arguments: ['extra']"),
)
COMMANDS = (
    (train, TRAIN),
    (show, SHOW),
    (report, REPORT),
    (trace, TRACE),
    (evaluate, SCORE),
    (dilution, SCORE),
    (generate, GENERATE),
)
CASES = [
    pytest.param(module, arguments, told, id=f"{module.__name__}-{i}")
    for module, cases in COMMANDS
    for i, (arguments, told) in enumerate(cases)
]


@pytest.mark.parametrize("module, arguments, told", CASES)
def test_a_wrong_input_is_one_line(outcome, tmp_path, module, arguments, told):
    assert_refused(outcome(module, arguments), told, tmp_path)


@pytest.mark.parametrize(
    "arguments, told",
    (
        ([], "say what to measure"),
        (["decod"], "say what to measure"),
        (["decode", "train"], "say what to measure"),
        (["decode", "--model=qwen"], "--model must be one of small, "),
        (["decode", "--dtype=int8"], "--dtype must be float32 or bfloat16, got 'int8'"),
        (["decode", "--budgets=a,b"], "--budgets must be whole numbers above 0, got 'a,b'"),
        (["decode", "--contexts=0"], "--contexts must be whole numbers above 0, got '0'"),
        (["decode", "--new_tokens=1"], "--new_tokens must be at least 2"),
        (["decode", "--layers=0"], "--layers=0"),
        (["decode", "--output=nowhere/a.json"], "--output must be a file in a folder that is there"),
        (["decode", "--nope"], "Unknown command line flag 'nope'"),
    ),
)
def test_benchmark_refuses_in_one_line(launch, outcome, tmp_path, arguments, told):
    assert_refused(outcome(launch("benchmark"), arguments), told, tmp_path)


@pytest.mark.parametrize(
    "arguments, told",
    (
        (["extra"], "unexpected arguments: ['extra']"),
        (["--steps=0"], "--steps=0"),
        (["--steps=x"], "--steps=x"),
        (["--steps="], "--steps="),
        (["--meshes=2"], "'2' is not 4 sizes as in 2x1x4x1"),
        (["--meshes=2x2"], "'2x2' is not 4 sizes"),
        (["--meshes=axbxcxd"], "'axbxcxd' is not 4 sizes"),
        (["--meshes=0x1x1x8"], "'0x1x1x8' is not 4 sizes"),
        (["--meshes=2x1x1x1,8x1x1x1"], "'2x1x1x1' is 2 devices, and there are 8"),
        (["--mesh=8x1x1x1"], "Unknown command line flag 'mesh'"),
    ),
)
def test_compare_meshes_refuses_in_one_line(launch, outcome, tmp_path, arguments, told):
    assert_refused(outcome(launch("compare_meshes"), arguments), told, tmp_path)


# All in one process, which has other jax settings than the tests.
COMPILE = (
    ([BACKBONE], "--topology is needed"),
    (["--topology=v5e:2x2"], "--config is needed"),
    (["--topology=v9:2x2", BACKBONE], "topology must be CHIP:SIZE with a chip of v5e"),
    (["--topology=v5e:2x2", BACKBONE, "--mesh=rows:2"], "--mesh must be as in data:2,fsdp:4"),
    (["--topology=v5e:2x2", BACKBONE, "--mesh=data:3"], "the axes must multiply to the 4 devices there are"),
    (["--topology=v5e:2x2", BACKBONE, "--model=nothing"], "no architecture is known for 'nothing'"),
    (["--topology=v5e:2x2", BACKBONE, "--program=run"], "--program=run"),
    (["--topology=v5e:2x2", BACKBONE, "--batch=0"], "--batch=0"),
    (["--topology=v5e:2x2", BACKBONE, "--output=nowhere/a.json"], "--output must be a file in a folder that is there"),
    (["--topology=v5e:2x2", BACKBONE, "extra"], "unexpected arguments: ['extra']"),
)
COMPILE_PROGRAM = """
import sys
sys.path.insert(0, sys.argv[1])
import compile_for_tpu
from absl import flags
from retention_jax.runtime import command
for arguments in eval(sys.argv[2]):
    sys.argv[1:] = arguments
    values = flags.FlagValues()
    compile_for_tpu.define_flags(values)
    try:
        with command.one_line_errors(debug=False):
            compile_for_tpu.main(command.parse(values, sys.argv), values)
    except SystemExit as ended:
        print(ended.code)
"""


@pytest.mark.one_version  # it starts the compiler of the libtpu wheel
def test_compile_for_tpu_refuses_in_one_line(tmp_path):
    arguments = [sys.executable, "-c", COMPILE_PROGRAM, str(ROOT / "launch"), repr([given for given, _ in COMPILE])]
    ran = subprocess.run(
        arguments, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT), XLA_FLAGS=""), capture_output=True, text=True
    )
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert ran.stdout.split() == ["2"] * len(COMPILE) and len(lines) == len(COMPILE), ran.stderr[-3000:]
    for line, (_, told) in zip(lines, COMPILE, strict=True):
        assert told in line
    assert list(tmp_path.iterdir()) == [] and "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    "arguments, told",
    (
        ([], "give the command after --"),
        (["--"], "give the command after --"),
        (["--processes=0", "--", "true"], "--processes=0"),
        (["--processes=x", "--", "true"], "--processes=x"),
        (["--devices_per_process=0", "--", "true"], "--devices_per_process=0"),
        (["--max_restarts=-1", "--", "true"], "--max_restarts=-1"),
        (["--grace=-1", "--", "true"], "--grace=-1"),
        (["--proceses=2", "--", "true"], "Unknown command line flag 'proceses'"),
        (["--", "./nowhere"], "./nowhere: No such file or directory"),
        (["--", str(ROOT)], "Permission denied"),
    ),
)
def test_local_refuses_in_one_line(tmp_path, arguments, told):
    launcher = [sys.executable, ROOT / "launch" / "local.py", *arguments]
    ran = subprocess.run(launcher, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert_refused((ran.returncode, ran.stderr), told, tmp_path)


# `command.run` itself, with programs that fail in one way each.
PROGRAM = """
import sys, time
from retention_jax.runtime import command
def main(argv):
    {body}
command.run_without_jax(main)
"""


def run(body: str, *arguments: str, **options) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", PROGRAM.format(body=body), *arguments]
    return subprocess.run(program, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, **options)


@pytest.mark.one_version  # starts several programs
def test_debug_shows_the_traceback_and_a_mistake_always_does():
    quiet, loud, bug = run("raise ValueError('a\\nb')"), run("raise ValueError('a')", "--debug"), run("1 / 0")
    assert (quiet.returncode, quiet.stderr) == (2, "error: a; b\n")
    assert loud.returncode == 2 and "Traceback" in loud.stderr and loud.stderr.endswith("error: a\n")
    assert bug.returncode == 1 and "ZeroDivisionError" in bug.stderr


@pytest.mark.one_version  # starts several programs
def test_ctrl_c_a_closed_pipe_and_a_poor_terminal():
    # What started the tests may have had Ctrl-C ignored, and programs inherit that.
    body = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    body += "print('ready', flush=True); time.sleep(60)"
    program = [sys.executable, "-c", PROGRAM.format(body=body)]
    env = environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stderr and running.stdout.readline() == "ready\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(30) == 130 and running.stderr.read() == "interrupted\n"
    program[-1] = PROGRAM.format(body="[print('x' * 1000) for _ in range(1000)]")
    with subprocess.Popen(program, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        assert running.stdout and running.stderr
        running.stdout.close()
        assert running.wait(60) == 141 and running.stderr.read() == ""
    program[-1] = PROGRAM.format(body="print('caf\\u00e9')")
    told = subprocess.run(program, env=env | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert (told.returncode, told.stdout) == (0, "caf\\xe9\n")


def test_a_file_has_one_writer_until_that_dies(tmp_path):
    """As of two equal `generate --prompts --output`: the second is refused, and goes on when the first is killed."""
    program = "import pathlib, sys, time\nfrom retention_jax.runtime import files\n"
    program += "with files.locked(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    time.sleep(60)"
    path, env = tmp_path / "out.jsonl", environment(PYTHONPATH=str(ROOT))
    with subprocess.Popen([sys.executable, "-c", program, path], env=env, stdout=subprocess.PIPE, text=True) as first:
        assert first.stdout and first.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match="out.jsonl: in use by another process"), files.locked(path):
            pass
        first.kill()
        first.wait()
    with files.locked(path):
        pass


def test_a_torn_line_is_read_as_torn_and_cut_off_before_the_next(tmp_path):
    path = tmp_path / "deep" / "lines.jsonl"
    assert files.read_json_lines(path) == ([], b"")
    files.append_json_line(path, {"a": 1}, {"b": "é"})
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"c": "\xc3')
    assert files.read_json_lines(path) == ([{"a": 1}, {"b": "é"}], b'{"c": "\xc3')
    files.append_json_line(path, 3)
    assert path.read_bytes() == whole + b"3\n"
    path.write_bytes(b"torn")
    files.append_json_line(path, 4)
    assert path.read_bytes() == b"4\n"
    path.write_bytes(b"no\n5\n")
    problem, five = files.read_json_lines(path).values
    assert isinstance(problem, ValueError) and five == 5
    with pytest.raises(ValueError):
        files.append_json_line(path, float("nan"))
    assert path.read_bytes() == b"no\n5\n"


def test_ten_problems_are_named_and_the_rest_counted():
    told = files.first_problems([f"line {i}" for i in range(1, 13)]).splitlines()
    assert told == [*(f"line {i}" for i in range(1, 11)), "and 2 more"]
    assert files.first_problems(["one"]) == "one" and files.first_problems([]) == ""
