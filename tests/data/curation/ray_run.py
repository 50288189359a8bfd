"""Runs a curation by Ray and one by the local engine, each against a server of its own, and prints what came of it."""

import json
import os
import sys
from pathlib import Path


TAGS = ["V", "AS"]


def main(folder: Path) -> None:
    from curation_server import CurationServer
    from test_curation import files_of, write_config

    from maple_trl import cli
    from maple_trl.data.curation import read_config
    from maple_trl.data.curation.engines import ray_running

    def run(path, *words):
        assert cli.main(["data", "curate", "--config", str(path), *words]) == 0

    told = {}
    with CurationServer() as server:
        run(write_config(folder, server.url, output="local", tags=TAGS))
        told["local"] = dict(server.answered)
    with CurationServer() as server:
        path = write_config(folder, server.url, output="ray", tags=TAGS, run={"chunk": 4, "ray_workers": 2})
        with ray_running(read_config(path)):  # once for both runs: its processes import for longer than they work
            run(path, "--engine", "ray")
            told["ray"] = dict(server.answered)
            told["mode"] = os.environ["RAY_AUTH_MODE"]
            before = files_of(folder / "ray")
            work = folder / "ray" / "work"
            told["logs"] = sorted(log.name for log in work.glob("filter*.jsonl"))
            for log in [*work.glob("filter*.jsonl"), *work.glob("questions*.jsonl")]:
                log.unlink()  # as if they were killed before a row was noted: the answers are kept
            run(path, "--engine", "ray")
            told["again"] = dict(server.answered)
            told["violations"] = server.violations
            told["same again"] = files_of(folder / "ray") == before
    local, ray = files_of(folder / "local"), files_of(folder / "ray")
    told["differences"] = sorted(name for name in {*local, *ray} if local.get(name) != ray.get(name))
    print("\n" + json.dumps(told))


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    main(Path(sys.argv[1]))
