"""Train an Ouroboros: python train.py --depth 8 --rank 32

On a CUDA GPU: Qwen2.5-3B, or Qwen2.5-0.5B if the GPU is small, on FineWeb-Edu with the paper's recipe.
Without one: the built-in tiny model on the Python source code of this machine, in a few minutes. Everything
a run leaves behind is in its folder, runs/NAME.
"""

import copy
import math
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from data import Batches, Tokens, open_text
from evaluate import Evaluation, labels_of
from ouroboros import Ouroboros
from patch import Patched, distillation_loss, mend_seams
from qwen import Qwen, load_tokenizer
from support import fast, report
from support.files import UserError, run_program
from support.machine import Workers, faster_threads, gpu_memory
from support.options import parse_options
from support.run import Run


def main(argv=None, new_model=None, **values) -> int:
    """Train as the command line says. Returns the exit code.

    new_model(qwen, options): makes the model, by default paper_or_patch. values: of options, also of those
    that the command line does not have, such as warmup. Raises UserError.
    """
    # ---- Options
    new_model = new_model or paper_or_patch
    options, checkpoint = parse_options(argv, **values)
    text = open_text(options.data)
    # A wrong rank or cut is told here, before gigabytes are fetched.
    new_model(Qwen.without_weights(options.model), options)
    fast.keep_freed_memory()

    with Workers(options) as workers, Run(options, workers, checkpoint) as run:
        device = workers.device
        torch.manual_seed(options.seed)
        run.say(f"{Path(options.model).name} on {text.name}, {device}, {workers.dtype}")

        # ---- Text
        tokenizer = load_tokenizer(options.model)
        training_text = Tokens(text, "train", tokenizer)
        held_out_text = Tokens(text, "held-out", tokenizer)
        run.check_text(training_text.hash())
        training = Batches(
            training_text, options.seq_len, options.target_offset, options.seed, options.repeats
        )
        evaluation = Evaluation.of_run(training_text, held_out_text, options)
        run.say(text_table(evaluation.columns))

        # ---- Model
        full = Qwen.from_pretrained(options.model, workers.dtype, device)
        if device.type == "cpu":
            options.threads = options.threads or faster_threads(partial(evaluation.held_out_loss, full, 1))
            torch.set_num_threads(options.threads)
        model = new_model(full, options)
        if any(p.requires_grad for p in full.parameters()):
            full = copy.deepcopy(full)  # a variant trains layers that both share
        if checkpoint is None:
            fit_to_text(model, full, training, options)
        run.say(parameter_table(model))
        cut = model.cut
        results = {"full": evaluation.results(full), "cut": evaluation.results(cut)}
        texts = {"full": evaluation.continue_text(full), "cut": evaluation.continue_text(cut)}

        optimizer = make_optimizer(model, options)
        # after the losses of the cut model, whose layers a variant may train
        first_step = run.restore(model, optimizer)
        workers.broadcast(model.saved_tensors().values())  # other hardware rounds the bases another way
        parameters = model.trained_parameters().values()
        loss_of = model.loss
        if options.distill > 0:
            loss_of = partial(distillation_loss, model, full, options.distill)
        speed_up(model, full, loss_of, training, options, device)
        del full  # and with it the layers that were cut out, unless distillation needs them

        # ---- Training
        if first_step == 0:
            run.say(f"step 0: held-out loss {evaluation.held_out_loss(model):.3f}")
        for step in range(first_step, options.steps):
            started = time.perf_counter()

            # ---- Learning rate
            rate = learning_rate(step, options)
            for group in optimizer.param_groups:
                group["lr"] = rate * group.get("scale", 1.0)  # which make_optimizer may set

            # ---- Forward and backward, on this process's share of the step's sequences
            loss = torch.zeros((), device=device)
            counted = torch.zeros((), device=device)  # the share of the step's targets that count
            first, end = workers.share(step)
            for ids, targets in training.batches(first, end, options.batch_size, device):  # [B, T] each
                # loss_of is the mean over the targets that count; this is their share of the step
                share = (targets != -100).sum() / (workers.sequences * options.seq_len)
                part = loss_of(ids, targets) * share
                part.backward()
                loss += part.detach()
                counted += share
            stop = torch.full_like(loss, run.wish_to_stop)
            numbers = torch.stack([loss, counted, stop])
            workers.sum([*(p.grad for p in parameters), numbers])  # over the processes of torchrun
            grad_norm = clip_grad_norm_(parameters, 1.0)
            # the only place in a step where the program waits for the device
            loss, counted, stop, grad_norm = torch.stack([*numbers, grad_norm]).tolist()
            loss /= counted
            if not math.isfinite(loss + grad_norm):
                raise run.diverged(step + 1)

            # ---- Step
            optimizer.step()
            optimizer.zero_grad()

            # ---- Evaluate, log, save
            tokens_per_s = workers.sequences * options.seq_len / (time.perf_counter() - started)
            row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm, "lr": rate}
            row["tokens_per_s"] = round(tokens_per_s)
            is_last = step + 1 == options.steps
            if is_last or (step + 1) % options.eval_every == 0:
                row["held_out"] = evaluation.held_out_loss(model)
                if not math.isfinite(row["held_out"]):
                    raise run.diverged(step + 1)
                row["copies_text"] = evaluation.copied_share(model)
                run.say(f"step {step + 1}: held-out loss {row['held_out']:.3f}")
            run.log(row)
            if is_last or stop or (step + 1) % options.save_every == 0:
                run.save(model, optimizer, step + 1)
            if stop:
                return run.stop()
        run.end()

        # ---- Results
        results["ouroboros"] = evaluation.results(model)
        texts["ouroboros"] = evaluation.continue_text(model)
        report.report(run, results, labels_of(model), evaluation.prompt(), texts)
        return 0


