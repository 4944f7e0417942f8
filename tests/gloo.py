"""Several gloo processes for a test: a test file is the program of its processes as well."""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

LIMIT = 120.0  # seconds after which a scenario counts as hanging; one takes five to ten

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo"
)


def serve(scenarios: Mapping[str, Callable[[int], dict[str, Any]]]) -> None:
    """`python FILE SCENARIO RANK WORLD FOLDER`: run a scenario, and write what it found to FOLDER/RANK.json."""
    name, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    faulthandler.enable()
    faulthandler.dump_traceback_later(LIMIT - 20)  # says where it hangs
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=LIMIT))
    found = scenarios[name](rank)
    (folder / f"{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # what was to be seen is written; taking gloo's threads down can abort a process on a busy machine


def run(program: str, scenario: str, folder: Path, world: int = 2) -> list[Any]:
    """What the processes found, by rank. One that fails or hangs takes the others with it."""
    root = Path(__file__).parent.parent
    paths = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": paths}
    if sys.platform == "linux":
        environment["GLOO_SOCKET_IFNAME"] = "lo"  # a host name that does not resolve is no obstacle then
    with socket.socket() as probe:  # for libraries that go by the environment, as torchrun sets it
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    logs = [folder / f"{rank}.log" for rank in range(world)]
    processes = []
    try:
        for rank in range(world):
            with logs[rank].open("w") as log:
                command = [sys.executable, program, scenario, str(rank), str(world), str(folder)]
                own = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                processes.append(subprocess.Popen(command, stdout=log, stderr=log, env=own))
        end = time.monotonic() + LIMIT
        while any(process.poll() is None for process in processes) and time.monotonic() < end:
            if any(process.poll() for process in processes):  # a code other than 0
                break
            time.sleep(0.05)
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * world, f"exit codes {codes} (None: still running after {LIMIT:g} s)\n{said}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(world)]
