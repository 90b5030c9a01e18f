"""The prompt templates and how a prompt is written out (section II-D1 of TokenRec, arXiv 2406.10450).

There are eleven templates in the paper's two families, user id only and user id with history. Ten are for training; one is held
out to test unseen wording. The module handles text only, no tokens, codes or models.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

SPACE = "␣"  # stands for a space within an id where a text names it
_PLACEHOLDER = re.compile(r"\{user\}|\{history\}")


@dataclass(frozen=True)
class PromptTemplate:
    """The wording of a prompt: one `{user}` and, after it, at most one `{history}`, or `{history}` alone.

    A placeholder has white space around it, so that the other parts can be tokenised once and punctuation after an id does not
    cost an extra token.

    Args:
        text: the wording, for example `"Guess what {user} wants to try."`.

    Raises:
        ValueError: the placeholders are missing or misplaced.
    """

    text: str

    def __post_init__(self) -> None:
        placeholders = [word for word in self.text.split() if "{" in word or "}" in word]
        if placeholders not in (["{user}"], ["{user}", "{history}"], ["{history}"]):
            raise ValueError(
                f"prompt template {self.text!r} must hold {{user}} once and then {{history}} at most once, or {{history}} alone, "
                "each between white space and with no other braces."
            )

    @property
    def names_user(self) -> bool:
        """Whether the prompt names a user."""
        return "{user}" in self.text

    @property
    def uses_history(self) -> bool:
        """Whether the prompt names the items of a history."""
        return "{history}" in self.text

    @property
    def static_parts(self) -> tuple[str, ...]:
        """The text before, between and after the placeholders: two strings, or three with user and history."""
        return tuple(_PLACEHOLDER.split(self.text))


USER_ONLY_TEMPLATES = (
    PromptTemplate("What would {user} enjoy next?"),
    PromptTemplate("Guess what {user} wants to try."),
    PromptTemplate("Pick something new for {user} today."),
    PromptTemplate("Think of {user} and name a good match."),
    PromptTemplate("{user} asks for a suggestion."),
)
HISTORY_TEMPLATES = (
    PromptTemplate("{user} liked {history} so far. What comes next?"),
    PromptTemplate("Knowing that {user} chose {history} before, what else fits?"),
    PromptTemplate("What should {user} try after {history} then?"),
    PromptTemplate("The favourites of {user} are {history} and one is missing."),
    PromptTemplate("Suggest more for {user} who picked {history} already."),
)
SEEN_TEMPLATES = USER_ONLY_TEMPLATES + HISTORY_TEMPLATES
"""The ten templates to train on."""

UNSEEN_TEMPLATE = PromptTemplate("Since {user} has spent time with {history} lately, find another item of that taste.")
"""The template that is never trained on."""

HISTORY_ONLY_TEMPLATE = PromptTemplate("What fits {history} best?")
"""The template for anonymous users."""


def render(template: PromptTemplate, user: str, history: Iterable[str] = ()) -> str:
    """Writes out a prompt, e.g. `"What should user_03 try after item_08 item_24 then?"`; spaces within ids become `␣`.

    Args:
        template: the wording; one without `{history}` ignores `history`.
        user: the user's id.
        history: item ids, in the order of the prompt.
    """
    user, *items = (name.replace(" ", SPACE) for name in (user, *history))
    return template.text.format(user=f"user_{user}", history=" ".join(f"item_{item}" for item in items))
