"""The rows and columns of an evaluation: which prompts TokenRec is evaluated with, and which baselines it is compared to.

Text only, so that the command line can list them without loading a model.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..models.prompts import (
    HISTORY_ONLY_TEMPLATE,
    HISTORY_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    PromptTemplate,
)

# The metrics that tables show; an evaluation reports more.
SHOWN = ("hr@10", "hr@20", "ndcg@20")


@dataclass(frozen=True)
class Variant:
    """A way to prompt the trained model.

    Args:
        label: its name in tables.
        templates: the wordings of its prompts.
        flag: the option of `tokenrec evaluate` that chooses it; None for the default.
        help: the description of that option.
    """

    label: str
    templates: tuple[PromptTemplate, ...]
    flag: str | None = None
    help: str = ""

    @property
    def names_user(self) -> bool:
        """Whether the prompts give the id of the user."""
        return all(template.names_user for template in self.templates)


VARIANTS = {
    "tokenrec": Variant("TokenRec", HISTORY_TEMPLATES),
    "tokenrec_user_id_only": Variant(
        "TokenRec, user id only", USER_ONLY_TEMPLATES, "--user-id-only", "prompts without the history"
    ),
    "tokenrec_unseen_prompt": Variant(
        "TokenRec, unseen prompt", (UNSEEN_TEMPLATE,), "--unseen-prompt", "a wording that training never used"
    ),
    "tokenrec_history_only": Variant(
        "TokenRec, history only", (HISTORY_ONLY_TEMPLATE,), "--history-only", "prompts without the id of the user"
    ),
}
BASELINES = {
    "popularity": "popularity",
    "itemknn": "ItemKNN",
    "collaborative_dot": "collaborative (dot product)",
    "collaborative_cosine": "collaborative (cosine)",
}
# The label of each row of an evaluation, in the order of a table.
LABELS = {**BASELINES, **{name: variant.label for name, variant in VARIANTS.items()}}
COMPARED = {**LABELS, "ease": "EASE", "ials": "iALS", "lightgcn": "LightGCN", "sasrec": "SASRec"}
