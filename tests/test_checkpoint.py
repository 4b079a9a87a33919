"""checkpoint.py, and Ouroboros.save and load: what was saved comes back bit for bit or is refused."""

import shutil

import numpy as np
import pytest
import torch
from helpers import (
    SETTINGS,
    folder_of,
    looped,
    loss_and_gradients,
    move_trained_weights,
    shard,
    small_model,
    small_qwen,
    tokens,
)
from safetensors.torch import load_file, save_file

import checkpoint
from checkpoint import (
    optimizer_tensors,
    prune_checkpoints,
    read_checkpoint,
    restore_optimizer,
    step_folder,
    write_checkpoint,
)
from files import UserError, replace_file
from hub import fingerprint
from ouroboros import Ouroboros
from patch import load_run
from qwen import Qwen


@pytest.fixture
def base(tmp_path):
    """The folder of a small pretrained model."""
    return folder_of(small_qwen(), tmp_path / "base")


# ---- Saved and loaded ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_a_saved_model_comes_back_bit_for_bit(name, base, tmp_path):
    model = looped(Qwen.from_pretrained(base), rank=4, depth=3, **SETTINGS[name])
    move_trained_weights(model, 0.1)
    model.save(tmp_path / "run")
    again = type(model).load(tmp_path / "run")
    assert torch.equal(again(tokens()), model(tokens()))
    assert again.settings == model.settings
    assert again.trained_parameters().keys() == model.trained_parameters().keys()


def test_a_model_is_saved_without_its_base_and_loaded_without_an_svd(base, tmp_path, monkeypatch):
    model = Ouroboros(Qwen.from_pretrained(base), rank=4)
    model.save(tmp_path / "run")
    tensors, _ = read_checkpoint(tmp_path / "run")
    assert tensors.keys() == {name for name in model.state_dict() if name.startswith(("lora.", *TRAINED))}

    monkeypatch.setattr("ouroboros.svd_bases", lambda R, rank: pytest.fail("an SVD was made"))
    again = Ouroboros.load(tmp_path / "run")
    assert torch.equal(again(tokens()), model(tokens()))


TRAINED = ("controller.", "gate.", "step_norm.")


def test_the_tensors_of_a_checkpoint_do_not_change_with_its_file(tmp_path):
    write_checkpoint(tmp_path, {"x": torch.arange(1000)}, {})
    tensors, _ = read_checkpoint(tmp_path)
    path = tmp_path / "ouroboros.safetensors"
    with open(path, "r+b") as file:  # in place: a file that is mapped into memory would be seen to change
        file.write(bytes(path.stat().st_size))
    assert torch.equal(tensors["x"], torch.arange(1000))


def test_the_bases_of_layers_that_were_not_loaded_must_be_given(base):
    qwen = Qwen.from_pretrained(base, layers=[0, 1, 3, 4, 5])
    with pytest.raises(ValueError, match="the removed layers were not loaded"):
        Ouroboros(qwen, prelude=2, recurrent=3, coda=2, rank=4)


def test_more_tensors_and_notes_are_kept_beside_the_model(base, tmp_path):
    model = Ouroboros(Qwen.from_pretrained(base), rank=4)
    model.save(tmp_path / "run", {"more": torch.arange(3)}, step=7, note={"a": [1, None]})
    tensors, about = read_checkpoint(tmp_path / "run")
    assert torch.equal(tensors["more"], torch.arange(3))
    assert about["step"] == 7
    assert about["note"] == {"a": [1, None]}
    assert about["model"]["settings"] == model.settings
    assert torch.equal(Ouroboros.load(tmp_path / "run")(tokens()), model(tokens()))


def test_the_optimizer_goes_on_bit_for_bit_where_it_was_saved(tmp_path):
    def steps(model, optimizer, seeds):
        for seed in seeds:
            loss_and_gradients(model, tokens(seed=seed), tokens(seed=seed + 100))
            optimizer.step()

    model = small_model()
    parameters = model.trained_parameters()
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.01)
    steps(model, optimizer, range(3))
    moments = optimizer_tensors(optimizer, parameters)
    write_checkpoint(tmp_path, {**model.saved_tensors(), **moments}, {})
    steps(model, optimizer, range(3, 6))

    again = small_model()
    tensors, _ = read_checkpoint(tmp_path)
    again.load_state_dict({name: tensors[name] for name in again.saved_tensors()}, strict=False)
    optimizer = torch.optim.AdamW(again.trained_parameters().values(), lr=0.01)
    restore_optimizer(optimizer, again.trained_parameters(), tensors)
    steps(again, optimizer, range(3, 6))
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


