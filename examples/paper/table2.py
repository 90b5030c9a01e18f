"""Tables II and III of TokenRec (arXiv 2406.10450): all models on a data set, full ranking.

    python examples/paper/table2.py --dataset lastfm --models all --seeds 3
    python examples/paper/table2.py --dataset beauty --models popularity ease lightgcn tokenrec-best
    python examples/paper/table2.py --dataset beauty --recorded

Fits the models that have no records yet, adds their records to `results/`, and prints the table. With `--recorded`, nothing is
fit: the table has as many seeds and settings as there are records. The paper's table II is of LastFM and ML-1M, table III of
Beauty and Clothing: another `--dataset` here. Needs `pip install "tokenrec-hf[paper]"`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baselines.base import TRIALS
from harness import MODELS, FitError, Fits, recorded_rows, study
from report import markdown

RESULTS = Path(__file__).parent / "results"
NOTE = (
    "Test items, ranked among all items that a user has not seen; mean ± standard deviation over runs with different seeds. "
    "Settings are chosen by validation NDCG@20 with seed 0, among as many as the column `of` says. Time is CPU seconds of the "
    "last fit (wall clock for TokenRec), without a GPU if there is such a fit; peak memory is that of the whole process."
)


def main() -> int:
    """Runs the missing fits and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --dataset NAME [...]"
    )
    parser.add_argument("--dataset", required=True, help="a data set as in `tokenrec train`")
    parser.add_argument("--models", nargs="+", default=["all"], metavar="NAME", help=f"all, or of {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model that has any randomness")
    parser.add_argument(
        "--trials", type=int, default=TRIALS, help="settings tried of each model, the first of its grid"
    )
    parser.add_argument("--recorded", action="store_true", help="fit nothing; --seeds and --trials are ignored")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    parser.add_argument("--work", type=Path, default=Path("out-paper"), help="TokenRec's checkpoints and repositories")
    arguments = parser.parse_args()
    models = MODELS if arguments.models == ["all"] else arguments.models
    for model in models:
        if model not in MODELS:
            parser.error(f"there is no model {model!r}; choose all, or among {', '.join(MODELS)}.")
    if arguments.seeds < 1 or not 1 <= arguments.trials <= TRIALS:
        parser.error(f"--seeds must be at least 1, and --trials from 1 to {TRIALS}.")

    failed: list[str] = []
    if arguments.recorded:
        rows = recorded_rows(arguments.dataset, arguments.results, models)
        if not rows:
            sentence = f"{arguments.results} has no finished model on {arguments.dataset}; leave --recorded out."
            print(sentence, file=sys.stderr)
    else:
        rows = []
        fits = Fits(arguments.results, arguments.work, log=lambda line: print(line, flush=True))
        for model in models:
            try:
                rows += study(arguments.dataset, model, arguments.seeds, fits, arguments.trials)
            except FitError as error:
                failed.append(model)
                print(error, file=sys.stderr)
    if not rows:
        return 1
    notes = [NOTE, f"Failed, and missing here: {', '.join(failed)}."] if failed else [NOTE]
    print(markdown(rows, f"{Path(arguments.dataset).name}, leave-one-out", notes))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
