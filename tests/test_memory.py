"""The memory of a training step is counted, and by the GPU train.py decides how and what it trains."""

import json
from argparse import Namespace

import pytest
import torch
from helpers import (
    SMALL,
    FixedBatches,
    looped,
    quick_run,
    small_model,
    small_patched,
    small_qwen,
    training_options,
)

import options as options_module
import qwen
import train
from device import free_memory, gpu_of
from fast import recompute_activations
from memory import (
    MARGIN,
    PeakMemory,
    StepMemory,
    attend_as_on_cuda,
    attention_as_on_cuda,
    memory_of_step,
    meta_twin,
    training_peak,
)
from options import parse_options
from presets import GPU
from report import announce_memory

CUT = dict(prelude=2, recurrent=3, coda=2, rank=4)
PAPER = dict(CUT, depth=3)
PATCHED = dict(CUT, depth=2, seams=True, train_coda="all", modulation="none")
KINDS = pytest.mark.parametrize("settings", [PAPER, PATCHED], ids=["Ouroboros", "Patched"])
TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

B, T = 2, 256  # of a step; so long that the activations take more than the weights
MLP = 3 * B * T * SMALL.intermediate_size * 4  # bytes that silu(gate) * up keeps: gate, silu(gate) and up


def size_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def twin_of(settings: dict, dtype=torch.float32):
    twin, _ = meta_twin(looped(small_qwen(dtype=dtype), **settings))
    return twin


# ---- The twin --------------------------------------------------------------------------------------------


@KINDS
@TYPES
def test_a_twin_has_the_tensors_of_its_model_without_their_content(settings, dtype):
    def tensors_of(model) -> dict:
        tensors = {}
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensors[name] = (tensor.shape, tensor.dtype, tensor.requires_grad)
        return tensors

    full = small_qwen(dtype=dtype)
    model = looped(full, **settings)
    twin, full_twin = meta_twin(model)
    assert type(twin) is type(model)
    assert tensors_of(twin) == tensors_of(model)
    assert tensors_of(full_twin) == tensors_of(full)
    assert all(p.is_meta for p in [*twin.parameters(), *twin.buffers(), *full_twin.parameters()])
    assert {p.dtype for p in twin.trained_parameters().values()} == {torch.float32}
    assert twin.norm.weight.dtype == dtype


# ---- The count -------------------------------------------------------------------------------------------


@KINDS
@TYPES
@pytest.mark.parametrize("distill", [0.0, 0.5])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_counted_is_what_is_alive_in_a_step_that_is_computed(settings, dtype, distill, recompute):
    full = small_qwen(dtype=dtype)
    model = looped(full, **settings)
    twin, full_twin = meta_twin(model)
    if recompute:
        recompute_activations(model)
        recompute_activations(twin)
    computed = training_peak(model, B, T, full, distill)
    counted = training_peak(twin, B, T, full_twin, distill)
    assert counted == pytest.approx(computed, rel=0.03)


def test_the_weights_their_gradients_and_their_moments_are_counted():
    """They are most of what there is in a step of one token, and each gradient is added to an earlier one."""
    twin = twin_of(PAPER)
    trained = size_of(twin.trained_parameters().values())
    weights = size_of(twin.parameters()) + size_of(twin.buffers())
    least = weights + 3 * trained
    assert least < training_peak(twin, 1, 1) < 1.5 * (least + trained)


def test_the_moments_are_there_while_the_activations_are():
    twin = twin_of(PAPER)
    ids = torch.zeros(B, T, dtype=torch.int64, device="meta")
    twin.loss(ids, ids).backward()  # makes the gradients
    gradients = [p.grad for p in twin.trained_parameters().values()]
    tensors = [*twin.parameters(), *twin.buffers(), *gradients, ids]
    with attention_as_on_cuda(), PeakMemory(tensors) as memory:
        twin.loss(ids, ids).backward()
    moments = 2 * size_of(twin.trained_parameters().values())
    assert training_peak(twin, B, T) == pytest.approx(memory.peak + moments, rel=0.001)


def test_each_step_of_the_loop_takes_at_least_what_its_mlp_keeps():
    peaks = [training_peak(twin_of(dict(PAPER, depth=depth)), B, T) for depth in (1, 2, 3)]
    assert peaks[1] - peaks[0] > MLP
    assert peaks[2] - peaks[1] > MLP


def test_each_sequence_takes_as_much_as_the_one_before_it():
    twin = twin_of(PAPER)
    peaks = [training_peak(twin, sequences, T) for sequences in (1, 2, 3)]
    mlps = (3 + 2) * MLP / B  # of three steps of the loop and two layers of the coda
    assert peaks[1] - peaks[0] > mlps
    assert peaks[2] - peaks[1] == pytest.approx(peaks[1] - peaks[0], rel=0.03)
    assert training_peak(twin, 1, 2 * T) == pytest.approx(peaks[1], rel=0.03)


def test_activation_checkpointing_takes_less():
    twin = twin_of(PAPER)
    plain = training_peak(twin, B, T)
    recompute_activations(twin)
    assert training_peak(twin, B, T) < plain - 3 * MLP


