"""How tokens are drawn when flags and generation_config.json say different things, and what is summed over replies."""

from retention_jax.generation import conversation
from retention_jax.generation.conversation import Totals


def test_defaults_come_from_generation_config():
    settings = conversation.drawing_settings
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    file = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "eos_token_id": 1}
    assert settings(file, {}) == {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0}
    assert settings(file, {"top_k": 0, "temperature": 0.0, "min_p": None}) == {
        **neutral,
        "temperature": 0.0,
        "top_p": 0.95,
    }
    assert settings({**file, "do_sample": False}, {}) == settings({}, {}) == {**neutral, "temperature": 0.0}
    assert settings({"do_sample": True, "top_p": None}, {}) == neutral


def test_a_cut_that_was_given_asks_for_drawing():
    settings = conversation.drawing_settings
    for name, value in (("top_p", 0.9), ("top_k", 5), ("min_p", 0.1)):
        found = settings({}, {name: value})
        assert found["temperature"] == 1.0 and found[name] == value
    assert settings({"temperature": 0.6}, {"top_p": 0.9})["temperature"] == 0.6
    assert settings({}, {"top_p": 0.9, "temperature": 0.0})["temperature"] == 0.0
    assert settings({}, {"top_p": 1.0, "top_k": 0})["temperature"] == 0.0


def test_totals_sum_over_batches_and_keep_the_largest_buffer():
    stats = {name: float(i) for i, name in enumerate(Totals._fields, 1)}
    totals = Totals().add(stats).add({name: value / 2 for name, value in stats.items()})
    assert totals == Totals(1.5, 3.0, 4.5, 6.0, 7.5, 6.0, 7.0)
