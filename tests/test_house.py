"""The house stays in shape: imports run one way, and what few need is imported late."""

import ast
import json
import subprocess
import sys

import pytest
from helpers import ROOT

import threads

# Each file imports only from files before it.
ORDER = [
    "threads",
    "output",
    "estimates",
    "presets",
    "files",
    "run_folder",
    "device",
    "hub",
    "checkpoint",
    "fast",
    "generation",
    "qwen",
    "saving",
    "ouroboros",
    "patch",
    "memory",
    "inside",
    "processes",
    "documents",
    "sources",
    "data",
    "continuations",
    "evaluate",
    "report",
    "perplexity",
    "card",
    "options",
    "plot",
    "train",
    "sample",
    "look",
]
PROGRAMS = {"train", "sample", "look"}  # these are imported by no file


def imported_by(name: str) -> set[str]:
    """The names of the top-level modules that a file imports, inside functions too."""
    tree = ast.parse((ROOT / f"{name}.py").read_text())
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                modules.add(alias.name.split(".")[0])
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}.py has a relative import"
            modules.add(node.module.split(".")[0])
    return modules


def test_every_file_has_a_place_in_the_order():
    files = {path.stem for path in ROOT.glob("*.py") if not path.stem.startswith("test_")}
    assert files == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_files_before_it(name):
    ours = imported_by(name).intersection(ORDER)
    allowed = set(ORDER[: ORDER.index(name)]) - PROGRAMS
    assert ours <= allowed
    assert "experiments" not in imported_by(name)
    assert "tests" not in imported_by(name)


def modules_after(statement: str) -> dict[str, str]:
    """module -> its file, of all that a new Python has loaded after this statement."""
    code = f"""if True:
        import json, sys
        {statement}
        files = {{}}
        for name, module in list(sys.modules.items()):
            files[name] = str(getattr(module, "__file__", None))
        print(json.dumps(files))"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_how_threads_wait_is_set_before_torch_reads_it(program, monkeypatch):
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    modules = list(modules_after(f"import {program}, os; assert 'GOMP_SPINCOUNT' in os.environ"))
    assert modules.index("threads") < modules.index("torch")


@pytest.mark.parametrize("load, expected", [(0.5, 30_000), (3.9, 30_000), (4.0, 1_000), (9.0, 1_000)])
def test_threads_wait_a_shorter_time_where_other_programs_need_the_cores(load, expected, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    assert threads.turns() == expected


@pytest.mark.parametrize("program", ["plot", "experiments.runs"])
def test_what_only_reads_the_losses_of_runs_starts_without_torch(program):
    assert "torch" not in modules_after(f"import {program}")


def test_importing_the_programs_brings_no_experiments_matplotlib_or_transformers():
    modules = modules_after("import qwen, ouroboros, patch, train, sample, look")
    assert "torch" in modules
    for name, file in modules.items():
        assert name.split(".")[0] not in ("experiments", "matplotlib", "transformers", "plot"), name
        assert not file.startswith(str(ROOT / "experiments")), name
