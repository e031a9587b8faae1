"""Traces against plain loops over the buffer; the report's page: whole, harmless, and with the numbers it was given."""

import base64
import functools
import gzip
import html.parser
import json
import re

import helpers
import jax
import numpy as np
import pytest
from absl import flags
from helpers import tiny_model, tokens_of

from retention_jax import cache as cache_lib
from retention_jax.config import CacheConfig
from retention_jax.generation import decoding
from retention_jax.models import decoder
from retention_jax.models.inputs import Inputs
from retention_jax.report import __main__ as command
from retention_jax.report import charts, page, results, traces
from retention_jax.report.results import Results
from retention_jax.report.traces import NEVER

pytestmark = pytest.mark.one_version

T = 26
NAMES = [f"t{i}" for i in range(T)]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def record(model, tokens, cache, **changes):
    given = {"names": NAMES, "title": "tiny", "policy": cache.policy}
    return traces.record(model, tokens, cache, **(given | changes))


@pytest.fixture(scope="module")
def traced(model):
    return record(model, tokens_of(1, T), CacheConfig(budget=3, recent=4))


# Traces.


@jax.jit
def read(model, tokens, valid, buffer):
    inputs = Inputs(tokens, valid)
    alone = decoder.extend(model, inputs, buffer, queries=0)
    return alone.entries, decoding.read_chunk(model, inputs, buffer, prompt=False)[1]


@pytest.mark.parametrize(
    "cache", [CacheConfig(budget=3, recent=4), CacheConfig(budget=2, recent=5, policy="streaming", protect_last=1)]
)
def test_trace_is_what_a_loop_over_kept_positions_sees(model, cache):
    tokens, R = tokens_of(1, T), cache.recent
    got = record(model, tokens, cache)
    evicted = np.full((2, 2, T), -1)
    buffer = cache_lib.empty(model.config, cache, 1)
    for start in range(0, T, R):
        valid = np.arange(start, start + R)[None] < T
        new, buffer = read(model, np.resize(tokens[start:], R)[None], valid, buffer)
        if got.log_beta is not None:
            scores = np.asarray(new.stat)[0, ..., : T - start]
            np.testing.assert_allclose(got.log_beta[..., start : start + R], scores, rtol=1e-5)
        seen = min(start + R, T)
        for layer, heads in enumerate(buffer.positions(0)):
            for head, kept in enumerate(heads):
                for pos in range(seen):
                    gone = pos not in kept
                    if gone and evicted[layer, head, pos] == -1:
                        evicted[layer, head, pos] = seen
                    assert gone == (not traces.kept_at(got, seen)[layer, head, pos])
    evicted[evicted == -1] = NEVER
    np.testing.assert_array_equal(got.evicted, evicted)
    assert (got.log_beta is None) == (cache.policy == "streaming")
    assert 0 < (got.evicted == NEVER).sum() <= 4 * cache.budget


def test_nothing_is_kept_before_it_arrives(traced):
    assert not traces.kept_at(traced, 8)[..., 8:].any()
    assert traces.kept_at(traced, 2)[..., :2].all()


def test_half_life_by_hand():
    log_beta = np.log(np.array([0.5, 0.25, 2.0**-0.01], np.float32))
    np.testing.assert_allclose(traces.half_life(log_beta), [1, 0.5, 100], rtol=1e-5)
    assert traces.half_life(np.zeros(1, np.float32)) == np.inf


def test_trace_file_round_trips(traced, tmp_path):
    odd = traced._replace(names=["", "é", "</script>", "日本", *NAMES[4:]], title="ti 'tle")
    traces.save(odd, tmp_path / "a.npz")
    same_trace(traces.load(tmp_path / "a.npz"), odd)
    traces.save(odd._replace(log_beta=None), tmp_path / "b.npz")
    assert traces.load(tmp_path / "b.npz").log_beta is None


def same_trace(got, want):
    for name, a, b in zip(want._fields, got, want, strict=True):
        if isinstance(b, np.ndarray):
            np.testing.assert_array_equal(a, b, err_msg=name)
        else:
            assert a == b, name


