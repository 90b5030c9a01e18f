"""Train on a table of your own and recommend, in Python.

    python examples/bring_your_own_data.py interactions.csv out

Any CSV, TSV, Parquet, JSON-lines or `.inter` file with a user and an item column will do; without arguments the embedded
demo set is used, with a short training.
"""

import sys

from tokenrec_hf import Recipe, leave_one_out, load_interactions, train


def main() -> None:
    """Trains, prints the metrics on the test items, and recommends to one user."""
    source, output = sys.argv[1:3] if len(sys.argv) > 2 else ("demo", "out-demo")
    interactions = load_interactions(source)
    recipe = Recipe.load("quickstart" if source == "demo" else "best")
    repository = train(leave_one_out(interactions), recipe, output, dataset_name=source, log=print)
    for name, result in repository.metrics["test"].items():
        print(f"{name:26} HR@20 {result['hr@20']:.4f}  NDCG@20 {result['ndcg@20']:.4f}")

    recommender = repository.recommender()
    user = interactions[0]["user_id"]
    for rank, item in enumerate(recommender.recommend([user], top_k=5)[0], start=1):
        print(f"{rank}. {item['item']}  (cosine {item['score']:.3f})")


if __name__ == "__main__":
    main()
