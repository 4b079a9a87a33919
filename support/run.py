"""A run on disk: its folder, the lock of its training, its log, its checkpoints, and the wish to stop.

    runs/NAME/step-0000100/ouroboros.safetensors    a checkpoint: weights, AdamW's state, options
    runs/NAME/log.jsonl                             a line for each step
    runs/NAME/args.json                             the options, for reading

Nothing is written before there is a checkpoint, so a run that was stopped earlier leaves nothing behind. A
run is one line of steps: going back to an older checkpoint begins a new run from it, in a folder of its own.
"""

import json
import os
import shlex
import shutil
import signal
import sys
from contextlib import suppress
from pathlib import Path

from support.files import (
    CHECKPOINT,
    UserError,
    read_checkpoint,
    reading,
    silence,
    write_json,
    write_text,
    writing,
)
from support.machine import StopSignals, progress

if sys.platform != "win32":
    import fcntl

RUNS = Path("runs")
LOG = "log.jsonl"
RESULTS = "results.json"
PICTURE = "loss.png"
STEP_FOLDER = "step-" + 7 * "[0-9]"  # a pattern for glob

# ---- Finding and reading ---------------------------------------------------------------------------------


def checkpoints_of(run: Path) -> list[Path]:
    """The folders of a run's checkpoints, the oldest first. Half-written ones do not count."""
    return sorted(path.parent for path in Path(run).glob(f"{STEP_FOLDER}/{CHECKPOINT}"))


def read_run(folder) -> tuple[dict, dict]:
    """The (tensors, about) of a checkpoint or of a run's newest whole checkpoint; also of a Hub repository.

    A damaged checkpoint is named on stderr, and the one before it is read. Raises UserError if none is whole.
    """
    candidates = checkpoints_of(folder)
    if not candidates:
        return read_checkpoint(folder)
    while len(candidates) > 1:
        try:
            return read_checkpoint(candidates[-1])
        except UserError as error:
            print(f"{error}; the checkpoint before it is read instead", file=sys.stderr)
            candidates.pop()
    return read_checkpoint(candidates[0])


def read_log(run: Path) -> list[dict]:
    """The rows of a run's log, one for each step; none without a log. Raises UserError if it is damaged."""
    log = Path(run) / LOG
    rows = []
    if log.exists():
        with reading(log, "a log, with a JSON object for each step"):
            lines = log.read_text(encoding="utf-8").split("\n")
            for line in lines[:-1]:  # a row without an end of line was cut short when the program was killed
                row = json.loads(line)
                for key in ("step", "loss", "tokens_per_s"):
                    row[key] + 0  # KeyError or TypeError where it is no row
                rows.append(row)
    return rows


# ---- A run that is trained -------------------------------------------------------------------------------


