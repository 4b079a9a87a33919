"""The house stays small: imports run one way on few floors, and the pages name what there is."""

import ast
import doctest
import importlib
import re
import sys
from functools import cache

import pytest
import torch
from helpers import ROOT, TOKENIZER, small_model, tokens
from test_train import short_end as short_end  # a fixture that every test uses

import data
from ouroboros import Ouroboros
from support.options import build_parser

TOUR = ROOT / "docs" / "tour.md"
TOP = ["data", "evaluate", "look", "ouroboros", "patch", "qwen", "sample", "test_ouroboros", "train"]
FILES = {name: ROOT / f"{name}.py" for name in TOP if name != "test_ouroboros"}
FILES |= {f"support.{path.stem}": path for path in ROOT.glob("support/*.py")}


@cache
def imported_by(name: str) -> set[str]:
    """The names of our modules that a file imports, inside functions too."""
    modules = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.Import):
            modules.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            modules.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return modules & FILES.keys()


def floor(name: str, above=()) -> int:
    """The length of the longest way down from a file."""
    assert name not in above, f"{' -> '.join(above)} -> {name}: imports go round"
    return 1 + max((floor(below, (*above, name)) for below in imported_by(name)), default=0)


def test_imports_run_one_way_on_at_most_seven_floors():
    assert sorted(path.stem for path in ROOT.glob("*.py")) == TOP
    assert max(floor(name) for name in FILES) <= 7
    assert len(imported_by("ouroboros")) <= 4
    assert not any(imported_by(name).intersection(TOP) for name in FILES.keys() - set(TOP))


def test_no_file_loads_a_pickle_and_train_has_at_most_26_options():
    for path in (*FILES.values(), *ROOT.glob("experiments/*.py")):
        code = ast.unparse(ast.parse(path.read_text()))  # without comments
        assert not re.search(r"(import|from) pickle|\btorch\.load\(", code), path
    assert len([action for action in build_parser()._actions if action.dest != "help"]) <= 26


def test_every_command_of_the_pages_names_a_program_and_options_that_there_are(monkeypatch, capsys):
    pages = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    text = "\n".join(page.read_text() for page in pages)
    commands = re.findall(r"(?:python|\d) ((?:\w+/)?\w+)\.py([^`\n]*)", text)
    assert len(commands) > 5
    helps = {}
    for program, words in commands:
        if program not in helps:
            monkeypatch.setattr(sys, "argv", [program, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(program.replace("/", ".")).main()
            helps[program] = capsys.readouterr().out
        for option in re.findall(r"(?<!\S)--[a-z-]+", words.partition("#")[0]):
            assert re.search(f"{option}(?![a-z-])", helps[program]), f"{program}.py has no {option}"


def test_the_tour_prints_what_it_shows_and_names_tests_that_there_are(monkeypatch, tmp_path):
    (tmp_path / "tiny").symlink_to(ROOT / "tiny")
    monkeypatch.chdir(tmp_path)
    assert doctest.testfile(str(TOUR), module_relative=False, encoding="utf-8").failed == 0
    tests = "".join(path.read_text() for path in [ROOT / "test_ouroboros.py", *ROOT.glob("tests/*.py")])
    assert all(f"def {name}(" in tests for name in re.findall(r"`(test_\w+)`", TOUR.read_text()))


def test_the_variants_of_the_tour_do_what_the_page_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "BUILT_IN_TEXTS", data.BUILT_IN_TEXTS.copy())
    names = {}
    for block in re.findall(r"```python\n(.*?)```", TOUR.read_text(), re.DOTALL):
        exec(block, names)
    classes = [value for value in names.values() if isinstance(value, type)]
    for kind in [kind for kind in classes if issubclass(kind, Ouroboros)]:
        model = small_model(kind=kind)
        model.loss(tokens(), tokens(seed=2)).backward()
        assert all(p.grad is not None for p in model.trained_parameters().values())
        ids = tokens()
        assert torch.allclose(model(ids[:, :5]), model(ids)[:, :5], atol=1e-5)  # nothing sees a later token
        for _ in range(5):  # without a cache
            ids = torch.cat([ids, model(ids)[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(model.generate(tokens(), 5), ids)
    for name in data.BUILT_IN_TEXTS.keys() - {"python", "fineweb-edu"}:
        for split in ("train", "held-out"):
            ids, targets = data.Batches(data.Tokens(data.open_text(name), split, TOKENIZER), 8).batch(0, 2)
            assert torch.equal(ids[:, 1:], targets[:, :-1])