def test_distillation_takes_the_layers_that_were_cut_out_too():
    twin, full = meta_twin(small_patched())
    kept = {id(p) for p in twin.parameters()}
    removed = size_of(p for p in full.parameters() if id(p) not in kept)
    plain = training_peak(twin, B, T, full)
    assert removed > 0
    assert training_peak(twin, B, T, full, 0.5) >= plain + removed


# ---- The stand-in for attention --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, key_heads", [(torch.float32, 6), (torch.bfloat16, 2)], ids=str)
def test_the_stand_in_keeps_what_a_fused_kernel_keeps(dtype, key_heads):
    """Queries, keys, values, output, and a number in float32 for each query. In float32 the keys and values
    have been repeated for each of the six query heads.
    """
    q = torch.randn(2, 6, 5, 8, dtype=dtype, requires_grad=True)
    k, v = torch.randn(2, 2, 2, 5, 8, dtype=dtype, requires_grad=True).unbind()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        y = attend_as_on_cuda(q, k, v)
    inputs = [(2, 6, 5, 8), (2, key_heads, 5, 8), (2, key_heads, 5, 8)]
    assert kept == [*inputs, (2, 6, 5, 8), (2, 6, 5)]
    for x, gradient in zip((q, k, v), torch.autograd.grad(y.sum(), (q, k, v))):
        assert gradient.shape == x.shape


def test_the_stand_in_is_gone_after_a_count_and_after_an_error():
    real = qwen.attend
    training_peak(twin_of(PAPER), 1, 8)
    assert qwen.attend is real
    with pytest.raises(KeyError), attention_as_on_cuda():
        assert qwen.attend is attend_as_on_cuda
        raise KeyError
    assert qwen.attend is real


# ---- The decision ----------------------------------------------------------------------------------------


def options_of(activation_checkpointing="auto", **changes) -> Namespace:
    options = dict(batch_size=B, accumulation=8, seq_len=T, distill=0.0)
    options.update(changes, activation_checkpointing=activation_checkpointing)
    return Namespace(**options)


