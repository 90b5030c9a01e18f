"""The data set `demo`: made-up users and films, small enough to learn from in a minute or two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from datasets import Dataset

_GENRES = (
    ("Harbor", "Tide", "Lighthouse", "Sailor", "Reef"),
    ("Comet", "Orbit", "Colony", "Signal", "Android"),
    ("Detective", "Alibi", "Witness", "Cipher", "Verdict"),
    ("Wedding", "Letter", "Summer", "Dance", "Kiss"),
    ("Castle", "Dragon", "Wizard", "Crown", "Oath"),
    ("Saddle", "Canyon", "Sheriff", "Prairie", "Outlaw"),
    ("Cellar", "Mirror", "Scream", "Crypt", "Shadow"),
    ("Cousin", "Roommate", "Holiday", "Mix-Up", "Parrot"),
    ("Regiment", "Trench", "Armistice", "Convoy", "Medal"),
    ("Melody", "Encore", "Drummer", "Stage", "Ballad"),
)
_ADJECTIVES = (
    "Silent", "Last", "Crimson", "Hidden", "Golden", "Broken", "Distant", "Restless", "Midnight", "Forgotten", "Second", "Lucky",
)  # fmt: skip


def demo_interactions(seed: int = 0, num_users: int = 1000, num_items: int = 300) -> Dataset:
    """A small made-up data set with learnable tastes, the same for the same arguments.

    Items (films) belong to ten genres and are unequally popular within a genre (Zipf). Half of the users like one genre,
    the other half two, and all users sometimes watch a film of another genre. Each user has 10 to 30 films. Films of a genre
    with the same noun in the title are a series: three in four are watched after one another in the order of the series, the
    others at any time.

    Args:
        seed: seed of the random numbers.
        num_users: number of users, `u001`, `u002`, ...
        num_items: number of items, `f001`, `f002`, ..., at least 30.

    Returns:
        Columns `user_id`, `item_id` and `timestamp` (int64, seconds), grouped by user and in time order.

    Raises:
        ValueError: there are too few users or items.
    """
    # Imported here, because the titles need no more than the strings above.
    from datasets import Dataset

    if num_users < 1 or num_items < 30:
        raise ValueError(f"the demo data set needs 1 user and 30 items or more, not {num_users} and {num_items}.")
    random = np.random.Generator(np.random.PCG64(seed))
    genre, rank = np.arange(num_items) % len(_GENRES), np.arange(num_items) // len(_GENRES)
    popularity = np.where(np.arange(len(_GENRES))[:, None] == genre, (rank + 2.0) ** -0.8, 0)
    popularity /= popularity.sum(axis=1, keepdims=True)
    audience = (np.arange(len(_GENRES)) + 3.0) ** -0.5

    first = random.choice(len(_GENRES), num_users, p=audience / audience.sum())
    second = (first + random.integers(1, len(_GENRES), num_users)) % len(_GENRES)
    share = np.where(random.random(num_users) < 0.5, 0, 0.3)[:, None]
    taste = (1 - share) * popularity[first] + share * popularity[second]
    chance = 0.85 * taste + 0.15 * popularity.mean(axis=0)

    counts = random.integers(10, 31, num_users)
    # The items with the largest log-probabilities plus Gumbel noise are a draw without replacement.
    drawn = np.argsort(-(np.log(chance) + random.gumbel(size=chance.shape)), axis=1)
    items = drawn[np.arange(num_items) < counts[:, None]]
    users = np.repeat(np.arange(num_users), counts)
    series = genre[items] * len(_GENRES[0]) + rank[items] % len(_GENRES[0])
    together = random.random((num_users, len(_GENRES) * len(_GENRES[0])))[users, series]
    moment = np.where(random.random(len(items)) < 0.75, together, random.random(len(items)))
    items = items[np.lexsort((rank[items], moment, users))]

    hours = np.cumsum(random.integers(1, 100, len(items)))
    started = hours[np.cumsum(counts) - counts]
    timestamps = 1_704_067_200 + 3600 * (hours - np.repeat(started, counts))
    user_ids, item_ids = np.array(_numbered("u", num_users)), np.array(_numbered("f", num_items))
    return Dataset.from_dict(
        {
            "user_id": user_ids[users].tolist(),
            "item_id": item_ids[items].tolist(),
            "timestamp": timestamps.astype(np.int64),
        }
    )


def demo_titles(num_items: int = 300) -> dict[str, str]:
    """The titles of the films by item id. The titles of the first 600 items differ."""
    titles = []
    for item in range(num_items):
        rank, genre = divmod(item, len(_GENRES))
        # 12 adjectives and 5 nouns have no common divisor, so a genre has 60 different titles.
        titles.append(f"The {_ADJECTIVES[rank % 12]} {_GENRES[genre][rank % 5]}")
    return dict(zip(_numbered("f", num_items), titles))


def _numbered(letter: str, count: int) -> list[str]:
    return [f"{letter}{number:03d}" for number in range(1, count + 1)]