def paper_or_patch(qwen: Qwen, options) -> Ouroboros:
    """The model that the options ask for. Raises UserError for options that leave nothing to train."""
    settings = dict(depth=options.depth, rank=options.rank, modulation=options.modulation, pool=options.pool)
    if options.cut is not None:
        settings["prelude"], settings["recurrent"], settings["coda"] = options.cut
    if options.patch:
        return Patched(qwen, **settings)
    model = Ouroboros(qwen, gate=options.gate, step_norm=options.step_norm, **settings)
    if not model.trained_parameters():
        raise UserError("--modulation none --no-gate --no-step-norm leaves nothing to train; leave one out")
    return model


def fit_to_text(model: Ouroboros, full: Qwen, training: Batches, options):
    """Set what of a new model comes from text without a step of training: the seams of --patch."""
    if isinstance(model, Patched) and options.seam_tokens > 0:
        text = Batches(training.tokens, options.seq_len, seed=options.seed)  # without repeats
        sequences = text.at_most(math.ceil(options.seam_tokens / options.seq_len))
        ids, _ = text.batch(0, sequences, model.norm.weight.device)
        mend_seams(model, full, ids, options.batch_size)


def make_optimizer(model: Ouroboros, options) -> torch.optim.AdamW:
    """AdamW with a parameter group for each parameter; "scale" is its learning rate in units of the common
    one.

    The step norm's can be larger: it starts at 1 and has a long way to the size of the state. Only the
    matrices of linear maps decay. For a norm, a bias, an embedding or a table of diagonals, zero is not the
    neutral value or not a simpler one.
    """
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    groups = []
    for name, p in model.trained_parameters().items():
        scale = options.norm_lr_scale if name.startswith("step_norm") else 1.0
        decay = 0.01 if id(p) in matrices else 0.0
        groups.append({"params": [p], "scale": scale, "weight_decay": decay})
    fused = not model.norm.weight.is_mps
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=fused)


def learning_rate(step: int, options) -> float:
    """A linear warm-up of at most half of the steps, then a cosine that reaches zero after the last step."""
    warmup = min(options.warmup, max(1, options.steps // 2))
    if step < warmup:
        return options.lr * ((step + 1) / warmup)
    done = (step - warmup) / max(1, options.steps - warmup)
    return options.lr * 0.5 * (1 + math.cos(math.pi * done))


def speed_up(model: Ouroboros, full: Qwen, loss_of, training: Batches, options, device):
    """torch.compile, by default on CUDA, and activation checkpointing on a GPU with little memory."""
    compiled = options.compile == "on" or (options.compile == "auto" and device.type == "cuda")
    if compiled:
        fast.compile_blocks(model, full if options.distill > 0 else None)
    if gpu_memory(device) < 20e9:
        fast.recompute_activations(model)  # before the first pass, which might not fit without it
    if compiled:
        fast.run_compiler(model, loss_of, training.batch(0, options.batch_size, device))


def text_table(columns: dict[str, Batches]) -> str:
    """How much text there is in the first chunk of each split, with a warning where it is little."""
    lines = []
    for name in ("train", "held-out"):
        tokens = len(columns[name].tokens.chunk(0))
        sequences = columns[name].sequences_in(0)
        lines.append(f"{name:20}{tokens:>15,} tokens, {sequences:,} sequences in the first chunk")
        if sequences < 200:
            lines.append(f"warning: {sequences} sequences say little; give more text, or a smaller --seq-len")
    return "\n".join(lines)


def parameter_table(model: Ouroboros) -> str:
    """The number of parameters of each trained part, and of what is frozen."""
    counts = {}
    for name, p in model.trained_parameters().items():
        part = name.split(".")[0]
        counts[part] = counts.get(part, 0) + p.numel()
    counts["trained, float32"] = sum(counts.values())
    counts["frozen SVD bases"] = sum(basis.numel() for basis in model.buffers())
    counts["frozen base"] = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    return "\n".join(f"{name:20}{count:>15,} parameters" for name, count in counts.items())


if __name__ == "__main__":
    run_program(main)
