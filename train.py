"""Train an Ouroboros: python train.py --depth 8 --rank 32

On a CUDA GPU: Qwen2.5-3B on FineWeb-Edu with the paper's recipe. Without one: the built-in tiny model on the Python
source code of this machine, in a few minutes. Everything a run leaves is in runs/NAME.
"""

import argparse
import hashlib
import json
import math
import os
import shutil
import signal
import sys
import time
from datetime import timedelta
from inspect import signature
from pathlib import Path

import torch
import torch.distributed as dist
from huggingface_hub import constants
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters
from tqdm import tqdm

from data import SOURCES, Batches, cache_folder, open_source
from ouroboros import CODAS, MODULATIONS, POOLS, STEPS, Ouroboros, read_checkpoint
from qwen import (BUILT_IN, Config, Qwen, UserError, exit_on_user_error, handling, keep_freed_memory,
                  load_tokenizer, locate, pick_device, read_json, replace_file)

# What suits the model at hand; the command line has the last word. "paper": its own recipe, 1,000 of its 18,750 steps.
NAMES = ("steps", "seq_len", "batch_size", "accumulation", "lr", "norm_lr_scale", "warmup", "eval_sequences")
PRESETS = {"tiny": (1000, 256, 4, 1, 2e-3, 50.0, 20, 64),
           "cpu": (60, 256, 4, 1, 1e-3, 50.0, 6, 16),
           "paper": (1000, 2048, 2, 16, 3e-4, 1.0, 50, 32)}
FREE = ("resume", "eval", "device", "compile", "activation_checkpointing", "steps", "lr", "batch_size", "accumulation",
        "eval_every", "eval_sequences", "save_every")  # what may change when a run goes on
EVALUATION_SEED = 2**32  # evaluation reads in an order of its own, which no --seed gives
STOPPING = (signal.SIGINT, signal.SIGTERM)
PROCESS, PROCESSES = (int(os.environ.get(name, alone)) if "MASTER_ADDR" in os.environ else alone
                      for name, alone in (("RANK", 0), ("WORLD_SIZE", 1)))  # torchrun sets them

