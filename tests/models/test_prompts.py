import pytest

from tokenrec_hf.models.prompts import (
    HISTORY_ONLY_TEMPLATE,
    HISTORY_TEMPLATES,
    SEEN_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    PromptTemplate,
    render,
)

ALL = [*SEEN_TEMPLATES, UNSEEN_TEMPLATE]


def test_there_are_ten_seen_templates_and_another_one_is_held_out():
    assert len(SEEN_TEMPLATES) == 10
    assert UNSEEN_TEMPLATE not in SEEN_TEMPLATES
    assert len({template.text for template in ALL}) == 11


def test_both_families_are_seen_and_the_unseen_template_uses_history():
    assert set(SEEN_TEMPLATES) == {*USER_ONLY_TEMPLATES, *HISTORY_TEMPLATES}
    assert not any(template.uses_history for template in USER_ONLY_TEMPLATES)
    assert all(template.uses_history for template in [*HISTORY_TEMPLATES, UNSEEN_TEMPLATE])


@pytest.mark.parametrize("template", ALL)
def test_a_prompt_names_the_user_and_the_items_in_the_order_given(template):
    words = render(template, "03", ["63", "08", "24"]).split()
    assert words.count("user_03") == 1
    items = [word for word in words if word.startswith("item_")]
    assert items == (["item_63", "item_08", "item_24"] if template.uses_history else [])


def test_a_prompt_may_say_nothing_of_the_user():
    assert not HISTORY_ONLY_TEMPLATE.names_user and HISTORY_ONLY_TEMPLATE.uses_history
    assert render(PromptTemplate("After {history} comes"), "03", ["08", "24"]) == "After item_08 item_24 comes"
    assert PromptTemplate("After {history} comes").static_parts == ("After ", " comes")
    assert all(template.names_user for template in ALL)


def test_items_are_separated_by_one_space():
    template = PromptTemplate("Ask {user} about {history} now.")
    assert render(template, "03", iter(["08", "24"])) == "Ask user_03 about item_08 item_24 now."


def test_ids_with_braces_are_written_as_they_are():
    assert render(PromptTemplate("Ask {user} about {history} now."), "{x}", ["{history}"]) == (
        "Ask user_{x} about item_{history} now."
    )


@pytest.mark.parametrize("template", ALL)
def test_static_parts_are_the_template_without_its_placeholders(template):
    parts = template.static_parts
    assert len(parts) == (3 if template.uses_history else 2)
    names = ["{user}", "{history}"][: len(parts) - 1]
    assert "".join(part + name for part, name in zip(parts, [*names, ""])) == template.text


@pytest.mark.parametrize(
    "text",
    [
        "nobody",
        "first {history} then {user} here",
        "{user} and {user}",
        "{user} , {history} {history}",
        "what {user}, with a comma",
        "({user}) here",
        "{user}{history}",
        "{user} with {other}",
    ],
)
def test_a_template_with_misplaced_placeholders_is_refused(text):
    with pytest.raises(ValueError, match=r"must hold \{user\} once"):
        PromptTemplate(text)
