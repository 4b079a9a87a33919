"""What train.py tells before and after training: sizes, times, the results table, what to do next."""

import math
import shlex
import shutil
import sys
import time
from pathlib import Path

from huggingface_hub import constants

from data import Batches
from estimates import gap_recovered, mean_loss
from hub import BUILT_IN, read_config, size_to_fetch, weight_names
from memory import StepMemory
from ouroboros import Ouroboros
from output import reader_is_gone
from processes import WORLD_SIZE
from sources import FINEWEB

FEW_SEQUENCES = 200  # a loss on fewer has a large error, and training soon knows them by heart

# ---- Before training -------------------------------------------------------------------------------------


def announce_download(options):
    """Print how much is fetched from the Hub, and the room on the disk. What is in the cache is not."""
    sizes = []  # in bytes; None where the Hub does not tell it
    if options.model not in BUILT_IN and not Path(options.model).is_dir():
        read_config(options.model)  # a model that cannot be run is refused before it is announced
        sizes.append(size_to_fetch(options.model, weight_names(options.model)))
    if options.data == "fineweb-edu":
        tokens = options.steps * options.accumulation * options.batch_size * options.seq_len
        sizes.append(size_to_fetch(FINEWEB, shard_names(tokens), repo_type="dataset"))
    if not any(size is None or size > 0 for size in sizes):
        return

    hub_cache = Path(constants.HF_HUB_CACHE)
    while not hub_cache.exists():
        hub_cache = hub_cache.parent
    free = shutil.disk_usage(hub_cache).free / 1e9
    amount = "files of unknown size"
    if None not in sizes:
        amount = f"about {readable_size(sum(sizes))}"
    print(f"{amount} are fetched from the Hub, once and when needed; {free:.0f} GB are free", flush=True)


def shard_names(tokens: int) -> list[str]:
    """The shards of FineWeb-Edu, of 100M tokens each, that hold so many tokens, and the one held out."""
    names = ["finewebedu_val_000000.bin"]
    for i in range(1, 1 + min(99, math.ceil(tokens / 1e8))):
        names.append(f"finewebedu_train_{i:06d}.bin")
    return names


def readable_size(size: float) -> str:
    """A number of bytes in MB or GB."""
    if size < 1e8:
        return f"{size / 1e6:.1f} MB"
    return f"{size / 1e9:.1f} GB"


def print_text(source, training: Batches, held_out: Batches, eval_sequences: int):
    """Print how much text there is for training and held out, and a warning where it is little."""
    for note in source.notes:
        print(note)
    counts = {"training text": training.count(), "held-out text": held_out.count()}
    for name, count in counts.items():
        amount = f"{count.documents:,} documents, {count.tokens:,} tokens, {count.sequences:,} sequences"
        if not count.is_all:
            amount = f"the first {amount}, and more"
        print(f"{name}: {amount}", flush=True)
        if count.is_all and count.sequences < FEW_SEQUENCES:
            print(
                f"warning: {name} of {count.sequences} sequences is too little to say much about other text; "
                f"give more text, or a smaller --seq-len than {training.length}"
            )
        if count.is_all and count.sequences < eval_sequences:
            print(
                f"each loss on {name} is the mean over its {count.sequences} sequences, not {eval_sequences}"
            )


def announce_evaluation(options, model: Ouroboros, training: Batches):
    """Print what differs between an evaluation and the training of its run."""
    if options.text_hash != training.text_hash():
        print(f"this is another text than that on which {options.out} was trained")
    if options.depth != model.depth:
        print(f"the loop takes {options.depth} steps here; {options.out} was trained with {model.depth}")


def print_parameters(model: Ouroboros):
    """Print the number of parameters of each trained part, of the bases and of the frozen base."""
    counts = {}
    for name, p in model.trained_parameters().items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + p.numel()
    counts["trained, float32"] = sum(counts.values())
    counts["frozen SVD bases"] = sum(basis.numel() for basis in model.buffers())
    counts["frozen base"] = sum(p.numel() for p in model.parameters() if not p.requires_grad)

    print()
    for name, count in counts.items():
        print(f"{name:20}{count:>15,} parameters", flush=True)


def announce_memory(step: StepMemory, options):
    """Print what is done about a training step that does not fit in the free memory of a GPU.

    options: those of the run, for the advice where the step does not fit in any way.
    """
    if step.fits:
        return
    print(
        f"\na training step may take {readable_size(step.needed)}, and {readable_size(step.free)} are free: "
        "activation checkpointing is on; --no-activation-checkpointing turns it off",
        flush=True,
    )
    if step.fits_recomputed:
        return
    advice = "a smaller --seq-len or --model"
    if options.batch_size > 1:
        sequences = options.batch_size * options.accumulation
        advice = f"--batch-size 1 --accumulation {sequences}, or {advice}"
    size = readable_size(step.needed_recomputed)
    print(f"warning: even so, it may take {size}; if it does not fit, try {advice}", flush=True)