def parse_arguments():
    p = argparse.ArgumentParser(description="Train the looped model of arXiv 2604.02051.", usage=argparse.SUPPRESS)
    g = p.add_argument_group("what is trained").add_argument
    g("--depth", type=int, default=8, help="steps of the loop (8; --patch: 1; paper: 1, 4, 8, 16)")
    g("--rank", type=int, default=32, help="rank of the SVD LoRA (32, as the paper)")
    g("--modulation", choices=MODULATIONS, default="controller", help="makes the diagonals (controller; --patch: none)")
    g("--pool", choices=tuple(POOLS), default="prefix", help="what it sees (prefix; paper: sequence, the future too)")
    g("--no-gate", dest="gate", action="store_false", help="h = StepNorm(Layer(h)), without the gated mix")
    g("--no-step-norm", dest="step_norm", action="store_false", help="without the RMSNorm per step")
    g("--patch", action="store_true", help="past the paper: a matrix at each seam in place of gate and step norm")
    g("--train-coda", choices=(*CODAS,), default="none", help="norms or a LoRA too; all: of every layer (--patch: all)")
    g("--prelude", type=int, help="layers kept at the start (8/36 of them; paper: 8 of 36)")
    g("--recurrent", type=int, help="index of the looped layer (the middle one; paper: 18 of 36)")
    g("--coda", type=int, help="layers kept at the end (8/36 of them; paper: 8 of 36)")
    g = p.add_argument_group("on what").add_argument
    g("--model", help="folder or Hub name of a Qwen2.5 checkpoint (Qwen/Qwen2.5-3B on CUDA, else tiny)")
    g("--data", help=".txt, .jsonl or .jsonl.gz, a folder, fineweb-edu (on CUDA) or python (else)")
    g("--target-offset", type=int, choices=(1, 2), default=1, help="the next token (1) or, as published, the one after")
    g = p.add_argument_group("how (default: by model and device; the paper's value in brackets)").add_argument
    g("--steps", type=int, help="optimizer steps (18,750)")
    g("--seq-len", type=int, help="tokens in a sequence (2048)")
    g("--batch-size", type=int, help="sequences in a forward (2)")
    g("--accumulation", type=int, help="forwards to an optimizer step (16)")
    g("--lr", type=float, help="learning rate after the warm-up (3e-4; --patch: 3 times as much), then a cosine")
    g("--norm-lr-scale", type=float, help="how many times faster the step norm learns, which starts at 1 (1)")
    g("--warmup", type=int, help="optimizer steps of linear warm-up, at most half of all")
    g("--seed", type=int, default=0, help="of the first weights and of the order of the data (0 by default)")
    g = p.add_argument_group("where and how often").add_argument
    g("--device", default="auto", help="cuda, mps or cpu (the first of these there is)")
    g("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of what is frozen (by hardware)")
    g("--compile", choices=("auto", "on", "off"), default="auto", help="make the blocks faster (on CUDA)")
    g("--activation-checkpointing", action=argparse.BooleanOptionalAction, default=False, help="less memory, more time")
    g("--out", type=Path, help="folder of the run (runs/MODEL-depth8-rank32, numbered if it is taken)")
    g("--eval-every", type=int, help="steps between held-out losses (a fifth of the run)")
    g("--eval-sequences", type=int, help="sequences in each evaluation (64 for tiny)")
    g("--save-every", type=int, default=100, help="steps between checkpoints (100)")
    g = p.add_argument_group("instead of a new run").add_mutually_exclusive_group().add_argument
    g("--resume", type=Path, metavar="RUN", help="go on with a run that was stopped; --steps, --lr and such may change")
    g("--eval", type=Path, metavar="RUN", help="only evaluate a run; with --data on other text than its own")
    if p.parse_args().patch:
        p.set_defaults(depth=1, modulation="none", train_coda="all")  # what did best on held-out text
    args, checkpoint = p.parse_args(), None
    if run := args.resume or args.eval:  # the run's own arguments are the defaults of the command line
        checkpoint, run = read_checkpoint(run), run.parent if run.match(STEPS) else run
        with handling(run, "read as a run of train.py"):
            began, args = (p.parse_args(a, argparse.Namespace(**checkpoint[1]["args"], out=run)) for a in ([], None))
    for name, own in (("model", BUILT_IN), ("data", SOURCES)):  # a run must find its files from any folder
        if (value := getattr(args, name)) and value not in own and Path(value).exists():
            setattr(args, name, str(Path(value).resolve()))
    for name, value in vars(args).items():
        if type(value) in (int, float) and not (0 < value < EVALUATION_SEED or name == "seed" and value == 0):
            raise UserError(f"--{name.replace('_', '-')} {value}: give a number above 0 and below 2^32")
    if run:
        for name, value in vars(began).items():
            if getattr(args, name) != value and name not in FREE and not (args.eval and name == "data"):
                raise UserError(f"--{name.replace('_', '-')} cannot change: {run} began with {value}")
        args.checkpoint, step, size = checkpoint, checkpoint[1]["step"], began.batch_size * began.accumulation
        if args.steps < step or args.resume and args.batch_size * args.accumulation != size:
            raise UserError(f"{run}: --steps must be {step} or more, --batch-size times --accumulation stay {size}")
        return args
    on_cuda = pick_device(args.device)[0].type == "cuda"
    args.model = args.model or ("Qwen/Qwen2.5-3B" if on_cuda else "tiny")
    args.data = args.data or ("fineweb-edu" if on_cuda else "python")
    if args.out and any(p.is_file() and ".part" not in p.suffixes for p in (args.out, *args.out.rglob("*"))):
        raise UserError(f"{args.out}: is there already, and nothing saved is overwritten; choose another --out")
    for name, value in zip(NAMES, PRESETS["tiny" if args.model == "tiny" else "paper" if on_cuda else "cpu"]):
        setattr(args, name, getattr(args, name) or value * (3 if args.patch and name == "lr" else 1))
    args.warmup = min(args.warmup, max(1, args.steps // 2))
    args.eval_every = args.eval_every or max(1, args.steps // 5)
    return args

# ---- The loop --------------------------------------------------------------------------------------------------------
def schedule(step: int, args) -> float:
    """The share of --lr at a step: linear warm-up, then a cosine that reaches zero after the last step taken."""
    done = max(0, step - args.warmup) / max(1, args.steps - args.warmup)
    return min((step + 1) / args.warmup, 0.5 * (1 + math.cos(math.pi * done)))

def train(model: Ouroboros, batches: Batches, held_out: Batches, args, device) -> int:
    """Train and leave the checkpoints and log.jsonl in args.out. Returns the signal that ended it early, else 0."""
    parameters = model.trained_parameters()
    # The step norm may learn faster: it starts at 1, far from the state's size, and AdamW moves by a rate a step.
    groups = [{"params": [p], "scale": args.norm_lr_scale if name.startswith("step_norm") else 1.0}
              for name, p in parameters.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type != "mps")
    tensors, done = (args.checkpoint[0], args.checkpoint[1]["step"]) if args.resume else ({}, 0)
    state = {i: {key: tensors[f"{key}/{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
             for i, name in enumerate(parameters) if f"step/{name}" in tensors}
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    log, per_step, skipped, stop = args.out / "log.jsonl", args.batch_size * args.accumulation, 0, False
    own = range(per_step * PROCESS // PROCESSES, per_step * (PROCESS + 1) // PROCESSES)  # of a step's sequences
    if PROCESS == 0:
        if not args.resume:
            save_checkpoint(args, model, optimizer, 0)
        # A run that was killed may have logged steps after its last checkpoint: they come again.
        rows = log.read_text(errors="replace").splitlines(keepends=True)[:done] if log.exists() else []
        replace_file(log, lambda part: part.write_text("".join(rows)))
    signals = []  # the first ends with the step, a second Ctrl-C at once; but torchrun sends each twice
    def on_signal(number, _):
        if signals and number == signal.SIGINT and PROCESSES == 1:
            sys.exit(130)
        signals.append(number)
    handlers = [signal.signal(number, on_signal) for number in STOPPING]
    with tqdm(initial=done, total=args.steps, unit="step", disable=PROCESS > 0) as bar:
        for step in range(done, args.steps):
            started, rate, loss = time.perf_counter(), args.lr * schedule(step, args), 0.0
            for group in optimizer.param_groups:
                group["lr"] = rate * group["scale"]
            for first in own[:: args.batch_size]:
                size = min(args.batch_size, own.stop - first)
                share = model.loss(*batches.batch(step * per_step + first, size, device)) * (size / per_step)
                share.backward()
                loss += share.detach()
            loss, stop = sum_over_processes(parameters.values(), loss, len(signals))
            norm = clip_grad_norm_(parameters.values(), 1.0).item()
            row, last = {"step": step + 1, "loss": loss, "grad_norm": norm, "lr": rate}, step + 1 == args.steps
            skipped = 0 if math.isfinite(loss + norm) else skipped + 1
            if skipped:  # nothing is changed by such a step
                row |= {"loss": None, "grad_norm": None, "skipped": skipped}
            else:
                optimizer.step()
            optimizer.zero_grad()
            row["tokens_per_s"] = round(per_step * args.seq_len / (time.perf_counter() - started))
            if PROCESS == 0:
                if (step + 1) % args.eval_every == 0 or last:
                    row["held_out"] = evaluate(model.loss, held_out, args, device)
                    bar.write(f"step {step + 1}: held-out loss {row['held_out']:.3f}")
                with handling(log, "written", "make room or bring its folder back"), open(log, "a") as file:
                    file.write(json.dumps(row) + "\n")
                bar.update()
                bar.set_postfix_str(f"loss {loss:.3f}, {row['tokens_per_s']} tokens/s")
                if (step + 1) % args.save_every == 0 or last or stop:
                    save_checkpoint(args, model, optimizer, step + 1)
            if skipped == 10:
                raise UserError("ten steps in a row had no finite loss and gradient, and none of them was taken; try "
                                f"--resume {args.out} --lr {args.lr / 3:.1g}, or begin anew with --dtype float32")
            if stop:
                break
    for number, handler in zip(STOPPING, handlers):
        signal.signal(number, handler)
    return (signals or STOPPING)[-1] if stop else 0

def sum_over_processes(parameters, *numbers) -> list[float]:
    """The sums over the processes of these numbers and, in place, of all gradients: one flat all_reduce."""
    if PROCESSES > 1:
        grads = [p.grad for p in parameters]
        numbers = grads[0].new_tensor(numbers)
        vector = parameters_to_vector([*grads, numbers])
        try:
            dist.all_reduce(vector)
        except RuntimeError as error:
            raise UserError(f"another process has ended ({str(error).splitlines()[0]}); --resume goes on") from None
        vector_to_parameters(vector, [*grads, numbers])
    return [float(n) for n in numbers]

def save_checkpoint(args, model: Ouroboros, optimizer, step: int):
    """The model and all that is needed to go on, in a folder of its own; the newest two stay. Every random choice is a
    function of the seed and the step, so there is no other random state."""
    moments = {f"{key}/{name}": moment for name, p in model.trained_parameters().items()
               for key, moment in optimizer.state[p].items()}
    kept = {name: value for name, value in vars(args).items() if name not in ("resume", "eval", "out", "checkpoint")}
    model.save(args.out / f"step-{step:07}", moments, step=step, args=kept)
    replace_file(args.out / "args.json", lambda part: part.write_text(json.dumps(kept, indent=2) + "\n"))  # to be read
    steps = sorted(args.out.glob(STEPS))
    for old in {*steps} - {*[path for path in steps if path.name <= f"step-{step:07}"][-2:]}:  # what lies ahead is dead
        shutil.rmtree(old, ignore_errors=True)

@torch.no_grad()
def evaluate(loss_of, batches: Batches, args, device) -> float:
    """Mean cross entropy, in nats per target, over the first sequences of `batches`. loss_of: ids, targets -> mean"""
    total = torch.zeros((), device=device)
    for first in range(0, args.eval_sequences, args.batch_size):
        ids, targets = batches.batch(first, min(args.batch_size, args.eval_sequences - first), device)
        total += loss_of(ids, targets) * len(ids)
    return total.item() / args.eval_sequences

def baselines(model: Ouroboros, qwen: Qwen | None, columns: dict, args, device) -> dict:
    """The losses of the full and of the cut model: measured once for a model, a text and a setting, then kept."""
    texts, dtype = (batches.folder.name for batches in columns.values()), model.norm.weight.dtype
    key = [model.fingerprint(), *texts, args.seq_len, args.eval_sequences, device.type, dtype]
    path = cache_folder() / "baselines" / f"{'-'.join(map(str, key))}.json"
    if not path.exists():
        print("evaluating the full and the cut model, once for this model and text", flush=True)
        qwen = qwen or Qwen.from_pretrained(model.source, dtype, device)
        losses = {name: {column: evaluate(loss_of, batches, args, device) for column, batches in columns.items()}
                  for name, loss_of in (("full", qwen.loss), ("cut", lambda *batch: model.loss(*batch, cut=True)))}
        replace_file(path, lambda part: part.write_text(json.dumps(losses)))
    with handling(path, "read as losses", "delete it, it is then made anew"):
        return {name: read_json(path)[name] for name in ("full", "cut")}

def print_results(model: Ouroboros, results: dict):
    names = {"full": f"full model ({model.layers} layers)", "ouroboros": f"ouroboros, depth {model.depth}",
             "cut": f"cut to {len(model.prelude) + 1 + len(model.coda)} layers"}
    print("\n" + " " * 24 + "".join(f"{column:>15}" for column in results["full"]))
    for name, losses in results.items():
        print(f"{names[name]:24}" + "".join(f"{loss:15.3f}" for loss in losses.values()))
    gaps = ((cut - ours) / (cut - full) for full, cut, ours in zip(*(losses.values() for losses in results.values())))
    print(f"{'gap recovered':24}" + "".join(f"{gap:15.1%}" for gap in gaps))

# ---- The program -----------------------------------------------------------------------------------------------------
def announce_download(args):
    """Say before the wait what is fetched and how much room it takes."""
    size = 0.2 * (args.data == "fineweb-edu")  # of a shard of 100M tokens, in GB
    size *= 1 + math.ceil(args.steps * args.accumulation * args.batch_size * args.seq_len / 1e8)
    if not Path(args.model).is_dir() and args.model not in BUILT_IN:
        index = locate(args.model, "model.safetensors.index.json", required=False)
        with handling(index, "read as an index"):
            size += read_json(index)["metadata"]["total_size"] / 1e9 if index else 1
    if size:
        free = shutil.disk_usage(next(p for p in Path(constants.HF_HUB_CACHE).parents if p.exists())).free / 1e9
        print(f"about {size:.1f} GB are fetched from the Hub, once and when needed; {free:.0f} GB are free", flush=True)

def announce_training(model: Ouroboros, batches: Batches, args, device):
    """Print the parameter table, compile what is to be and say, after a trial step, how long all will take."""
    trained = [(name.split(".")[0], p.numel()) for name, p in model.trained_parameters().items()]
    counts = {part: sum(count for name, count in trained if name == part) for part, _ in trained}
    counts |= {"trained, float32": sum(counts.values()), "frozen SVD bases": sum(b.numel() for b in model.buffers()),
               "frozen base": sum(p.numel() for p in model.parameters() if not p.requires_grad)}
    print("\n" + "\n".join(f"{name:20}{count:>15,} parameters" for name, count in counts.items()), flush=True)

    def seconds():
        started = time.perf_counter()
        model.loss(*batches.batch(0, args.batch_size, device)).backward()
        sum(p.grad.sum() for p in model.trained_parameters().values()).item()  # waits for the device
        return time.perf_counter() - started
    if args.compile == "on" or args.compile == "auto" and device.type == "cuda":
        print("\ncompiling, a minute or two", flush=True)
        try:
            model.compile_blocks()
            seconds()
        except Exception as error:  # whatever the compiler behind torch.compile raises
            torch.compiler.set_stance("force_eager")
            print(f"torch.compile does not work here, going on without: {(str(error) or repr(error)).splitlines()[0]}")
    steps = args.steps - (args.checkpoint[1]["step"] if args.resume else 0)
    took = f"{min(seconds(), seconds()) * args.accumulation * steps / PROCESSES / 60:,.0f} min"
    model.zero_grad()
    print(f"\n{steps} steps of {args.accumulation} x {args.batch_size} x {args.seq_len} tokens, about {took}\n")

def main():
    args = parse_arguments()
    keep_freed_memory()
    device, dtype = pick_device(args.device, args.dtype)
    if PROCESSES > 1:  # torchrun started others, here or on other machines; the first one speaks and writes
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=3))
        sys.stdout = sys.stdout if PROCESS == 0 else None
        if args.batch_size * args.accumulation < PROCESSES:
            raise UserError(f"a step has fewer sequences than the {PROCESSES} processes; raise --accumulation")
    print(f"{Path(args.model).name} on {Path(args.data).name}, {device}, {dtype}".replace("torch.", ""), flush=True)
    announce_download(args)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer(args.model, Config.from_json(locate(args.model, "config.json")).vocab_size)
    source = open_source(args.data)
    def batches(split, offset=1, seed=EVALUATION_SEED):
        return Batches(source, split, tokenizer, args.seq_len, offset, seed)
    columns = {"train": batches("train"), "held-out": batches("val")}
    if args.target_offset == 2:  # the published task, beside the one that counts
        columns |= {"train, t+2": batches("train", 2), "held-out, t+2": batches("val", 2)}
    if args.resume or args.eval:
        qwen, model = None, Ouroboros.load(args.out, None, dtype, device, args.checkpoint)
    else:
        qwen = Qwen.from_pretrained(args.model, dtype, device)
        switches = vars(args).keys() & signature(Ouroboros).parameters.keys()  # they have the same names there
        model = Ouroboros(qwen, **{name: getattr(args, name) for name in switches})
        if not model.trained_parameters():
            raise UserError("nothing is left to train: keep Controller, gate or step norm, or try --patch")
    model.checkpointing = args.activation_checkpointing
    if PROCESSES > 1:
        for tensor in model.own().values():
            dist.broadcast(tensor.view(torch.uint8), 0)  # other hardware would round its bases another way
    results = baselines(model, qwen, columns, args, device) if PROCESS == 0 else {}
    del qwen  # and with it the removed layers
    if not args.eval:
        training = batches("train", args.target_offset, args.seed)
        text = hashlib.sha256(training.chunk(0)).hexdigest()[:16]
        if args.resume and args.text != text:
            raise UserError(f"{args.data}: not the text any more with which {args.out} began; bring it back to go on")
        if not args.resume:
            name = f"runs/{Path(args.model).name}-depth{args.depth}-rank{args.rank}" + "-patch" * args.patch
            free = (p for i in range(1, 10**6) if not (p := Path(name + f"-{i}" * (i > 1))).exists())
            args.out, args.text = args.out or next(free), text
        announce_training(model, training, args, device)
        if number := train(model, training, columns["held-out"], args, device):
            print(f"stopped, and saved. Go on: python train.py --resume {args.out} (--eval: see how good it is)")
            sys.exit(128 + number)
    if PROCESS > 0:
        return
    results["ouroboros"] = {column: evaluate(model.loss, b, args, device) for column, b in columns.items()}
    print_results(model, results)
    if not args.eval:
        replace_file(args.out / "results.json", lambda part: part.write_text(json.dumps(results, indent=2) + "\n"))
        prompt = columns["held-out"].batch(0, 1, device)[0][:, : max(1, min(48, args.seq_len // 2))]
        torch.manual_seed(args.seed)  # a resumed run ends with the same text
        out = model.generate(prompt, 48, temperature=0.7)[0, prompt.shape[1] :]
        text, more = (tokenizer.decode(ids.tolist()) for ids in (prompt[0], out))
        print(f"\nheld-out text, and after the bar how the model goes on:\n{text}\u2502{more}")
        from experiments.plots import plot_losses  # only now, since importing matplotlib takes its time
        plot_losses(args.out)
        print(f'\nAll of it is in {args.out}. Write on: python ouroboros.py {args.out} --prompt "..."')

if __name__ == "__main__":
    exit_on_user_error(main)
