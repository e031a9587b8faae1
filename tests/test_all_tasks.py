"""Every benchmark of which there are real files, from the command to results: loaded, answered and scored."""

import json
import pathlib
import shutil
import sys

import numpy as np
import pytest
from absl import flags
from helpers import tiny_model
from text_helpers import TEMPLATE

from retention_jax import evaluate
from retention_jax.evaluation import journal, plan, rows
from retention_jax.models import gate_files, weights

pytestmark = pytest.mark.slow  # one sweep over every task

ROOT = pathlib.Path(__file__).parent.parent
SHARED = ROOT.parent / "shared" / "data"
LENGTH, NEW_TOKENS, BUDGET, RECENT = 512, 3, 8, 16
TASKS = {  # file, metric, and tokens that the longer one of the first two prompts may have
    "gsm8k": ("gsm8k/test.jsonl", "accuracy", (50, 300)),
    "math500": ("math500/test.jsonl", "accuracy", (50, 300)),
    "longproc/countdown_0.5k": ("longproc/countdown_0.5k.json", "accuracy", (4000, 6000)),
    "longproc/path_traversal_0.5k": ("longproc/path_traversal_0.5k.json", "accuracy", (1723, 1900)),
    "longproc/partial_accuracy/tom_tracking_0.5k": (
        "longproc/tom_tracking_0.5k.json",
        "partial_accuracy",
        (2216, 2400),
    ),
    "ruler_rows/niah_multikey_3": ("ruler/niah_multikey_3_4096.jsonl", "string_match_all", (3116, 3400)),
    "ruler/niah_single_2": ("text/tinyshakespeare.txt", "string_match_all", (LENGTH, LENGTH)),
    "conversation": ("books/log_school_house.txt", "accuracy", (LENGTH, LENGTH)),
    "perplexity": ("text/wikitext2_test.txt", "perplexity", (LENGTH, LENGTH)),
}


def sources(folder):
    """The files, each prompt of LongProc's beside its rows as where it is published."""
    found = {}
    for task, (file, *_) in TASKS.items():
        found[task] = SHARED / file
        if task.startswith("longproc/"):
            plain = found[task].stem.rpartition("_")[0]
            (folder / plain).mkdir()
            shutil.copy(SHARED / "longproc" / f"{plain}_prompts.yaml", folder / plain / "prompts.yaml")
            found[task] = pathlib.Path(shutil.copy(found[task], folder / plain))
    return [f"{task}={path}" for task, path in found.items()]


def evaluated(folder, monkeypatch):
    """Output of the evaluation's command, with a tiny random model under a real tokenizer."""
    backbone, gates, output = (folder / name for name in ("backbone", "gates", "out"))
    model = tiny_model(vocab_size=50304)
    weights.save_backbone(model, backbone)
    gate_files.save_gates(model, gates)
    shutil.copy(SHARED / "tokenizer" / "neox" / "tokenizer.json", backbone)
    config = {"eos_token": "<|endoftext|>", "chat_template": TEMPLATE}
    (backbone / "tokenizer_config.json").write_text(json.dumps(config))
    values = flags.FlagValues()
    evaluate.define_flags(values)
    given = {
        "config": ROOT / "configs" / "instruct.py",
        "config.backbone": backbone,
        "config.dtype": "float32",
        "config.eval.recent": RECENT,
        "config.eval.examples": 1,
        "config.eval.seeds": 2,
        "checkpoint": gates,
        "output": output,
        "tasks": ",".join(TASKS),
        "sources": ",".join(sources(folder)),
        "policies": "retention",
        "budgets": BUDGET,
        "lengths": LENGTH,
        "limit": 2,
        "config.eval.batch_size": 2,
        "config.eval.max_new_tokens": NEW_TOKENS,
        "prefill_chunk": 16,  # the width that the shortest prompts are padded to: all share their programs
    }
    # Overrides of a config file are looked for in the program's own arguments.
    monkeypatch.setattr(sys, "argv", ["evaluate", *(f"--{name}={value}" for name, value in given.items())])
    # One device: on a mesh of the tests' eight, two prompts would be read as eight.
    monkeypatch.setattr(plan, "mesh_of", lambda config: None)
    evaluate.main(values(sys.argv), values)
    return output


# ml_collections imports config files by a call that Python 3.12 deprecates.
@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")
@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data")
def test_all_tasks_from_command_to_rows(tmp_path, monkeypatch):
    output = evaluated(tmp_path, monkeypatch)
    found = {row.task: row for row in rows.load(output / "results.json")}
    assert list(found) == list(TASKS)
    path = output / "journal-0.jsonl"
    units = journal.read(output, json.loads(path.read_text().splitlines()[0])["fingerprint"])
    for task, row in found.items():
        _, metric, (shortest, longest) = TASKS[task]
        assert (row.metric, row.policy, row.budget, row.samples) == (metric, "retention", BUDGET, 1)
        assert shortest <= row.length <= longest, task
        # Layers, heads, slots; keys and values of 8 numbers, a score and a position, of 4 bytes each.
        assert row.kv_bytes == 2 * 2 * (BUDGET + RECENT) * (2 * 8 + 2) * 4 < row.full_kv_bytes
        assert row.seconds > 0 and row.tokens_per_second > 0
        assert row.low <= row.score <= row.high
        if task == "perplexity":
            assert row.n == 2 * (LENGTH - 1) and row.score > 1000, "random weights, 50,304 tokens"
            continue
        results = [result for unit, result in units.items() if unit.task == task]
        answers = [answer for result in results for answer in result["answers"]]
        assert (row.n, row.seeds, len({answer["example"] for answer in answers})) == (2, 1, 2)
        assert all(1 <= answer["tokens"] <= NEW_TOKENS and answer["text"] for answer in answers)
        assert row.score == np.mean([result["scores"] for result in results]) and 0 <= row.score <= 1
        assert len(row.groups) == (2 if task == "math500" else 0), "levels of the two problems"