def test_bad_traces_are_refused(model, traced, tmp_path):
    with pytest.raises(ValueError, match="token 32 is outside the model's vocabulary.*; 1 names for 2 tokens"):
        record(model, np.array([1, 32]), CacheConfig(budget=1), names=["a"])
    (path := tmp_path / "a.npz").write_bytes(b"PK\x03\x04 no zip")
    with pytest.raises(ValueError, match="a.npz: not a trace"):
        traces.load(path)
    np.savez(path, title=np.array("x"), evicted=np.zeros((1, 1, 2), np.int32))
    with pytest.raises(ValueError, match="lacks policy, budget, recent, text, ends"):
        traces.load(path)
    np.savez(path, a=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="not a trace"):
        traces.load(path)
    traces.save(traced._replace(evicted=traced.evicted[..., 1:]), path)
    with pytest.raises(
        ValueError, match=r"evicted has shape \(2, 2, 25\), but there are 26 tokens; log_beta has shape"
    ):
        traces.load(path)


# The page.

NASTY = "</script><img src=x onerror=alert(1)>"


class Reader(html.parser.HTMLParser):
    """Tags, attributes that load something, text, and the content of scripts, and whether every tag is closed."""

    def __init__(self):
        super().__init__()
        self.open, self.tags, self.loads, self.text, self.scripts = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "srcset", "action", "data")]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in ("meta", "link", "input", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)


row = functools.partial(helpers.row, kv_bytes=2000, full_kv_bytes=9000, tokens_per_second=900.0)

ROWS = [
    row(policy="full", budget=768, kv_bytes=9000),
    row(),
    row(budget=16, score=0.5, low=0.5, high=0.5, samples=7, cut=12, peak_bytes=3 * 2**30, groups={"level <i>": 0.125}),
    row(task=NASTY, policy="<b>&"),
]


@pytest.fixture(scope="module")
def folder(traced, tmp_path_factory):
    path = tmp_path_factory.mktemp("results")
    run = {"device": NASTY, "versions": {"jax": "0.10.2"}, "config": {}}
    rows = [r._asdict() | {"other": 1} for r in ROWS]
    (path / "results.json").write_text(json.dumps({"run": run, "rows": rows}))
    traces.save(traced._replace(names=[NASTY, *NAMES[1:]], title=NASTY), path / "a.trace.npz")
    traces.save(traced._replace(title="another"), path / "b.trace.npz")
    return path


@pytest.fixture(scope="module")
def page_text(folder):
    return page.build(results.read(folder), "A title & more", 10**6)


def parsed(text):
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    return reader


def unpack(text, dtype):
    return np.frombuffer(gzip.decompress(base64.b64decode(text)), dtype)


def test_page_is_whole_and_asks_the_network_for_nothing(page_text):
    reader = parsed(page_text)
    assert reader.loads == ["data:,", "#main"]  # an empty icon, or a browser asks a server for one
    assert not re.search(r"https?://|@import|url\(|fetch\(|XMLHttpRequest", page_text)
    assert not {"iframe", "object", "embed"} & set(reader.tags)
    shown = " ".join(reader.text)
    for wanted in ("A title & more", "75.0", "73.0 to 77.0", "22.2%", "one score", "jax 0.10.2"):
        assert wanted in shown, wanted
    cells = [" ".join(text.split()) for text in reader.text if text.strip()]
    assert cells[cells.index("one score") + 1 :][:11] == [
        *("1.95 KiB", "22.2%", "90", "5", "7", "12", "1.00", "900", "3 GiB", "of these, level <i>", "12.5")
    ]


def test_names_in_data_are_harmless(page_text):
    reader = parsed(page_text)
    assert "img" not in reader.tags and "b" not in reader.tags
    assert reader.tags.count("script") == 2 and page_text.count("</script>") == 2
    assert any(NASTY in text for text in reader.text), "the task's name is shown as it is"


