"""`tokenrec serve` under load on loopback, by wall clock, and a cold `tokenrec recommend`.

Clients send one request after the other, each on its own connection, from one process on the same machine. Each request
recommends ten items to one user, or to 64. The CPU time of the service for a request tells more than the latencies where other
work runs on the machine. The repository has the sizes of recipe `best` and random weights, see `recommending`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import psutil
from measure import Row
from recommending import untrained

from tokenrec_hf.models.pipeline_generative_retrieval import GenerativeRetrievalPipeline

CLIENTS, BATCHES = (1, 16), (1, 64)
# Seconds of each load, and turns of the cold commands.
SECONDS, TURNS = 15.0, 5
TOKENREC = [sys.executable, "-m", "tokenrec_hf.cli.app"]
IMPORTS = [sys.executable, "-c", "import torch; from transformers import T5ForConditionalGeneration"]


def rows() -> list[Row]:
    """A cold command beside the import of its libraries, and each load."""
    recommender = untrained(history=31)
    users = recommender.store.ids("user")
    with tempfile.TemporaryDirectory() as folder:
        GenerativeRetrievalPipeline(recommender.model, recommender.tokenizer, recommender.store).save_pretrained(folder)
        return [cold(folder, users[0]), *loads(folder, users)]


def cold(repository: str, user: str) -> Row:
    """The CPU time of `tokenrec recommend`, and of a process that imports torch and T5 and does nothing."""
    commands = [*TOKENREC, "recommend", repository, "--user", user], IMPORTS
    times = np.array([[cpu_seconds(command) for command in commands] for _ in range(TURNS)])
    ours, theirs = np.median(times, axis=0).tolist()
    ratio = np.quantile(times[:, 1] / times[:, 0], [0.25, 0.5, 0.75]).tolist()
    # At most 1.15 times the imports.
    return Row("cold `tokenrec recommend`", ours, "s", "import of torch and T5", theirs, ratio, "≥ 0.87")


def loads(repository: str, users: list[str]) -> Iterator[Row]:
    """Rate, latencies and CPU time of the requests of each number of clients and of users a request."""
    with server(repository) as (process, port):
        load(port, users, 1, 1, SECONDS / 5)  # The first requests are slower.
        for batch in BATCHES:
            for clients in CLIENTS:
                before = sum(process.cpu_times()[:2])
                took = load(port, users, batch, clients, SECONDS)
                cpu = (sum(process.cpu_times()[:2]) - before) / len(took) * 1000
                p50, p99 = (np.percentile(took, [50, 99]) * 1000).tolist()
                what = f"serve, {clients} client{'s' * (clients > 1)}, {batch} user{'s' * (batch > 1)} a request"
                yield Row(f"{what}: requests", len(took) / SECONDS, "a second")
                yield Row(f"{what}: p50", p50, "ms")
                yield Row(f"{what}: p99", p99, "ms")
                yield Row(f"{what}: CPU time", cpu, "ms")


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
