"""Tables II and III of TokenRec (arXiv 2406.10450): all models on a data set, full ranking.

    python examples/paper/table2.py --dataset lastfm --models all --seeds 3
    python examples/paper/table2.py --dataset beauty --models popularity ease lightgcn tokenrec-cpu
    python examples/paper/table2.py --dataset beauty --recorded

TokenRec has three rows: user id and history, user id only, and a prompt that training has not seen. The paper's table II is
of LastFM and ML-1M, table III of Beauty and Clothing: another `--dataset` here. What is finished is not repeated; with
`--recorded` the table is that of the measurements in `results/`, as many seeds and settings as there are, without any training. Needs `pip install "tokenrec-hf[paper]"`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from baselines.base import TRIALS
from harness import MODELS, FitError, Fits, recorded, study
from report import write_report

HERE = Path(__file__).parent


def main() -> int:
    """Runs what is not finished and writes the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="%(prog)s --dataset NAME [...]"
    )
    parser.add_argument("--dataset", required=True, help="whatever `tokenrec train` takes")
    parser.add_argument("--models", nargs="+", default=["all"], metavar="NAME", help=f"all, or of {', '.join(MODELS)}")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model that has any randomness")
    parser.add_argument(
        "--trials", type=int, default=TRIALS, help="settings tried of each model, the first of its grid"
    )
    parser.add_argument(
        "--recorded", action="store_true", help="only what is recorded; --seeds and --trials mean nothing"
    )
    parser.add_argument("--results", type=Path, default=HERE / "results", help="one JSON file for each fit")
    parser.add_argument("--work", type=Path, default=Path("out-paper"), help="TokenRec's checkpoints and repositories")
    parser.add_argument("--output", type=Path, default=HERE / "tables")
    arguments = parser.parse_args()
    models = MODELS if arguments.models == ["all"] else arguments.models
    for model in models:
        if model not in MODELS:
            parser.error(f"there is no model {model!r}; choose all, or among {', '.join(MODELS)}.")
    if arguments.seeds < 1 or not 1 <= arguments.trials <= TRIALS:
        parser.error(f"--seeds must be at least 1, and --trials from 1 to {TRIALS}.")

    fits = Fits(arguments.results, arguments.work, log=lambda line: print(line, flush=True))
    rows, failed = [], []
    for model in models:
        seeds, trials = arguments.seeds, arguments.trials
        if arguments.recorded:
            seeds, trials = recorded(arguments.dataset, model, arguments.results)
            if not seeds:
                continue
        try:
            rows += study(arguments.dataset, model, seeds, fits, trials)
        except FitError as error:
            failed.append(model)
            print(error, file=sys.stderr)
    if not rows:
        if arguments.recorded:
            print(
                f"{arguments.results} has no finished model on {arguments.dataset}; leave --recorded out.",
                file=sys.stderr,
            )
        return 1
    name = Path(arguments.dataset).name
    notes = [
        "Test items, ranked among all items that a user has not seen; mean ± standard deviation over runs with different "
        "seeds. Settings are chosen by validation NDCG@20 with seed 0, among as many as the column `of` says. "
        "Time is CPU seconds of the last fit (by the clock for TokenRec), without a GPU where there is such a fit; peak memory is the "
        "whole process's."
    ]
    if failed:
        notes.append(f"Failed, and missing here: {', '.join(failed)}.")
    for path in write_report(rows, f"{name}, leave-one-out", notes, arguments.output, f"table2-{name}"):
        print(path)
    print((arguments.output / f"table2-{name}.md").read_text(encoding="utf-8"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