def test_a_step_is_counted_with_the_options_of_the_run_and_a_margin():
    model = small_patched()
    twin, full = meta_twin(model)
    step = memory_of_step(model, options_of(distill=0.5), free=7)
    assert step.free == 7
    assert step.needed == MARGIN * training_peak(twin, B, T, full, 0.5)
    recompute_activations(twin)
    assert step.needed_recomputed == MARGIN * training_peak(twin, B, T, full, 0.5)
    shorter = memory_of_step(model, options_of(distill=0.5, seq_len=T // 2), free=7)
    assert shorter.needed < step.needed


@pytest.mark.parametrize(
    "free, fits, fits_recomputed",
    [(24e9, True, True), (12e9, False, True), (8e9, False, True), (4e9, False, False)],
)
def test_eleven_gigabytes_and_a_tenth_fit_in_24_and_not_in_12_or_8(free, fits, fits_recomputed):
    step = StepMemory(needed=MARGIN * 11e9, needed_recomputed=MARGIN * 4.3e9, free=free)
    assert step.fits == fits
    assert step.fits_recomputed == fits_recomputed


def announced(step: StepMemory, options: Namespace, capsys) -> list[str]:
    announce_memory(step, options)
    return capsys.readouterr().out.strip().splitlines()


def test_what_is_done_is_said_in_a_line_and_what_may_fail_in_another(capsys):
    enough = StepMemory(needed=8e9, needed_recomputed=4e9, free=8e9)
    assert announced(enough, options_of(), capsys) == []

    switched = StepMemory(needed=12.4e9, needed_recomputed=4.7e9, free=12.2e9)
    (line,) = announced(switched, options_of(), capsys)
    assert line == (
        "a training step may take 12.4 GB, and 12.2 GB are free: activation checkpointing is on; "
        "--no-activation-checkpointing turns it off"
    )

    too_small = StepMemory(needed=12.4e9, needed_recomputed=4.7e9, free=4.0e9)
    _, warning = announced(too_small, options_of(), capsys)
    assert warning.startswith("warning: even so, it may take 4.7 GB")
    assert warning.endswith("try --batch-size 1 --accumulation 16, or a smaller --seq-len or --model")
    _, warning = announced(too_small, options_of(batch_size=1), capsys)
    assert warning.endswith("if it does not fit, try a smaller --seq-len or --model")


def test_auto_decides_by_the_free_memory_of_a_cuda_gpu_and_leaves_the_options_alone(monkeypatch, capsys):
    model = small_model()
    cuda = torch.device("cuda")
    needed = memory_of_step(model, options_of(), 0).needed
    options = options_of()
    for free, expected in ((needed + 1, False), (needed - 1, True)):
        monkeypatch.setattr(train, "free_memory", lambda device, free=free: free)
        assert train.decide_checkpointing(model, options, cuda) == expected
        assert ("activation checkpointing is on" in capsys.readouterr().out) == expected
    assert options.activation_checkpointing == "auto"


def test_without_cuda_or_with_a_word_on_the_command_line_nothing_is_counted():
    def decide(word, device: str) -> bool:
        return train.decide_checkpointing(None, options_of(word), torch.device(device))

    assert decide("auto", "cpu") is False
    assert decide("auto", "mps") is False
    for device in ("cpu", "mps", "cuda"):
        assert decide(True, device) is True
        assert decide(False, device) is False


def test_the_program_says_it_recomputes_and_saves_no_decision(pretrained, tmp_path, monkeypatch, capsys):
    """The whole of train.py, whose CPU is taken for a GPU without free memory when it decides."""

    def decide_checkpointing(model, options, device):
        return decide(model, options, torch.device("cuda"))

    def recompute(model):
        recomputed.append(model)
        recompute_activations(model)

    decide = train.decide_checkpointing
    recomputed = []
    monkeypatch.setattr(train, "decide_checkpointing", decide_checkpointing)
    monkeypatch.setattr(train, "free_memory", lambda device: 1)
    monkeypatch.setattr(train, "recompute_activations", recompute)
    program, *arguments = map(str, quick_run(pretrained, 1))
    monkeypatch.setattr("sys.argv", [program, "--device", "cpu", *arguments, "--out", str(tmp_path / "run")])
    train.main()

    assert len(recomputed) == 1
    printed = capsys.readouterr().out
    assert printed.count("activation checkpointing is on") == 1
    assert printed.count("warning: even so") == 1
    saved = json.loads((tmp_path / "run" / "args.json").read_text())
    assert saved["activation_checkpointing"] == "auto"


@pytest.mark.parametrize("saved", ["auto", False, True])
def test_a_resumed_run_has_its_own_setting_until_the_command_line_has_another(saved, tmp_path):
    options, _ = parse_options(["--device", "cpu"])
    vars(options).update(vars(training_options(tmp_path, steps=1)), activation_checkpointing=saved)
    train.train(small_model(), FixedBatches(), FixedBatches(), options, torch.device("cpu"))

    def resumed(*arguments):
        options, _ = parse_options(["--resume", str(tmp_path), *arguments])
        return options.activation_checkpointing

    assert resumed() == saved
    assert resumed("--activation-checkpointing") is True
    assert resumed("--no-activation-checkpointing") is False


# ---- The default model -----------------------------------------------------------------------------------

LARGE = "Qwen/Qwen2.5-3B"
SMALL_ONE = "Qwen/Qwen2.5-0.5B"


@pytest.mark.parametrize(
    "memory, multiplies_bfloat16, model",
    [
        (25.3e9, True, LARGE),
        (12.6e9, True, LARGE),  # a nominal 12 GB
        (8.4e9, True, SMALL_ONE),
        (15.8e9, False, SMALL_ONE),  # a T4
        (25.3e9, False, SMALL_ONE),
    ],
)
def test_the_default_model_is_the_one_that_the_gpu_can_train(
    memory, multiplies_bfloat16, model, monkeypatch, capsys
):
    gpu = GPU(int(memory), multiplies_bfloat16)
    monkeypatch.setattr(options_module, "gpu_of", lambda device: gpu)
    options, _ = parse_options(["--device", "cpu"])
    assert (options.model, options.data, options.seq_len) == (model, "fineweb-edu", 2048)
    assert options.activation_checkpointing == "auto"
    assert options.name == f"{model.split('/')[1]}-fineweb-edu"
    lines = capsys.readouterr().out.splitlines()
    if model == LARGE:
        assert lines == []
    else:
        (line,) = lines
        has = "native bfloat16" if multiplies_bfloat16 else "no native bfloat16"
        start = (
            f"{SMALL_ONE} is the default on this GPU ({memory / 1e9:.1f} GB, {has}), because {LARGE} asks for"
        )
        assert line.startswith(start)


def test_only_the_first_process_speaks_of_the_smaller_model_and_only_where_it_was_not_asked_for(
    monkeypatch, capsys
):
    monkeypatch.setattr(options_module, "gpu_of", lambda device: GPU(8_000_000_000, True))
    parse_options(["--device", "cpu", "--model", SMALL_ONE])
    with pytest.raises(SystemExit):
        parse_options(["--device", "cpu", "--help"])
    helped = capsys.readouterr().out
    assert f"--model {SMALL_ONE} on this machine" in " ".join(helped.split())
    assert "is the default on this GPU" not in helped

    monkeypatch.setattr(options_module, "RANK", 1)
    options, _ = parse_options(["--device", "cpu"])
    assert options.model == SMALL_ONE
    assert capsys.readouterr().out == ""


def test_without_a_cuda_gpu_there_is_none_to_describe():
    assert gpu_of(torch.device("cpu")) is None
    assert gpu_of(torch.device("mps")) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_gpu_is_described_by_its_memory():
    device = torch.device("cuda:0")
    gpu = gpu_of(device)
    before = free_memory(device)
    assert 0 < before <= gpu.memory
    held = torch.empty(2**28, dtype=torch.uint8, device=device)
    assert free_memory(device) == pytest.approx(before, abs=2**26)  # what this process holds counts as free
    del held
