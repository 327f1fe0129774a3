"""Loads the search page's API as many users would, and prints latencies and errors.

python -m eccl.search.app --gallery gallery.db --model DIR --requests_per_minute 1000000
python tests/programs/app_load.py --url http://127.0.0.1:7860 --users 50 --seconds 60

First one user asks alone. Then every user asks again as soon as the answer has come.
"""

import argparse
import http.client
import json
import os
import random
import sys
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

COLOURS = ("red", "blue", "green", "yellow", "white", "black", "grey", "orange", "purple", "pink")
CLOTHES = ("coat", "jacket", "shirt", "sweater", "dress", "skirt", "jeans", "trousers", "shoes", "hat", "backpack")


def make_sentence(chance: random.Random) -> str:
    things = " and ".join(f"a {chance.choice(COLOURS)} {chance.choice(CLOTHES)}" for _ in range(3))
    return f"a {chance.choice(('man', 'woman', 'person'))} with {things}"


class User:
    """Somebody with a connection, who asks one question after the other."""

    def __init__(self, url: str, seed: int):
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
        self._chance = random.Random(seed)
        self.latencies: list[float] = []
        self.errors: Counter[str] = Counter()

    def ask(self) -> None:
        start = time.perf_counter()
        try:
            body = json.dumps({"sentence": make_sentence(self._chance), "top_k": 20})
            self._connection.request("POST", "/api/search", body)
            answer = self._connection.getresponse()
            content = answer.read()
            problem = "" if answer.status == 200 and json.loads(content)["matches"] else f"{answer.status} {content!r}"
        except (OSError, http.client.HTTPException) as error:
            problem = repr(error)
            self._connection.close()
        self.latencies.append(1000 * (time.perf_counter() - start))
        if problem:
            self.errors[problem[:100]] += 1

    def ask_until(self, end: float) -> None:
        while time.perf_counter() < end:
            self.ask()


def percentile(latencies: list[float], share: float) -> float:
    ordered = sorted(latencies)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def describe(name: str, users: list[User], seconds: float) -> int:
    """Prints what the users met; returns the number of errors."""
    latencies = [latency for user in users for latency in user.latencies]
    errors = sum((user.errors for user in users), Counter())
    p50, p99 = (percentile(latencies, share) for share in (0.5, 0.99))
    print(
        f"{name}: {len(latencies)} queries, {len(latencies) / seconds:.1f} a second, "
        f"p50 {p50:.0f} ms, p99 {p99:.0f} ms, longest {max(latencies):.0f} ms, {errors.total()} errors, "
        f"load of the machine {os.getloadavg()[0]:.1f}"
    )
    for problem, count in errors.most_common(5):
        print(f"  {count} times: {problem}")
    return errors.total()


def load(url: str, count: int, seconds: float, alone: int) -> int:
    """Runs both parts; returns the number of errors."""
    one = User(url, 0)
    start = time.perf_counter()
    for _ in range(alone):
        one.ask()
    failed = describe("one user", [one], time.perf_counter() - start)
    users = [User(url, 1 + user) for user in range(count)]
    start = time.perf_counter()
    threads = [threading.Thread(target=user.ask_until, args=(start + seconds,)) for user in users]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return failed + describe(f"{count} users", users, time.perf_counter() - start)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--url", default="http://127.0.0.1:7860")
    parser.add_argument("--users", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--alone", type=int, default=50, help="number of queries of the one user")
    options = parser.parse_args()
    sys.exit(1 if load(options.url, options.users, options.seconds, options.alone) else 0)