# ---- The base --------------------------------------------------------------------------------------------


def test_a_model_is_refused_on_another_base_and_opened_where_its_base_was_moved(base, tmp_path):
    model = Ouroboros(Qwen.from_pretrained(base), prelude=2, recurrent=3, coda=2, rank=4)
    model.save(tmp_path / "run")
    other = folder_of(small_qwen(seed=1), tmp_path / "other")
    with pytest.raises(
        UserError, match="other is not the model on which .*run was trained: the weights differ"
    ):
        Ouroboros.load(tmp_path / "run", base=other)

    moved = shutil.move(base, tmp_path / "moved")
    with pytest.raises(UserError, match="base: no such folder"):
        Ouroboros.load(tmp_path / "run")
    again = Ouroboros.load(tmp_path / "run", base=moved)
    assert torch.equal(again(tokens()), model(tokens()))


@pytest.mark.parametrize("key, value", [("rope_theta", 2e4), ("rms_norm_eps", 1e-5), ("eos_token_id", 7)])
def test_a_base_whose_config_was_changed_is_refused_with_the_number(key, value, base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    folder_of(small_qwen(), base, **{key: value})
    with pytest.raises(UserError, match=f"{key} in config.json is .*, and was ") as caught:
        Ouroboros.load(tmp_path / "run")
    assert "the weights differ" not in str(caught.value)


def change_layer(base, layer: int):
    """Change one matrix of a layer a little."""
    state = load_file(base / "model.safetensors")
    state[f"model.layers.{layer}.mlp.up_proj.weight"] *= 1.01
    save_file(state, base / "model.safetensors")


@pytest.mark.parametrize("layer", range(6))
def test_a_base_of_which_any_layer_was_changed_is_refused(layer, base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), prelude=1, coda=1, rank=4).save(tmp_path / "run")
    change_layer(base, layer)
    with pytest.raises(UserError, match="the weights differ"):
        Ouroboros.load(tmp_path / "run")


def test_the_fingerprint_is_that_of_the_files_that_were_loaded(base, tmp_path):
    model = Ouroboros(Qwen.from_pretrained(base), rank=4)
    change_layer(base, 0)
    model.save(tmp_path / "run")
    with pytest.raises(UserError, match="the weights differ"):
        Ouroboros.load(tmp_path / "run")