class Run:
    """A context in which one training writes in the folder of a run. Only the first process writes.

    options: those of train.py. checkpoint: the (tensors, about) at which it goes on, None for a new run.
    Raises UserError if another training has the folder, or if `--out` holds files.
    """

    def __init__(self, options, workers, checkpoint=None):
        self.options = options
        self.writes = workers.is_first
        self.checkpoint = checkpoint
        self.goes_on = False  # in the folder that is resumed
        if options.resume is not None:
            self.goes_on = options.out is None and len(checkpoints_of(options.resume)) > 0
            if not self.goes_on:
                options.threads = None  # a new run tries it again
        self.signals = StopSignals()
        self.reader_is_gone = False
        self.lock = None
        self.bar = None

    def __enter__(self):
        if not self.writes:
            self.folder = None
        elif self.goes_on:
            self.folder = Path(self.options.resume)
            self._lock(self.folder)
            if read_run(self.folder)[1] != self.checkpoint[1]:
                self._unlock()
                raise UserError(f"{self.folder}: another training went on from it just now; start again")
        else:
            self.folder = self._new_folder()
        return self

    def __exit__(self, *exception):
        self.signals.forget()
        if self.bar is not None:
            self.bar.close()
        self._unlock()
        if self.writes:
            for folder in (*self.folder.glob(STEP_FOLDER), self.folder, RUNS):
                with suppress(OSError):  # it holds files: there is a checkpoint
                    folder.rmdir()

    # -- The folder

    def _new_folder(self) -> Path:
        """Make and lock an empty folder: --out, or the first of runs/MODEL-TEXT, -2, -3 ... that is free."""
        name = f"{Path(self.options.model).name}-{Path(self.options.data).name.split('.')[0]}"
        number = 1
        while True:
            folder = self.options.out or RUNS / (name if number == 1 else f"{name}-{number}")
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
            try:
                self._lock(folder)
                if not any(path.is_file() and ".part" not in path.suffixes for path in folder.rglob("*")):
                    return folder
                raise UserError(f"{folder}: holds files, and nothing is overwritten; choose another --out")
            except UserError:
                self._unlock()
                if self.options.out:
                    raise
                number += 1

    def _lock(self, folder: Path):
        """Hold a folder for this training alone. The system releases it however the program ends."""
        if sys.platform == "win32":
            return
        self.lock = os.open(folder, os.O_RDONLY)
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._unlock()
            raise UserError(f"{folder}: another training has it; wait, or choose another --out") from error
        except OSError:
            print(f"{folder}: this file system has no locks; let no other program train there")

    def _unlock(self):
        if self.lock is not None:
            os.close(self.lock)
        self.lock = None

    def check_text(self, text_hash: str):
        """Raise UserError if the training text is not the one with which a resumed run began."""
        began_with = getattr(self.options, "text_hash", text_hash)
        if began_with != text_hash:
            raise UserError(
                f"{self.options.data}: is not the text of this run, or another tokenizer, Python or torch "
                "changed it; bring it back, or name it with --data"
            )
        self.options.text_hash = text_hash

    # -- Checkpoints

    def restore(self, model, optimizer) -> int:
        """Take the weights and the optimizer's state from the checkpoint. Returns the number of steps done.

        The log then has the rows of these steps, and there is a checkpoint from which the run can go on.
        """
        step = 0
        rows = []
        if self.checkpoint is not None:
            tensors, about = self.checkpoint
            step = about["step"]
            if about["model"]["fingerprint"] != model.base_fingerprint:
                raise UserError(
                    f"{self.options.model}: is not the model on which {self.options.resume} was trained; "
                    "name that one with --model"
                )
            model.restore(tensors)
            restore_optimizer(optimizer, model.trained_parameters(), tensors)
            self.checkpoint = None  # the memory can be freed
        if self.writes:
            if self.options.resume is not None:
                source = Path(self.options.resume)
                rows = read_log(source if checkpoints_of(source) else source.parent)
            if not self.goes_on:
                self.save(model, optimizer, step)
            rows = [row for row in rows if row["step"] <= step]
            write_text(self.folder / LOG, "".join(json.dumps(row) + "\n" for row in rows))
        steps = self.options.steps
        self.bar = progress(initial=step, total=steps, unit="step", leave=True, delay=0, unit_scale=False)
        self.signals.listen()  # until here, nothing is lost if they end the program
        return step

    def save(self, model, optimizer, step: int):
        """Write all that is needed to go on after `step` steps, and keep the two newest checkpoints.

        What an earlier end of the run or a killed program has left goes. Every random choice is a function of
        the seed and the step, so there is no random state to save.
        """
        if not self.writes:
            return
        kept = {name: value for name, value in vars(self.options).items() if name not in ("resume", "out")}
        moments = optimizer_tensors(optimizer, model.trained_parameters())
        for path in (self.folder / RESULTS, self.folder / PICTURE, *self.folder.rglob("*.[0-9]*.part.*")):
            path.unlink(missing_ok=True)
        model.save(self.step_folder(step), moments, step=step, options=kept)
        write_json(self.folder / "args.json", kept)
        newest = checkpoints_of(self.folder)[-2:]
        for folder in self.folder.glob(STEP_FOLDER):
            if folder not in newest:
                shutil.rmtree(folder, ignore_errors=True)

    def step_folder(self, step: int) -> Path:
        return self.folder / f"step-{step:07}"

    def diverged(self, step: int) -> UserError:
        """The error for a step without a finite loss. It names the newest checkpoint before a good step."""
        if not self.writes:
            sys.exit(2)  # the first process says it
        advice = ""
        for folder in checkpoints_of(self.folder):
            if 0 < int(folder.name.removeprefix("step-")) < step - 1:
                advice = f"--resume {shlex.quote(str(folder))} "
        advice += f"--lr {self.options.lr / 3:.1g}"
        return UserError(
            f"step {step}: the loss is not finite; try {advice}, or a new run with --dtype float32"
        )

    # -- What is printed and logged

    def say(self, text: str):
        """Print a text. If nobody reads it any more, that is a wish to stop."""
        if self.bar is not None:
            self.bar.clear()
        try:
            print(text, flush=True)
        except OSError:
            silence(sys.stdout)
            self.reader_is_gone = True

    def log(self, row: dict):
        """Add the row of a step to the log, and move the bar."""
        if not self.writes:
            return
        line = json.dumps(row, allow_nan=False) + "\n"
        with writing(self.folder / LOG), open(self.folder / LOG, "a", encoding="utf-8") as file:
            file.write(line)
        self.bar.set_postfix_str(f"loss {row['loss']:.3f}, {row['tokens_per_s']:,} tokens/s", refresh=False)
        self.bar.update()

    @property
    def wish_to_stop(self) -> bool:
        """Whether this process was told to stop, by a signal or by a reader of its output that went away."""
        return bool(self.signals.received) or self.reader_is_gone

    def end(self):
        """Say that the training is done."""
        self.bar.close()
        self.say(f"trained, and saved in {self.folder}")
        self.signals.forget()

    def stop(self) -> int:
        """Say how the run goes on. Returns the exit code: 128 and the number of the signal."""
        self.bar.close()
        if self.writes:
            place = shlex.quote(str(self.folder))
            stream = sys.stderr if self.reader_is_gone else sys.stdout
            print(f"stopped, and saved. To continue: python train.py --resume {place}", file=stream)
        return 128 + (self.signals.received or signal.SIGTERM)


# ---- The optimizer ---------------------------------------------------------------------------------------


def optimizer_tensors(optimizer, parameters: dict) -> dict:
    """The optimizer's state of the named parameters, as tensors of a checkpoint: exp_avg/NAME and so on."""
    tensors = {}
    for name, p in parameters.items():
        for key, tensor in optimizer.state[p].items():
            tensors[f"{key}/{name}"] = tensor
    return tensors


def restore_optimizer(optimizer, parameters: dict, tensors: dict):
    """Put the state that optimizer_tensors returned back. The checkpoint of step 0 has none."""
    state_of = {}  # {name: its state}
    for key_and_name, tensor in tensors.items():
        key, slash, name = key_and_name.partition("/")
        if slash:
            state_of.setdefault(name, {})[key] = tensor
    names = {p: name for name, p in parameters.items()}
    state = {}  # {number of a parameter: its state}, as the optimizer counts them
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if names.get(p) in state_of:
            state[i] = state_of[names[p]]
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
