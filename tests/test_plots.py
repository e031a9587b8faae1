"""Figures: a picture is written, and its title says what the rows show."""

import pytest
from helpers import row

from retention_jax.evaluation import plots
from retention_jax.policies.table import FULL


def test_figure_is_a_picture(tmp_path):
    plots.quality([row(policy="full", budget=768)], tmp_path / "full.png")
    plots.quality([row(), row(length=192)], tmp_path / "one.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("full.png", "one.png"))
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="rows of one task"):
        plots.quality([row(), row(task="text")], tmp_path / "none.png")


@pytest.mark.parametrize(
    "full, wanted",
    [
        ((0.61, 0.60, 0.62), "retention with 48 of 768 entries\nbeats the full cache by 14.0 points"),
        ((0.76, 0.74, 0.78), "retention with 48 of 768 entries\nis level with the full cache"),
        ((0.90, 0.89, 0.91), "retention with 48 of 768 entries\nfalls short of the full cache by 15.0 points"),
    ],
)
def test_title_says_what_the_longest_rows_show(full, wanted):
    longest = [row(policy="full", budget=768)._replace(score=full[0], low=full[1], high=full[2]), row()]
    others = [row(policy="random", score=0.2), row(budget=768, score=1.0), row(length=192, score=0.99)]
    assert plots.message(longest + others) == f"recall at 768 tokens: {wanted}"


def test_title_without_a_full_cache_is_the_score_itself():
    wanted = "recall at 768 tokens: retention with 48 of 768 entries\n% of answers right: 75.0"
    assert plots.message([row(), row(policy="random", score=0.2)]) == wanted


def test_title_knows_that_fewer_bits_are_better():
    text = row(task="text", metric="bits_per_byte")
    rows = [
        text._replace(policy="full", budget=768, score=2.5, low=2.4, high=2.6),
        text._replace(score=2.0, low=2.0, high=2.0),
    ]
    rows.append(text._replace(policy="random", score=3.0, low=3.0, high=3.0))
    assert plots.message(rows).endswith("retention with 48 of 768 entries\nbeats the full cache by 0.500 bits per byte")


def scored(score, policy="retention", budget=3, length=36, **changes):
    return row(policy=policy, budget=budget, length=length, score=score, low=score, high=score, **changes)


# Warnings are errors here. 3 is a value around which Matplotlib 3.11.2 chooses limits of no width.
@pytest.mark.parametrize("figure", [plots.quality, plots.memory])
@pytest.mark.parametrize(
    "rows",
    {
        "all scores 0": [scored(0.0, FULL, 36), scored(0.0), scored(0.0, "random"), scored(0.0, budget=6)],
        "all scores 1": [scored(1.0, FULL, 36), scored(1.0)],
        "one point": [scored(0.0)],
        "one point of 3 bytes": [scored(0.5, kv_bytes=3)],
        "the full cache alone": [scored(0.0, FULL, 3, 3, kv_bytes=3)],
        "one budget at two lengths": [scored(0.5), scored(0.0, length=72)],
        "one length without the full cache": [scored(0.5, FULL, 36), scored(0.5, length=72)],
        "one length of the full cache alone": [scored(0.5, FULL, 36), scored(0.5, FULL, 72), scored(0.5, length=72)],
        "equal bits": [scored(2.5, FULL, 36, metric="bits_per_byte"), scored(2.5, metric="bits_per_byte")],
    }.items(),
    ids=lambda named: named[0],
)
def test_degenerate_results_are_drawn(tmp_path, figure, rows):
    figure(rows[1], tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 5000


def test_one_speed_is_drawn_and_none_refused(tmp_path):
    plots.speed([plots.Speed("one", 3, 3.0)], tmp_path / "speed.png", "title")
    assert (tmp_path / "speed.png").stat().st_size > 5000
    for bad in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="a speed must be positive and finite, got .*bad"):
            plots.speed([plots.Speed("bad", 1024, bad)], tmp_path / "none.png", "title")


def test_curves_of_a_run(tmp_path, monkeypatch):
    """A level line for what was scored once, because no gate changes it, and a line through the steps for the rest."""
    figures = []
    monkeypatch.setattr(plots.Figure, "savefig", lambda figure, *args, **kwargs: figures.append(figure))
    full = scored(0.9, policy=FULL, budget=36)
    text = scored(2.0, task="text", metric="bits_per_byte")
    steps = [(10, [full, scored(0.1), scored(0.3, policy="streaming"), text]), (20, [scored(0.4)]), (30, [scored(0.6)])]
    losses = [{"step": 10, "loss": 2.0, "kl": 0.5, "ce": 1.5, "capacity": 0.1}, {"step": 20, "loss": 1.0}]
    plots.curves(steps, losses, tmp_path / "curves.png")
    plots.curves(steps[:1], [], tmp_path / "curves.png")
    monkeypatch.undo()
    recall, bits, of_losses = figures[0].axes
    assert recall.get_title() == "recall, 36 tokens" and bits.get_ylabel() == "bits per byte, lower is better"
    lines = {
        tuple(line.get_ydata()): list(line.get_xdata()) for line in recall.lines if len(line.get_xdata()) in (2, 3)
    }
    assert lines[10.0, 40.0, 60.0] == [10, 20, 30] and {(90.0, 90.0), (30.0, 30.0)} <= lines.keys()
    assert [list(line.get_ydata()) for line in of_losses.lines] == [[2.0, 1.0], [0.5], [1.5], [0.1]]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
        "full cache",
        "retention, 3 kept",
        "streaming, 3 kept",
    ]
    with pytest.raises(ValueError, match="no score to draw"):
        plots.curves([(10, [])], losses, tmp_path / "none.png")
