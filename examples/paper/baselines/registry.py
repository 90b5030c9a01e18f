"""The baselines by their names on the command line; a baseline's module is imported when it is needed."""

from __future__ import annotations

import importlib

from .base import Baseline

BASELINES = {
    "popularity": "closed_forms:Popularity",
    "itemknn": "closed_forms:ItemKNN",
    "ease": "closed_forms:EASE",
    "ials": "ials:IALS",
    "mf": "mf_bpr:MFBPR",
    "neumf": "neumf:NeuMF",
    "lightgcn": "lightgcn:LightGCN",
    "gtn": "gtn:GTN",
    "ltgnn": "ltgnn:LTGNN",
    "sasrec": "sasrec:SASRec",
    "bert4rec": "bert4rec:BERT4Rec",
    "s3rec": "s3rec:S3Rec",
    "p5-rid": "p5:P5RID",
    "p5-sid": "p5:P5SID",
    "p5-cid": "p5:P5CID",
    "pod": "pod:POD",
    "collm": "collm:CoLLM",
}


def load_baseline(name: str) -> type[Baseline]:
    """The baseline class with a name.

    Raises:
        ValueError: there is no such baseline.
    """
    if name not in BASELINES:
        raise ValueError(f"there is no baseline {name!r}; choose among {', '.join(BASELINES)}.")
    module, class_name = BASELINES[name].split(":")
    return getattr(importlib.import_module(f".{module}", __package__), class_name)
