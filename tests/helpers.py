"""What the tests share: small models, small texts, and the programs as a user starts them."""

import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

import run_folder
from checkpoint import read_checkpoint
from files import UserError
from ouroboros import Ouroboros
from patch import Patched
from qwen import Config, Qwen

ROOT = Path(__file__).resolve().parents[1]  # the folder of the programs

# The models here are so small that a second thread gains nothing. Where other programs keep the cores busy,
# threads that wait for each other would make the tests twenty times slower.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the programs that the tests start


def release_claims():
    """Let other programs have the folders of runs that this process has claimed."""
    while run_folder.claims:
        _, descriptor = run_folder.claims.popitem()
        os.close(descriptor)


# ---- Small models ----------------------------------------------------------------------------------------

SMALL = Config(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=6,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    tie_word_embeddings=True,
)

# The settings of every kind of looped model. The keys are the names of the tests.
SETTINGS = {
    "whole": {},
    "sequence pool": {"pool": "sequence"},
    "static": {"modulation": "static"},
    "no modulation": {"modulation": "none"},
    "no gate": {"gate": False},
    "no step norm": {"step_norm": False},
    "patched": {"seams": True, "train_coda": "all"},
    "coda norms": {"seams": False, "train_coda": "norms", "modulation": "none"},
    "nothing trained": {"gate": False, "step_norm": False, "modulation": "none"},
}


def small_qwen(seed=0, config=SMALL, dtype=torch.float32) -> Qwen:
    """A decoder with random weights, large enough that attention and every bias matter."""
    torch.manual_seed(seed)
    qwen = Qwen(config)
    for p in qwen.parameters():
        mean = 0.0 if p.ndim == 2 else 0.5
        nn.init.normal_(p, mean=mean, std=0.15)
    return qwen.to(dtype).requires_grad_(False)


def looped(qwen: Qwen, **settings) -> Ouroboros:
    """A Patched where the settings are those of patch.py, and an Ouroboros otherwise."""
    if "seams" in settings or "train_coda" in settings:
        return Patched(qwen, **settings)
    return Ouroboros(qwen, **settings)


def small_model(dtype=torch.float32, randomise=True, **settings) -> Ouroboros:
    """A looped model of 2 + 1 + 2 of the 6 layers of small_qwen, with rank 4 and depth 3.

    randomise: move the trained weights away from their start.
    """
    settings = {"prelude": 2, "recurrent": 3, "coda": 2, "rank": 4, "depth": 3, **settings}
    model = looped(small_qwen(dtype=dtype), **settings)
    if randomise:
        move_trained_weights(model, 0.1)
    return model.to(dtype)


def small_patched(dtype=torch.float32, randomise=True, seams=True, train_coda="all", **settings) -> Patched:
    """The same with the parts of patch.py."""
    return small_model(dtype, randomise, seams=seams, train_coda=train_coda, **settings)


def move_trained_weights(model: Ouroboros, size: float):
    """Add normal noise of this size to all that is trained."""
    for p in model.trained_parameters().values():
        p.data += size * torch.randn_like(p)


def tokens(B=2, T=12, seed=1, vocabulary=97):
    """Random token ids [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, vocabulary, (B, T), generator=generator)


def greedy_without_cache(model, ids, n: int, **options):
    """The n likeliest next tokens one by one, where the model reads everything again for each."""
    for _ in range(n):
        logits = model(ids, **options)[:, -1]
        ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], dim=1)
    return ids


def loss_and_gradients(model, ids, targets):
    """The loss, and name -> gradient of all that is trained."""
    model.zero_grad()
    loss = model.loss(ids, targets)
    loss.backward()
    gradients = {name: p.grad for name, p in model.trained_parameters().items()}
    return loss.detach(), gradients


def relative(a, b) -> float:
    """The size of a - b in relation to that of b."""
    return ((a - b).norm() / b.norm()).item()


# ---- Models as folders of the Hub ------------------------------------------------------------------------


def folder_of(qwen: Qwen, folder: Path, **changes) -> Path:
    """Write config.json and model.safetensors. changes: other values for config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    config = asdict(qwen.config)
    del config["attention_bias"]  # whether there are biases, the names of the tensors say
    config.update(
        model_type="qwen2",
        architectures=["Qwen2ForCausalLM"],
        hidden_act="silu",
        use_sliding_window=False,
        max_position_embeddings=512,
        eos_token_id=list(qwen.config.eos_token_id) or None,
    )
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))

    state = {}
    for name, tensor in qwen.state_dict().items():
        if name != "lm_head.weight":
            name = f"model.{name}"
        state[name] = tensor.contiguous()
    save_file(state, folder / "model.safetensors")
    return folder


def shard(folder: Path):
    """Spread model.safetensors over two files and an index, as the Hub does."""
    state = load_file(folder / "model.safetensors")
    files = {"model-00001-of-00002.safetensors": {}, "model-00002-of-00002.safetensors": {}}
    weight_map = {}
    size = 0
    for i, name in enumerate(sorted(state)):
        file = list(files)[i % 2]
        files[file][name] = state[name]
        weight_map[name] = file
        size += state[name].nbytes

    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def make_pretrained(folder: Path) -> Path:
    """A small random model with a tokenizer in folder/model, beside a text of 400 documents.

    Returns the model's folder. The text is text.txt beside it.
    """
    config = replace(SMALL, vocab_size=400, eos_token_id=(0,))
    model = folder_of(small_qwen(config=config), folder / "model")
    TOKENIZER.save(str(model / "tokenizer.json"))
    write_text(folder / "text.txt", 400)
    return model


# ---- Damage ----------------------------------------------------------------------------------------------


