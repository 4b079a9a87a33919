"""plot.py: what the picture of a run shows."""

import math

import pytest

pytest.importorskip("matplotlib")

from files import write_json
from plot import loss_figure, running_means, write_beside
from run_folder import read_results

FULL, CUT = 2.0, 4.0


def log(*held_out, at_start=None) -> list[dict]:
    """A log of ten steps for each of these held-out losses."""
    rows = [{"step": step, "loss": 3.0} for step in range(1, 1 + 10 * len(held_out))]
    for i, loss in enumerate(held_out):
        rows[10 * i + 9]["held_out"] = loss
    if at_start is not None:
        rows[0]["held_out_at_start"] = at_start
    return rows


def results(loss: float) -> dict:
    """The results of a run that has ended with this held-out loss."""
    return {
        "full": {"held-out": [FULL - 0.5, FULL + 0.5]},
        "cut": {"held-out": [CUT - 0.5, CUT + 0.5]},
        "ouroboros": {"held-out": [loss - 0.4, loss + 0.4]},
    }


def texts(figure) -> list[str]:
    """What is written beside the axes."""
    return [text.get_text() for text in figure.axes[0].texts]


def held_out_curve(figure) -> list[tuple]:
    """The points of the curve of held-out losses, which is the only one with markers."""
    [line] = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    return list(zip(line.get_xdata(), line.get_ydata()))


def shaded(figure) -> list[tuple]:
    """The corners of the shaded area."""
    corners = []
    for area in figure.axes[0].collections:
        for path in area.get_paths():
            corners += [tuple(corner) for corner in path.vertices]
    return corners


def test_the_held_out_curve_begins_with_the_untrained_model_at_step_0():
    figure = loss_figure("run", log(3.5, 3.0, at_start=4.5), None)
    assert held_out_curve(figure) == [(0, 4.5), (10, 3.5), (20, 3.0)]
    older = loss_figure("run", log(3.5, 3.0), None)
    assert held_out_curve(older) == [(10, 3.5), (20, 3.0)]


def test_the_lines_of_the_full_and_the_cut_model_are_named_and_so_is_the_share_between_them():
    figure = loss_figure("run", log(3.5, 3.0), results(3.0))
    assert "cut model, held-out: 4.00" in texts(figure)
    assert "full model, held-out: 2.00" in texts(figure)
    assert "held-out: 3.00" in texts(figure)
    assert "50.0 ± 5.0% of the gap" in texts(figure)
    levels = [line.get_ydata()[0] for line in figure.axes[0].lines if line.get_linestyle() in (":", "--")]
    assert sorted(levels) == [FULL, CUT]

    running = loss_figure("run", log(3.5, 3.0), None)
    assert not any("model" in text or "gap" in text for text in texts(running))


def test_what_is_shaded_lies_between_the_held_out_curve_and_the_cut_model():
    corners = shaded(loss_figure("run", log(3.5, 3.0, at_start=4.5), results(3.0)))
    assert (5.0, CUT) in corners  # where the curve crosses the line
    assert (20.0, 3.0) in corners
    assert all(3.0 <= height <= CUT for _, height in corners)


def test_a_model_worse_than_the_cut_one_has_a_negative_share_and_nothing_is_shaded():
    figure = loss_figure("run", log(5.0, 6.0), results(6.0))
    assert any(text.startswith("-100.0 ±") for text in texts(figure))
    assert not shaded(figure)


def test_the_results_of_older_runs_are_means_and_their_share_has_no_error(tmp_path):
    means = {model: {"held-out": loss} for model, loss in (("full", 2.0), ("cut", 4.0), ("ouroboros", 3.0))}
    write_json(tmp_path / "results.json", means)
    write_json(tmp_path / "args.json", {"model": "tiny", "data": "python", "steps": 20})
    figure = loss_figure("run", log(3.5, 3.0), read_results(tmp_path, 20))
    assert "50.0% of the gap" in texts(figure)
    assert read_results(tmp_path, 19) is None  # it goes on after its end


def test_a_step_without_a_number_is_left_out_of_the_running_mean():
    assert running_means([1.0, 2.0, math.nan, 4.0, 6.0], 3) == [1.0, 1.5, 1.5, 3.0, 5.0]
    assert math.isnan(running_means([math.nan], 2)[0])
    rows = log(3.5, 3.0)
    rows[-1].update(loss=None, held_out=None)
    assert "held-out: 3.50" in texts(loss_figure("run", rows, None))


def test_labels_of_lines_at_the_same_height_stand_one_above_the_other():
    axes = loss_figure("run", log(3.5, 3.0), None).axes[0]
    before = len(axes.texts)
    write_beside(
        axes, [(3.0, "a", "black"), (3.0, "b", "black"), (3.001, "c", "black"), (math.nan, "d", "black")]
    )
    added = axes.texts[before:]
    assert [text.get_text() for text in added] == ["a", "b", "c"]
    heights = [text.get_position()[1] for text in added]
    assert heights[1] - heights[0] > 0.05
    assert heights[2] - heights[1] > 0.05


def test_a_long_name_is_written_on_several_lines():
    figure = loss_figure("-".join(["option1"] * 15), log(3.0), None)
    assert max(map(len, figure.axes[0].get_title().splitlines())) <= 70
