"""Figures: a picture is written, and its title says what the rows show."""

import pytest
from helpers import row

from retention_jax.evaluation import plots


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
        ((0.76, 0.74, 0.78), "retention with 48 of 768 entries is level with the full cache"),
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
