"""Settings that every test needs before torch, TRL or the hub client is imported."""

import collections
import gc
import os
import signal

import leftovers
import outbound
import pytest
from hypothesis import settings


# One thread: the models here are tiny, and the workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a network: what tries is refused, and libraries are told not to try.
outbound.watch()
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
# A shell has its background jobs, and so what they start, ignore the interrupts that tests send.
signal.signal(signal.SIGINT, signal.default_int_handler)


# How long an example takes says more about the machine than about the code.
# The same examples each time, so that what was green stays green until the code changes.
settings.register_profile("unhurried", parent=settings.default, deadline=None, max_examples=25, derandomize=True)
# `make test-long` and `make test-fuzz`: other examples every time, and of readers and parsers many more.
settings.register_profile("others", parent=settings.get_profile("unhurried"), max_examples=100, derandomize=False)
settings.register_profile("long", parent=settings.get_profile("others"), max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unhurried"))


@pytest.fixture(scope="module")
def seven_tags(tmp_path_factory):
    """A folder with real clips, and four rows of each tag. Some modules make a set of their own under this name."""
    from media_files import copy_small_set  # not before the settings above

    folder = tmp_path_factory.mktemp("seven-tags")
    return folder, copy_small_set(folder, seed=5)


# Markers of what `make test` leaves out, and why.
LEFT_OUT = {
    "claims": "makes what runs of claims begin with, for minutes; make test-claims runs it",
    "long": "a long form of a test, or one of many cases of which others were run; make test-long runs it",
}


def left_out(item):
    """Why a test is not run, or `None`."""
    asked = item.config.option.markexpr
    return next(
        (why for marker, why in LEFT_OUT.items() if item.get_closest_marker(marker) and marker not in asked), None
    )


def pytest_runtest_setup(item):
    if (reason := left_out(item)) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def tested(request):
    """Tells of a test of this file with which values of a parameter it is run, so that no more is made for it."""
    own = [item for item in request.session.items if item.path == request.path and left_out(item) is None]
    return lambda test, name: {item.callspec.params[name] for item in own if item.originalname == test}


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # once, in the process that all others come from
        leftovers.watch()
    else:
        import programs  # not before the settings above

        programs.serve_copies()


@pytest.hookimpl(tryfirst=True)  # before `-m` is looked at
def pytest_collection_modifyitems(items):
    """
    Leaves most cases of a matrix to `make test-long`, and takes the slow files first, so that no core is idle at the end
    (`make test` deals files to workers in this order).
    """
    matrices = collections.defaultdict(list)
    for item in items:
        if item.get_closest_marker("matrix"):
            matrices[item.path, item.cls, item.originalname].append(item)
    for cases in matrices.values():
        kept = cases[0].get_closest_marker("matrix").kwargs["cases"]
        # Evenly spread, so that of several parameters each has different values.
        chosen = {round(place * (len(cases) - 1) / max(1, kept - 1)) for place in range(kept)}
        for place, item in enumerate(cases):
            if place not in chosen:
                item.add_marker(pytest.mark.long)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure():
    outbound.stop()
    gc.unfreeze()  # so that extension modules find nothing of theirs left, and are silent


def pytest_collection_finish():
    _leave_out_of_collections()


@pytest.fixture(autouse=True)
def reaches_nothing(request):
    """Fails a test in which something tried to reach beyond this machine, unless the test asks for what was tried."""
    before = outbound.noted()
    yield
    if "refused" not in request.fixturenames:
        found = outbound.noted()[len(before) :]
        assert not found, "reached for what is not on this machine:\n" + "\n".join(found)


@pytest.fixture
def refused():
    """Returns, called, what was tried beyond this machine, in this test, which may try it."""
    outbound.forget()
    yield outbound.noted
    outbound.forget()


@pytest.fixture(autouse=True, scope="module")
def settled():
    """Before the tests of a file: at the end of those before, pytest still holds what its last test was given."""
    _leave_out_of_collections()


def _leave_out_of_collections():
    """
    Takes what is there to stay, of imports and of the tests of a file, out of garbage collection: accelerate collects at
    the start of each training, and would look at a million objects of torch and transformers each time.
    """
    gc.collect()
    gc.freeze()
