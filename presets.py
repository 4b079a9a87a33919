"""The defaults of train.py's options, by model and device.

Nothing here needs torch, so that experiments/runs.py, which compares runs with the defaults, starts at once.
"""

from dataclasses import dataclass

PAPER_MODEL = "Qwen/Qwen2.5-3B"
SMALL_MODEL = "Qwen/Qwen2.5-0.5B"
MEMORY_FOR_PAPER_MODEL = 12e9  # bytes; a nominal GPU of 12 GB has a little more

# Defaults by model and device. "cuda" is the paper's recipe at 1,000 of its 18,750 steps.
PRESETS = {
    "tiny": dict(
        steps=1000,
        seq_len=256,
        batch_size=4,
        accumulation=1,
        lr=2e-3,
        norm_lr_scale=50.0,
        warmup=20,
        eval_sequences=128,
    ),
    "cpu": dict(
        steps=60,
        seq_len=256,
        batch_size=4,
        accumulation=1,
        lr=1e-3,
        norm_lr_scale=50.0,
        warmup=6,
        eval_sequences=32,
    ),
    "cuda": dict(
        steps=1000,
        seq_len=2048,
        batch_size=2,
        accumulation=16,
        lr=3e-4,
        norm_lr_scale=1.0,
        warmup=50,
        eval_sequences=32,
    ),
}


@dataclass(frozen=True)
class GPU:
    """What the defaults have to know of a CUDA GPU."""

    memory: int  # all of it, in bytes
    multiplies_bfloat16: bool  # natively

    def __str__(self) -> str:
        bfloat16 = "native bfloat16" if self.multiplies_bfloat16 else "no native bfloat16"
        return f"{self.memory / 1e9:.1f} GB, {bfloat16}"


def default_model(gpu: GPU | None) -> str:
    """The model that a GPU can train. None: there is no CUDA GPU."""
    if gpu is None:
        return "tiny"
    if gpu.multiplies_bfloat16 and gpu.memory >= MEMORY_FOR_PAPER_MODEL:
        return PAPER_MODEL
    return SMALL_MODEL


def default_options(given: dict, gpu: GPU | None) -> dict:
    """{option: its default} for the options of a new run that have one.

    given: {option: value}, where the value is None for an option that is not given. gpu: the CUDA GPU of the
    run, or None.
    """
    model = given.get("model") or default_model(gpu)
    if model == "tiny":
        preset = PRESETS["tiny"]
    elif gpu is None:
        preset = PRESETS["cpu"]
    else:
        preset = PRESETS["cuda"]

    defaults = dict(
        preset,
        depth=8,
        rank=32,
        modulation="controller",
        pool="prefix",
        gate=True,
        step_norm=True,
        patch=False,
        train_coda="none",
        seam_tokens=0,
        distill=0.0,
        model=model,
        data="python" if gpu is None else "fineweb-edu",
        target_offset=1,
        seed=0,
        device="auto",
        dtype="auto",
        compile="auto",
        activation_checkpointing="auto",
        save_every=100,
    )
    if given.get("patch"):  # what did best on held-out text
        defaults.update(depth=1, modulation="none", train_coda="all", lr=3 * preset["lr"])
        defaults.update(seam_tokens=12_288)
    if given.get("patch") and given.get("target_offset") != 2:  # the full model predicts the next token
        # The full model's forward pass takes half of the time of a step.
        defaults.update(distill=0.5, steps=preset["steps"] // 2)
    steps = given.get("steps")
    if steps is None:
        steps = defaults["steps"]
    defaults["eval_every"] = max(1, steps // 5)
    return defaults


def fitting_warmup(warmup: int, steps: int) -> int:
    """The steps of a warm-up: at most half of all steps."""
    return min(warmup, max(1, steps // 2))
