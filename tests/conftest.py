"""Fixtures that several files share."""

import pytest
import torch
from helpers import make_pretrained, release_claims


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Run the whole suite in two processes, if pytest-xdist is installed. `-n 0` runs it in one."""
    is_worker = hasattr(config, "workerinput")
    is_whole_suite = config.args_source == config.ArgsSource.TESTPATHS
    if is_whole_suite and not is_worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = 2
        config.option.dist = "worksteal"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """The cache of the tests and of the programs that they start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def fixed_seed():
    """Every test draws the same numbers, whichever tests run before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def claims_of_one_test():
    """A folder that a test claims in this process is free for the next test."""
    yield
    release_claims()


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    """A cache for one test alone. Returns its folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "ouroboros"


@pytest.fixture
def pretrained(tmp_path):
    """The folder of a small random model, with a text beside it in text.txt."""
    return make_pretrained(tmp_path)
