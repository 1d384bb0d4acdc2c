"""A pytest plugin for peft's own tests: `MergedLinear` in every LoRA, merging whatever the number of tokens."""

import contextlib
import json
from pathlib import Path

import peft
import pytest
from torch import nn

from abm_vision.abm import merged_linear

merged = 0  # how often the merged product ran in the test of the moment
outcomes = {}  # test to [outcome, merged products]; in pytest-xdist's main process those of all its workers


def pytest_addoption(parser):
    parser.addoption("--stock", action="store_true", help="leave peft's layer in place")
    parser.addoption("--outcomes", type=Path, help="JSON file to write: test to [outcome, merged products]")


def pytest_configure(config):
    from tests import testing_utils  # peft's

    testing_utils.hub_online_once = lambda *_: contextlib.nullcontext()  # it would ask the hub at a model's first use
    if config.getoption("--stock"):
        return
    finish, apply = peft.LoraConfig.__post_init__, merged_linear._MergedLoRA.apply

    def finish_with_ours(self):
        finish(self)
        self._register_custom_module({nn.Linear: merged_linear.merged_linear_factory})

    def count(*operands):
        global merged
        merged += 1
        return apply(*operands)

    peft.LoraConfig.__post_init__ = finish_with_ours
    merged_linear.MergedLinear._merging_pays = lambda self, x: True
    merged_linear._MergedLoRA.apply = count


def pytest_collection_modifyitems(config, items):
    """Leave out tests of other methods, and of layers that ours is not for, by what is among their parameters."""

    def is_ours(item):
        given = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
        methods = [v for v in given if isinstance(v, type) and issubclass(v, peft.PeftConfig)]
        targets = [name for v in given if isinstance(v, dict) for name in v.get("target_modules") or ()]
        others = bool(targets) and all(name.startswith(("conv", "emb", "mha")) for name in targets)
        return all(method is peft.LoraConfig for method in methods) and not others

    config.hook.pytest_deselected(items=[item for item in items if not is_ours(item)])
    items[:] = filter(is_ours, items)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    global merged
    report = yield
    report.merged = merged
    if report.when == "teardown":
        merged = 0
    return report


def pytest_runtest_logreport(report):
    if report.when != "teardown" or not report.passed:
        outcomes[report.nodeid] = [report.outcome, getattr(report, "merged", 0)]  # none of a process that crashed


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):
        session.config.getoption("--outcomes").write_text(json.dumps(outcomes))
