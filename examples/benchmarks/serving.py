"""`tokenrec serve` under load on loopback, and the CPU time of a cold `tokenrec recommend`.

    OMP_NUM_THREADS=1 python examples/benchmarks/serving.py tokenrec-quickstart

Clients send one request after the other, each on its own connection, from a process of their own on the same machine. Each
request recommends ten items to one user, or to 64. "CPU ms" is the CPU time of the service for a request: with other work on the
machine, it tells more than the latencies. The CPU time of a cold `recommend` is compared with that of a process that
imports torch and T5 and does nothing. About two minutes.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil

from tokenrec_hf import EmbeddingStore

CLIENTS, BATCHES = (1, 16), (1, 64)
TOKENREC = [sys.executable, "-m", "tokenrec_hf.cli.app"]
IMPORTS = [sys.executable, "-c", "import torch; from transformers import T5ForConditionalGeneration"]


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repository", help="folder that `tokenrec train` or `tokenrec quickstart` wrote")
    parser.add_argument("--seconds", type=float, default=15, help="of each load")
    parser.add_argument("--repeats", type=int, default=5, help="of the cold commands; the fastest counts")
    arguments = parser.parse_args()
    users = EmbeddingStore.open(arguments.repository).ids("user")

    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} before the start")
    print(
        f"\n{'users a request':<18}{'clients':>8}{'requests/s':>12}{'users/s':>10}{'p50 ms':>9}{'p99 ms':>9}{'CPU ms':>9}"
    )
    with server(arguments.repository) as (process, port):
        load(port, users, 1, 1, 3)  # The first requests are slower.
        for batch in BATCHES:
            for clients in CLIENTS:
                before = sum(process.cpu_times()[:2])
                took = load(port, users, batch, clients, arguments.seconds)
                cpu = (sum(process.cpu_times()[:2]) - before) / len(took) * 1000
                rate = len(took) / arguments.seconds
                p50, p99 = np.percentile(took, [50, 99]) * 1000
                print(f"{batch:<18}{clients:>8}{rate:>12.0f}{rate * batch:>10.0f}{p50:>9.1f}{p99:>9.1f}{cpu:>9.1f}")

    recommend = [*TOKENREC, "recommend", arguments.repository, "--user", users[0]]
    ways = {"cold `tokenrec recommend`": recommend, "import of torch and T5": IMPORTS}
    # Turns alternate, so that a busy moment hits both.
    turns = [[cpu_seconds(command) for command in ways.values()] for _ in range(arguments.repeats)]
    fastest = np.min(turns, axis=0)
    print()
    for name, one in zip(ways, fastest):
        print(f"{name:<30}{one:>8.2f} s of CPU time")
    print(f"ratio {fastest[0] / fastest[1]:.2f}")


@contextmanager
def server(repository: str) -> Iterator[tuple[psutil.Process, int]]:
    """Serves the repository while a block runs, and gives the process and its port."""
    process = subprocess.Popen([*TOKENREC, "serve", repository, "--port", "0"], stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr or ():
            if found := re.search(r"http://127.0.0.1:(\d+);", line):
                yield psutil.Process(process.pid), int(found[1])
                break
        else:
            raise SystemExit("the service did not start.")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def load(port: int, users: list[str], batch: int, clients: int, seconds: float) -> list[float]:
    """The latencies of all requests that several clients get answered in a time."""
    took: list[float] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        random = np.random.default_rng(number)
        connection = http.client.HTTPConnection("127.0.0.1", port)
        while time.perf_counter() < end:
            asked = [{"user": user} for user in random.choice(users, batch).tolist()]
            body = json.dumps({"requests": asked, "top_k": 10})
            started = time.perf_counter()
            connection.request("POST", "/recommend", body, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            took.append(time.perf_counter() - started)
            if answer.status != 200:
                raise SystemExit(f"the service answered {answer.status}: {content.decode()}")

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def cpu_seconds(command: list[str]) -> float:
    """User and system time of a process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} failed.")
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
