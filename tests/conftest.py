"""Settings that every test needs before torch, TRL or the hub client is imported."""

import os


# One thread: the models here are tiny, and the workers of pytest-xdist share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test may reach a network.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