def test_a_base_is_recognised_when_its_files_are_spread_another_way(base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    before = fingerprint(base)
    shard(base)
    assert fingerprint(base) == before
    assert Ouroboros.load(tmp_path / "run").depth == 8


def test_a_model_whose_base_was_in_no_file_is_loaded_with_a_base_that_is_named(base, tmp_path):
    model = small_model()
    model.save(tmp_path / "run")
    with pytest.raises(UserError, match="was not loaded from files; say where .* --model FOLDER"):
        Ouroboros.load(tmp_path / "run")
    assert torch.equal(Ouroboros.load(tmp_path / "run", base=base)(tokens()), model(tokens()))


def test_a_base_is_recognised_in_bfloat16_too(base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    rounded = Ouroboros.load(tmp_path / "run", dtype=torch.bfloat16)
    assert rounded.norm.weight.dtype == torch.bfloat16
    assert rounded.depth == 8
    rounded.save(tmp_path / "again")
    assert Ouroboros.load(tmp_path / "again", dtype=torch.float32).depth == 8


# ---- Damage ----------------------------------------------------------------------------------------------


def test_a_damaged_or_missing_checkpoint_is_named(base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    weights = tmp_path / "run" / "ouroboros.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(UserError, match="ouroboros.safetensors: cannot be read as a whole checkpoint"):
        Ouroboros.load(tmp_path / "run")


def test_a_mistyped_run_is_refused_with_the_runs_that_there_are(base, tmp_path, monkeypatch):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "runs" / "tiny")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("hub.hf_hub_download", lambda *_, **__: pytest.fail("the Hub was asked"))
    for load in (Ouroboros.load, load_run):
        for name in ("runs/tinny", "runs"):
            with pytest.raises(UserError, match=f"{name}: no such run; the runs in runs are: tiny"):
                load(name)
    monkeypatch.chdir(base)
    with pytest.raises(UserError, match="runs/tinny: no such run, and none in runs"):
        Ouroboros.load("runs/tinny")


@pytest.fixture
def two_checkpoints(base, tmp_path):
    """A run's folder with the checkpoints of two models: after step n, one of depth n."""
    for step in (1, 2):
        model = Ouroboros(Qwen.from_pretrained(base), prelude=2, recurrent=3, coda=2, rank=4, depth=step)
        model.save(step_folder(tmp_path / "run", step), {"more": torch.arange(3)}, step=step)
    return tmp_path / "run"


def test_a_model_is_not_saved_where_another_one_would_be_loaded(two_checkpoints):
    model = Ouroboros.load(two_checkpoints)
    step = step_folder(two_checkpoints, 2)
    whole = (step / "ouroboros.safetensors").read_bytes()
    with pytest.raises(UserError, match="holds the checkpoints of a run.*choose another folder"):
        model.save(two_checkpoints)
    with pytest.raises(UserError, match="a checkpoint from which a run can go on"):
        model.save(step)
    assert (step / "ouroboros.safetensors").read_bytes() == whole
    assert not (two_checkpoints / "ouroboros.safetensors").exists()


def assert_the_one_before_is_read(run, path, capsys):
    """The damaged file is named in one line on stderr, and the checkpoint of step 1 is read."""
    capsys.readouterr()
    _, about = read_checkpoint(run)
    error = capsys.readouterr().err
    assert about["step"] == 1
    assert error.startswith(f"{path}: ")
    assert error.count("\n") == 1
    assert "the checkpoint before it is read instead" in error
    assert Ouroboros.load(run).depth == 1


def test_a_flipped_bit_is_recognised_and_the_checkpoint_before_is_read(two_checkpoints, capsys):
    path = step_folder(two_checkpoints, 2) / "ouroboros.safetensors"
    whole = path.read_bytes()
    tensors, about = read_checkpoint(two_checkpoints)
    assert about["step"] == 2
    assert capsys.readouterr().err == ""

    rng = np.random.default_rng(0)
    recognised = 0
    for n in range(60):
        broken = bytearray(whole)
        end = len(whole) if n % 2 else 3000  # every second flip is in the header
        broken[rng.integers(end)] ^= 1 << rng.integers(8)
        path.write_bytes(broken)
        found, found_about = read_checkpoint(two_checkpoints)
        if found_about["step"] == 1:
            assert_the_one_before_is_read(two_checkpoints, path, capsys)
            recognised += 1
        else:  # a bit that says nothing, such as a blank in the header
            assert found_about == about
            assert found.keys() == tensors.keys()
            for name, tensor in tensors.items():
                assert torch.equal(found[name], tensor)
    assert recognised >= 57


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing"])
def test_a_checkpoint_of_another_length_is_recognised_and_the_one_before_is_read(
    damage, two_checkpoints, capsys
):
    path = step_folder(two_checkpoints, 2) / "ouroboros.safetensors"
    whole = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(whole[:-9])
    elif damage == "longer":
        path.write_bytes(whole + b"x")
    elif damage == "empty":
        path.write_bytes(b"")
    assert_the_one_before_is_read(two_checkpoints, path, capsys)


def test_if_no_checkpoint_is_whole_the_oldest_is_named(two_checkpoints):
    path = step_folder(two_checkpoints, 1) / "ouroboros.safetensors"
    path.write_bytes(path.read_bytes()[:99])
    shutil.rmtree(step_folder(two_checkpoints, 2))
    message = "step-0000001/ouroboros.safetensors: cannot be read as a whole checkpoint"
    with pytest.raises(UserError, match=message) as caught:
        read_checkpoint(two_checkpoints)
    assert "\n" not in str(caught.value)


# ---- Other code ------------------------------------------------------------------------------------------


def change_saved_tensors(run, change):
    """Save a run again, whole, after change(tensors)."""
    tensors, about = read_checkpoint(run)
    change(tensors)
    write_checkpoint(run, tensors, about)


def test_a_model_that_other_code_saved_is_refused_with_the_tensor_that_is_missing(base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")

    def another_shape(tensors):
        tensors["gate.linear.bias"] = torch.zeros(33)

    change_saved_tensors(tmp_path / "run", another_shape)
    message = r"was saved by other code: it has no gate.linear.bias of shape \[32\]"
    with pytest.raises(UserError, match=message):
        Ouroboros.load(tmp_path / "run")

    def another_name(tensors):
        tensors["gate.bias"] = tensors.pop("gate.linear.bias")

    change_saved_tensors(tmp_path / "run", another_name)
    with pytest.raises(UserError, match="was saved by other code: it has no gate.linear.bias"):
        Ouroboros.load(tmp_path / "run")

    def without_a_basis(tensors):
        tensors["gate.linear.bias"] = tensors.pop("gate.bias")
        del tensors["lora.v_proj.B"]

    change_saved_tensors(tmp_path / "run", without_a_basis)
    with pytest.raises(UserError, match="was saved by other code: it has no lora.v_proj.B"):
        Ouroboros.load(tmp_path / "run")


def test_a_part_that_this_code_does_not_have_is_not_dropped_without_a_word(base, tmp_path):
    class Larger(Ouroboros):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            self.memory = torch.nn.Linear(2, 2)

    model = Larger(Qwen.from_pretrained(base), rank=4)
    Larger.__name__ = "Ouroboros"  # the class was changed, trained, and changed back
    model.save(tmp_path / "run")
    with pytest.raises(UserError, match="was saved by other code: it has memory.bias"):
        Ouroboros.load(tmp_path / "run")


def test_a_setting_or_a_file_of_other_code_is_named(base, tmp_path):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    tensors, about = read_checkpoint(tmp_path / "run")
    about["model"]["settings"]["warp"] = 9
    write_checkpoint(tmp_path / "run", tensors, about)
    with pytest.raises(UserError, match="saved by other code: Ouroboros has no setting warp"):
        Ouroboros.load(tmp_path / "run")
    write_checkpoint(tmp_path / "run", tensors, {})
    for load in (Ouroboros.load, load_run):
        with pytest.raises(UserError, match="saved by other code: it holds no model"):
            load(tmp_path / "run")
    about["model"].pop("num_layers")
    write_checkpoint(tmp_path / "run", tensors, about)
    with pytest.raises(UserError, match="saved by other code: it does not say its num_layers"):
        load_run(tmp_path / "run")
    save_file({"x": torch.zeros(1)}, tmp_path / "run" / "ouroboros.safetensors")
    with pytest.raises(UserError, match="ouroboros.safetensors: was not saved by this program"):
        load_run(tmp_path / "run")


def test_a_mistake_in_changed_code_keeps_its_traceback(base, tmp_path, monkeypatch):
    Ouroboros(Qwen.from_pretrained(base), rank=4).save(tmp_path / "run")
    monkeypatch.setattr("ouroboros.Gate", lambda d: None + d)
    with pytest.raises(TypeError, match="unsupported operand"):
        Ouroboros.load(tmp_path / "run")


def test_a_checkpoint_of_another_format_is_refused_with_a_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    write_checkpoint(tmp_path, {"x": torch.zeros(1)}, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="was saved by another version of this program"):
        read_checkpoint(tmp_path)


# ---- On the disk -----------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    replace_file(path, lambda part: part.write_text("old"))

    def fail_half_way(part):
        part.write_text("ha")
        raise OSError("the disk is gone")

    with pytest.raises(UserError, match="file.txt: cannot be written .*the disk is gone.*make room"):
        replace_file(path, fail_half_way)
    assert path.read_text() == "old"
    assert list(path.parent.iterdir()) == [path]

    replace_file(path, lambda part: part.write_text("new"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


def test_the_newest_two_checkpoints_stay_and_what_others_put_there(tmp_path):
    for step in (0, 5, 10, 15, 20):
        step_folder(tmp_path, step).mkdir()
    (tmp_path / "step-0000010-mine").mkdir()
    prune_checkpoints(tmp_path, newest=15)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["step-0000010", "step-0000010-mine", "step-0000015"]


@pytest.mark.parametrize(
    "first_bad_step, left",
    [(None, [15, 20]), (21, [15, 20]), (12, [10, 15, 20]), (11, [5, 15, 20]), (1, [15, 20])],
)
def test_the_newest_checkpoint_that_a_good_step_followed_stays(first_bad_step, left, tmp_path):
    for step in (0, 5, 10, 15, 20):
        step_folder(tmp_path, step).mkdir()
    prune_checkpoints(tmp_path, 20, first_bad_step)
    assert sorted(tmp_path.iterdir()) == [step_folder(tmp_path, step) for step in left]
