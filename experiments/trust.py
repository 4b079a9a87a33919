"""Kill runs and damage files, with real processes: python experiments/trust.py

--kills 50: so many runs of the built-in model are killed with SIGKILL at random moments, resumed until they are done,
and must end bit for bit as the run left alone: weights, AdamW's moments and the loss of every step.
--damages 200: so many damaged inputs, each of which must end with exit code 2 and one line that names it. About a
quarter of an hour on two cores. Exit code 1 if anything was otherwise.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from data import cache_folder
from ouroboros import read_checkpoint

RUN = ("--steps", "40", "--save-every", "1", "--eval-every", "20", "--eval-sequences", "4")


def start(*command, cwd=ROOT, cache=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment |= {"XDG_CACHE_HOME": str(cache)} if cache else {}
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=cwd, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


# ---- Kills ----------------------------------------------------------------------------------------------------------


def end_of(run: Path):
    """What must be the same, to the bit: every tensor, the step and the loss of every step."""
    tensors, about = read_checkpoint(run)
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "held_out")
    return tensors, about["step"], [[row.get(key) for key in kept] for row in rows]


def killed_run(run: Path, seed: int) -> int:
    """Start and resume a run until it is done, killing it one to four times. Returns the number of kills."""
    rng, kills = random.Random(seed), 0
    wanted = rng.randint(1, 4)
    while True:
        began = any(run.glob("step-*/ouroboros.safetensors"))
        process = start("train.py", *(("--resume", run) if began else (*RUN, "--out", run)))
        try:
            _, error = process.communicate(timeout=rng.uniform(0.5, 12) if kills < wanted else None)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, error
        return kills


def kill(folder: Path, count: int) -> bool:
    alone = start("train.py", *RUN, "--out", folder / "alone")
    assert alone.communicate() and alone.returncode == 0
    tensors, step, rows = end_of(folder / "alone")
    same = []

    def one(i):
        kills = killed_run(folder / f"killed-{i}", i)
        others, other_step, other_rows = end_of(folder / f"killed-{i}")
        equal = tensors.keys() == others.keys() and all(torch.equal(tensors[name], others[name]) for name in tensors)
        same.append(equal and (step, rows) == (other_step, other_rows))
        print(f"run {i}: {kills} kills, {'the same' if same[-1] else 'DIFFERENT'}", flush=True)
        return kills
    with ThreadPoolExecutor(2) as pool:
        kills = sum(pool.map(one, range(count)))
    print(f"\n{sum(same)} of {count} runs end bit for bit as the run left alone, after {kills} kills in all\n")
    return all(same)


# ---- Damage ---------------------------------------------------------------------------------------------------------
# Each maker yields (what, command, the name that the line must hold); the files lie in a folder of their own.

TEXT = "Call me Ishmael. Some years ago - never mind how long precisely - I went to sea.\n" * 400


def model_in(folder: Path) -> Path:
    shutil.copytree(ROOT / "tiny", folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder / "model"


def train(folder, **changes):
    options = {"model": folder / "model", "data": folder / "text.txt", "out": folder / "run", "device": "cpu",
               "steps": 1, "seq-len": 32, "batch-size": 1, "eval-sequences": 1, **changes}
    return ["train.py", *(part for name, value in options.items() if value is not None
                          for part in (f"--{name}", str(value)))]


def truncated(path: Path, rng):
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def checkpoint(folder, rng, i):
    """Every checkpoint of a run damaged: cut short, a tensor's byte flipped, or gone."""
    shutil.copytree(folder.parent / "whole-run", folder / "run")
    for path in folder.glob("run/step-*/ouroboros.safetensors"):
        if i % 3 == 0:
            truncated(path, rng)
        elif i % 3 == 1:
            content = bytearray(path.read_bytes())
            content[-rng.randrange(1, len(content) // 2)] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
        else:
            path.unlink()
    commands = (["train.py", "--resume", folder / "run"], ["train.py", "--eval", folder / "run"],
                ["ouroboros.py", folder / "run", "--prompt", "x"])
    return commands[i // 3 % 3], "ouroboros.safetensors"


def weights(folder, rng, i):
    """The base's safetensors: cut short, its header broken, a tensor of another shape, missing or too many."""
    path = model_in(folder) / "model.safetensors"
    state = load_file(path)
    name = rng.choice(sorted(name for name in state if name.startswith("model.layers.")))
    if i % 5 == 0:
        truncated(path, rng)
    elif i % 5 == 1:
        content = bytearray(path.read_bytes())
        content[rng.randrange(8)] ^= 0x55
        path.write_bytes(content)
    elif i % 5 == 2:
        save_file({**state, name: state[name][:-1].contiguous()}, path)
    elif i % 5 == 3:
        save_file({n: t for n, t in state.items() if n != name}, path)
    else:
        save_file({**state, name + "s": state[name].clone()}, path)
    return train(folder), "model"


def index(folder, rng, i):
    path, whole = model_in(folder) / "model.safetensors.index.json", "model.safetensors"
    names = ["../model/model.safetensors", str(folder / "model" / whole), "other.safetensors", "model.bin", 7, None, "",
             ["model.safetensors"], "..", "model.safetensors\u0000", "sub/model.safetensors", {"a": 1}]
    maps = [[], "model.safetensors", {}, None] + [{"model.norm.weight": name} for name in names]
    content = json.dumps({"weight_map": maps[i % len(maps)]}) if i < 16 else '{"weight_map": {"a": ' + "[" * i
    path.write_text(content)
    return train(folder), "model"


def config(folder, rng, i):
    path = model_in(folder) / "config.json"
    raw = json.loads(path.read_text())
    keys = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = (0, -1, "many", None, [], {}, 1e30, 10**18, float("nan"))
    if i < 40:
        raw[keys[i % len(keys)]] = values[i // len(keys)]
    elif i < 44:
        del raw[keys[i - 40]]
    elif i == 44:
        raw |= {"model_type": "llama"}
    path.write_text(json.dumps(raw) if i < 45 else json.dumps(raw)[: rng.randrange(len(json.dumps(raw)))])
    return train(folder), "config.json" if i >= 40 else "model"


def tokenizer(folder, rng, i):
    path = model_in(folder) / "tokenizer.json"
    raw = json.loads(path.read_text())
    if i % 5 == 0:
        truncated(path, rng)
    elif i % 5 == 1:
        path.write_text(rng.choice(["{}", "[]", "null", "\u0000", '{"model": 1}']))
    elif i % 5 == 2:
        path.unlink()
    elif i % 5 == 3:
        raw["model"]["vocab"]["unheard"] = 10**6 + i
        path.write_text(json.dumps(raw))
    else:
        raw["added_tokens"] = [t for t in raw["added_tokens"] if t["content"] != "<|endoftext|>"]
        raw["model"]["vocab"].pop("<|endoftext|>", None)
        path.write_text(json.dumps(raw))
    return train(folder), "tokenizer"


def shard(folder, rng, i):
    """A FineWeb token shard whose header or length is not what it should be."""
    path, header = folder / f"finewebedu_train_{i:06d}.bin", np.zeros(256, "<i4")
    folder.mkdir()
    header[:3] = 20240520, 1, 5000
    header[i % 3] ^= 1 << rng.randrange(31)
    path.write_bytes(header.tobytes() + bytes(10_000))
    if i % 4 == 3:
        truncated(path, rng)
    program = f"from data import *; from qwen import *; exit_on_user_error(lambda: read_shard(Path({str(path)!r})))"
    return ["-c", program], path.name


def cached_tokens(folder, rng, i):
    """A token file of the cache: cut short, of another type, out of the tokenizer's range, or a pickle."""
    model_in(folder)
    assert start(*train(folder, out=folder / "first"), cache=folder).wait() == 0
    path = rng.choice(sorted((folder / "ouroboros").glob("*/00000.npy")))
    if i % 4 == 0:
        truncated(path, rng)
    elif i % 4 == 1:
        np.save(path, np.load(path).astype(np.float32))
    elif i % 4 == 2:
        np.save(path, np.full(50_000, 65_535, np.uint16))
    else:
        np.save(path, np.array([print], dtype=object), allow_pickle=True)
    return train(folder), path.name


def text(folder, rng, i):
    model_in(folder)
    path = folder / ("text.jsonl" if i % 7 in (3, 4) else "text.jsonl.gz" if i % 7 == 5 else "text.txt")
    contents = [b"", b"short", rng.randbytes(50_000), b'{"no text": 1}\n' * 900, b'{"text": [1]}\n' * 900,
                rng.randbytes(9000), TEXT.encode() + b"\xff"]
    path.write_bytes(contents[i % 7])
    return train(folder, data=path), "text"


def argument(folder, rng, i):
    wrong = [("depth", 0), ("depth", 65), ("depth", -3), ("depth", "deep"), ("rank", 0), ("rank", 4097), ("rank", 1.5),
             ("steps", 0), ("steps", "nan"), ("lr", 0), ("lr", -1), ("lr", "inf"), ("seq-len", 0), ("batch-size", -1),
             ("accumulation", 0), ("device", "tpu"), ("dtype", "int8"), ("pool", "max"), ("modulation", "all"),
             ("prelude", 12), ("coda", 12), ("recurrent", 0), ("target-offset", 3), ("seed", -1), ("save-every", 0),
             ("model", "no/such/folder"), ("data", "nothing.txt"), ("out", ROOT / "tiny"), ("resume", "nowhere"),
             ("eval", "nowhere"), ("unknown", 1), ("eval-every", -2), ("eval-sequences", 0), ("warmup", -1)]
    name, value = wrong[i % len(wrong)]
    model_in(folder)
    return train(folder, **{name: value}), str(value) if name in ("model", "data", "out", "resume", "eval") else name


PLAN = {checkpoint: 25, weights: 22, index: 20, config: 50, tokenizer: 15, shard: 12, cached_tokens: 8, text: 14,
        argument: 34}


def damage(folder: Path, count: int) -> bool:
    first = start("train.py", *RUN[:2], "--save-every", "20", *RUN[4:], "--out", folder / "whole-run")
    assert first.communicate() and first.returncode == 0
    cases = [(make, i) for make, n in PLAN.items() for i in range(n)]
    cases = cases if count >= len(cases) else random.Random(0).sample(cases, count)
    wrong = []

    def one(case):
        make, i = case
        place = folder / f"{make.__name__}-{i}"
        command, name = make(place, random.Random(i), i)
        cache = place if make is cached_tokens else None
        process = start(*command, cache=cache)
        _, error = process.communicate()
        line = error.splitlines()[-1] if error.strip() else ""
        if process.returncode != 2 or "Traceback" in error or "error: " not in line or name not in line:
            wrong.append(place.name)
            print(f"{place.name}: exit code {process.returncode}, without {name!r}: {line}", flush=True)
        shutil.rmtree(place, ignore_errors=True)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, cases))
    good = len(cases) - len(wrong)
    print(f"{good} of {len(cases)} damaged inputs end with exit code 2 and one line that names them")
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--damages", type=int, default=sum(PLAN.values()))
    args = parser.parse_args()
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        good = [kill(Path(folder), args.kills)] if args.kills else []
        good += [damage(Path(folder), args.damages)] if args.damages else []
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