def test_page_holds_the_trace(page_text, traced):
    (data,) = json.loads(parsed(page_text).scripts[0])["traces"]
    names = json.loads(gzip.decompress(base64.b64decode(data["names"])))
    assert names == [NASTY, *NAMES[1:]] and data["heads"] == [[0, 0], [0, 1], [1, 0], [1, 1]]
    windows = unpack(data["windows"], "<u2").reshape(traced.evicted.shape).astype(int)
    back = np.minimum((np.arange(T) // data["recent"] + windows) * data["recent"], T)
    np.testing.assert_array_equal(np.where(windows == 0, NEVER, back), traced.evicted)
    half = data["half_lives"]
    values = unpack(half["values"], "u1").reshape(traced.evicted.shape)
    got = 2 ** (half["first"] + half["step"] * values.astype(float))
    np.testing.assert_allclose(np.log2(got), np.log2(traces.half_life(traced.log_beta)), atol=half["step"] * 0.51)


def test_a_head_that_never_forgets_and_a_page_without_room(traced):
    log_beta = np.where(np.arange(T) == 3, 0, traced.log_beta).astype(np.float32)
    values = page.quantise(log_beta).values
    assert (values[..., 3] == page.FOREVER).all() and (np.delete(values, 3, axis=-1) < page.FOREVER).all()
    assert page.shown_heads(traced, 2 * T).tolist() == [[0, 0], [1, 1]]
    assert page.trace_data(traced, 1)["heads"] == [[0, 0]]


def test_kept_over_time_and_by_head(traced):
    times, edges, share = results.kept_over_time(traced, bins=7)
    for column, seen in enumerate(times):
        kept = traces.kept_at(traced, int(seen))
        wanted = [kept[..., a:b].mean() for a, b in zip(edges, edges[1:], strict=False)]
        np.testing.assert_allclose(share[:, column], wanted)
    assert times[-1] == edges[-1] == T
    twice = results.kept_by_head([traced, traced._replace(evicted=np.full_like(traced.evicted, NEVER))])
    np.testing.assert_array_equal(twice, (traces.kept_at(traced, T).sum(axis=-1) + T) / 2)


NOTHING = dict(score=0.0, low=0.0, high=0.0)


@pytest.mark.parametrize(
    "rows",
    [
        [row(policy="full", budget=768, **NOTHING), row(budget=8, **NOTHING), row(budget=16, **NOTHING)],
        [row(policy="full", budget=768, **NOTHING)],
        [row(**NOTHING)],
        [row(low=0.75, high=0.75)],
        [row(metric="bits_per_byte", **NOTHING), row(metric="bits_per_byte", policy="full", **NOTHING)],
    ],
    ids=("all zero", "full cache alone", "one zero", "one point", "no bits"),
)
def test_degenerate_results_have_a_page(rows):
    """Every number that is drawn is finite and inside the chart."""
    policies = [name for name in dict.fromkeys(row.policy for row in rows) if name != "full"]
    for panel in (charts.quality(rows, policies), charts.memory(rows, policies)):
        points = [point for line in panel.lines for point in line.points] + ([panel.full] if panel.full else [])
        assert len(points) == len(rows)
        for point in points:
            assert 0 <= point.x <= charts.WIDTH
            assert all(0 <= y <= charts.HEIGHT for y in (point.y, point.low, point.high))
        assert len({tick.at for tick in panel.y_ticks}) >= 2
    assert parsed(page.build(Results({}, rows, []), "title", 10**6))


def test_results_from_before_rows_had_options_are_read(tmp_path):
    (old := row()._asdict()).pop("options")
    (tmp_path / "results.json").write_text(json.dumps([old]))
    assert results.read(tmp_path).rows == [row()]


def test_bad_results_are_refused(tmp_path):
    with pytest.raises(ValueError, match="neither results.json nor"):
        results.read(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        results.read(tmp_path)
    (tmp_path / "results.json").write_text(json.dumps([row()._asdict() | {"budget": "8"}, {}]))
    with pytest.raises(ValueError, match="row 0: budget must be of type int, got '8'; row 1: task must be"):
        results.read(tmp_path)


def test_command_writes_page_and_figures(folder, tmp_path, capsys):
    values = flags.FlagValues()
    command.define_flags(values)
    command.main(values(["report", f"--results={folder}", f"--output={tmp_path / 'new' / 'r.html'}"]), values)
    paths = sorted((tmp_path / "new").iterdir())
    assert sorted(capsys.readouterr().out.split()) == [str(p) for p in paths]
    pictures = [p for p in paths if p.suffix == ".png"]
    assert len(pictures) == 2 * 2 + 2 and all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)
    parsed((tmp_path / "new" / "r.html").read_text())
