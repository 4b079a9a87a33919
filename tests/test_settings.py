"""Settings that make no sense are refused in one line when a model is made, and not later."""

import pytest
from helpers import small_model, small_patched, tokens

from files import UserError
from ouroboros import MAX_STEPS


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"depth": 0}, "depth 0: give a whole number from 1 to 64"),
        ({"depth": 65}, "depth 65: give a whole number from 1 to 64"),
        ({"rank": 0}, "rank 0 does not fit this model: its smallest projection allows 1 to 16"),
        ({"rank": 17}, "rank 17 does not fit this model: its smallest projection allows 1 to 16"),
        ({"prelude": 0}, "is not a cut of"),
        ({"coda": 0}, "is not a cut of"),
        ({"recurrent": 4}, "is not a cut of"),
        ({"recurrent": 1}, "is not a cut of"),
        ({"prelude": 3, "coda": 2}, "is not a cut of"),
        ({"pool": "max"}, "pool 'max': give one of prefix, sequence"),
        ({"modulation": "dynamic"}, "modulation 'dynamic': give one of controller, static, none"),
    ],
    ids=str,
)
def test_a_setting_that_makes_no_sense_is_one_clear_error(settings, message):
    for make in (small_model, small_patched):
        with pytest.raises(UserError, match=message) as caught:
            make(**settings)
        assert "\n" not in str(caught.value)


def test_an_unknown_train_coda_is_one_clear_error():
    with pytest.raises(UserError, match="train_coda 'some': give one of none, norms, lora, all"):
        small_patched(train_coda="some")


def test_the_largest_settings_that_make_sense_are_taken():
    small_model(rank=16, depth=MAX_STEPS)
    small_model(prelude=1, recurrent=1, coda=1)
    small_model(prelude=3, recurrent=3, coda=1)  # a single layer is removed


def test_a_forward_pass_takes_at_least_one_step_of_the_loop():
    model = small_model()
    for depth in (0, -1):
        with pytest.raises(UserError, match=f"depth {depth}: the loop takes at least one step"):
            model(tokens(), depth=depth)
        with pytest.raises(UserError, match=f"depth {depth}: the loop takes at least one step"):
            model.generate(tokens(), 1, depth=depth)