def announce_time(model: Ouroboros, loss_of, batch, options, first_step: int):
    """Print how long the training will take, by the faster of two passes over a batch (ids, targets)."""
    steps = options.steps - first_step
    if steps == 0:  # of a run that had ended
        return
    seconds = min(seconds_of_a_pass(model, loss_of, batch), seconds_of_a_pass(model, loss_of, batch))
    duration = readable_time(seconds * options.accumulation * steps / WORLD_SIZE)
    size = f"{options.accumulation} x {options.batch_size} x {options.seq_len}"
    print(f"\n{steps} steps of {size} tokens, about {duration}\n", flush=True)


def readable_time(seconds: float) -> str:
    """A time in seconds, at least one, in minutes or in hours."""
    if seconds < 100:
        return f"{max(1, seconds):.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:,.1f} h"


def seconds_of_a_pass(model: Ouroboros, loss_of, batch) -> float:
    """The time of one forward and backward pass. The gradients are thrown away."""
    started = time.perf_counter()
    loss_of(*batch).backward()
    sum(p.grad.sum() for p in model.trained_parameters().values()).item()  # waits for the device
    seconds = time.perf_counter() - started
    model.zero_grad()
    return seconds


def announce_stop(run: Path):
    """Print how a run goes on that was stopped. The reader of standard output may be gone."""
    place = shlex.quote(str(run))
    stream = sys.stderr if reader_is_gone(sys.stdout) else sys.stdout
    print(f"stopped, and saved. To continue: python train.py --resume {place}", file=stream)
    print(f"To see how good it is so far: python train.py --eval {place}", file=stream)


# ---- After training --------------------------------------------------------------------------------------


def print_results(model: Ouroboros, results: dict, depth: int):
    """Print the results table and the notes on it. depth: that of the evaluation of the looped model."""
    print()
    for row in results_table(model, results, depth):
        print_row(row)
    for note in results_notes(results):
        print(note)


def print_row(row: list[str]):
    """Print a row of a table: its name and its cells."""
    print(f"{row[0]:24}" + "".join(f"{cell:>18}" for cell in row[1:]))


def results_table(model: Ouroboros, results: dict, depth: int) -> list[list[str]]:
    """The rows of the results table, with a head row: the losses of the full, the cut and the looped model,
    and the share of the gap recovered.
    """
    columns = list(results["full"])

    rows = [["", *columns]]
    for key, name in model_names(model, depth).items():
        losses = [str(mean_loss(results[key][column])) for column in columns]
        rows.append([name, *losses])

    shares = [gap_recovered(results, column) for column in columns]
    rows.append(["gap recovered", *("no gap" if share is None else share.percent() for share in shares)])
    return rows


def results_notes(results: dict) -> list[str]:
    """What a reader of the results table has to know, a line each."""
    notes = []
    shares = [gap_recovered(results, column) for column in results["full"]]
    if None in shares:
        notes.append("no gap: on this text the full model is no better than the cut one")
    if any(share is not None and share.mean > 1 for share in shares):
        notes.append("above 100%: unlike the full model, the looped one was trained on this kind of text")
    notes.append("Losses are in nats per token, with their standard error over the sequences.")
    return notes


def model_names(model: Ouroboros, depth: int) -> dict[str, str]:
    """What the full, the cut and the looped model are called in a table."""
    layers_kept = len(model.prelude) + 1 + len(model.coda)
    return {
        "full": f"full model ({model.config.num_hidden_layers} layers)",
        "cut": f"cut to {layers_kept} layers",
        "ouroboros": f"ouroboros, depth {depth}",
    }


def announce_next(run: Path, last: Path):
    """Print where a run is that has ended, and what can be done with it. last: its newest checkpoint."""
    place = shlex.quote(str(run))
    print(f"\nAll of it is in {run}.")
    print(f'To continue a prompt:      python sample.py {place} --compare --prompt "..."')
    print(f'To look inside the loop:   python look.py {place} --prompt "..."')
    print(f"To share it on the Hub:    hf upload YOU/NAME {shlex.quote(str(last))}")


def print_skipped_steps(log: list[dict]):
    """Print how many of a run's steps were skipped, if there are any."""
    skipped = sum(row["loss"] is None for row in log)
    if skipped:
        print(f"{skipped} of {len(log)} steps had no finite loss and changed no weight; try a smaller --lr")