def flip_a_bit(path: Path, rng, first: int | None = None):
    """Change one bit of a file, among its `first` bytes or anywhere."""
    content = bytearray(path.read_bytes())
    end = len(content) if first is None else min(first, len(content))
    content[rng.integers(end)] ^= 1 << rng.integers(8)
    path.write_bytes(content)


def works(action, *arguments) -> bool:
    """Whether action(*arguments) works. Where it does not, it has to raise a UserError of one line."""
    try:
        action(*arguments)
    except UserError as error:
        assert "\n" not in str(error)
        assert len(str(error)) > 20
        return False
    return True


# ---- Texts -----------------------------------------------------------------------------------------------


def small_tokenizer(vocabulary=400) -> Tokenizer:
    """A byte-level BPE like Qwen2.5's, trained on a text that does not change."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([(ROOT / "LICENSE").read_text()], trainer)
    return tokenizer


TOKENIZER = small_tokenizer()


def write_shard(path: Path, ids: list[int]):
    """A token shard in FineWeb-Edu's format, see data.read_shard."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def write_text(path: Path, documents=60) -> Path:
    """A .txt of so many documents, in which every word names its document."""
    texts = []
    for n in range(documents):
        texts.append(" ".join([f"doc{n}"] * (20 + n % 7)))
    path.write_text("\n<|endoftext|>\n".join(texts))
    return path


# ---- Training in this process ----------------------------------------------------------------------------


class FixedBatches:
    """Batches without a file: sequence n is drawn with seed n.

    In the steps of `empty` no target counts; a step takes four sequences.
    """

    def __init__(self, empty=()):
        self.empty = empty

    def at_most(self, limit: int) -> int:
        return limit

    def batch(self, first: int, size: int, device):
        rows = [tokens(1, 9, seed=n) for n in range(first, first + size)]
        both = torch.cat(rows)
        ids = both[:, :-1]
        targets = both[:, 1:]
        if first // 4 in self.empty:
            targets = torch.full_like(targets, -100)
        return ids, targets


def training_options(out: Path, **changes) -> Namespace:
    """What train.train needs of the options: six steps of four sequences of eight tokens."""
    options = dict(
        out=out,
        steps=6,
        warmup=1,
        lr=0.01,
        norm_lr_scale=1.0,
        batch_size=2,
        accumulation=2,
        seq_len=8,
        eval_every=100,
        eval_sequences=2,
        save_every=1,
    )
    options.update(changes)
    return Namespace(**options)


# ---- The programs ----------------------------------------------------------------------------------------

QUICK = ["--depth", 2, "--rank", 4, "--seq-len", 32, "--batch-size", 4, "--eval-sequences", 4]


def quick_run(pretrained: Path, steps: int) -> list:
    """A command line for a short run on what make_pretrained made."""
    text = pretrained.parent / "text.txt"
    return ["train.py", "--model", pretrained, "--data", text, *QUICK, "--steps", steps]


def start(*arguments, env=None, cwd=None) -> subprocess.Popen:
    """Start a program of this repository, or a module of torch, as a user does."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **(env or {})}
    program = str(arguments[0])
    if program.startswith("torch."):
        command = [sys.executable, "-m", program]
    else:
        command = [sys.executable, str(ROOT / program)]
    command += map(str, arguments[1:])
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def run(*arguments, env=None, cwd=None) -> subprocess.CompletedProcess:
    """Run such a program to its end."""
    with start(*arguments, env=env, cwd=cwd) as process:
        out, error = process.communicate(timeout=600)
        return subprocess.CompletedProcess(arguments, process.returncode, out, error)


def succeed(*arguments, env=None, cwd=None) -> str:
    """Run such a program, which must end with exit code 0. Returns what it printed."""
    result = run(*arguments, env=env, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def table_of(printed: str) -> list[str]:
    """The lines of the results table that a program printed."""
    lines = printed.splitlines()
    (last,) = (i for i, line in enumerate(lines) if line.startswith("gap recovered"))
    return lines[last - 4 : last + 1]


def assert_refused(result: subprocess.CompletedProcess, *parts: str):
    """Exit code 2, and a last line on stderr that begins with "error: " and has these parts; no traceback."""
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    line = result.stderr.splitlines()[-1]
    assert re.match(r"(\w+\.py: )?error: ", line)
    for part in parts:
        assert part in line


def assert_refused_at_once(result: subprocess.CompletedProcess, *parts: str):
    """The same, where that line is all that the program says on stderr."""
    assert_refused(result, *parts)
    assert result.stderr.count("\n") == 1


def stop_at(process: subprocess.Popen, out: Path, rows: int, *signals) -> tuple[int, str]:
    """Send the signals when the log of a run has so many rows. Returns the exit code and what was printed."""
    wait_for_rows(process, out, rows)
    for number in signals:
        process.send_signal(number)
    out, error = process.communicate(timeout=600)
    return process.returncode, out + error


def wait_for_rows(process: subprocess.Popen, out: Path, rows: int):
    """Wait until the log of a run has so many rows. Fails if the program ends before."""
    log = out / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < rows:
        try:
            process.wait(timeout=0.01)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the program has ended: {process.communicate()}")


def log_rows(out: Path) -> list[dict]:
    """The rows of a run's log."""
    lines = (out / "log.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def losses(out: Path) -> list:
    """The training loss of each step of a run; None for a step that was skipped."""
    return [row["loss"] for row in log_rows(out)]


def assert_same_end(one: Path, other: Path):
    """Two runs have the same weights, moments and step, and the same loss at every step, bit for bit."""
    tensors, about = read_checkpoint(one)
    other_tensors, other_about = read_checkpoint(other)
    assert about["step"] == other_about["step"]
    assert tensors.keys() == other_tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, other_tensors[name]), name
    assert losses(one) == losses(other)
