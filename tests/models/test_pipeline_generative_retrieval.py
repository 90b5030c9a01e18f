import shutil

import pytest
from datasets import Dataset
from transformers import pipeline

from tokenrec_hf import EmbeddingStore, Recommender
from tokenrec_hf.models.pipeline_generative_retrieval import GenerativeRetrievalPipeline
from tokenrec_hf.models.prompts import (
    HISTORY_ONLY_TEMPLATE,
    HISTORY_TEMPLATES,
    UNSEEN_TEMPLATE,
    USER_ONLY_TEMPLATES,
    render,
)

TASK = "generative-retrieval"


@pytest.fixture(scope="module")
def recommender(trained_repository):
    return Recommender.from_pretrained(trained_repository)


@pytest.fixture(scope="module")
def recommend(trained_repository):
    return pipeline(TASK, model=str(trained_repository), device="cpu")


@pytest.fixture(scope="module")
def users(recommender):
    """Five users, each with the first items of a history of another length."""
    ids = recommender.store.ids("user")[:5]
    return {user: seen[: n + 1] for n, (user, seen) in enumerate(zip(ids, recommender.store.seen(ids)))}


@pytest.fixture(scope="module")
def requests(users):
    return [{"user": user, "history": history} for user, history in users.items()]


def tokens_of(recommend, request, **settings):
    return recommend.preprocess(request, **settings)["input_ids"][0].tolist()


def tokens_in(recommend, text):
    return recommend.tokenizer(text).input_ids


def named(history):
    return " ".join(f"item_{one}" for one in history)


def items(recommendations):
    return [one["item"] for one in recommendations]


def test_a_request_alone_gets_what_the_recommender_gives(recommend, recommender, users):
    for user, history in users.items():
        expected = recommender.recommend([user], [history])[0]
        assert recommend({"user": user, "history": history}) == expected
        assert len(expected) == 10 and set(expected[0]) == {"item", "score"}


@pytest.mark.parametrize("batch_size", [2, 5])
def test_batches_get_what_the_recommender_gives_for_the_same_batch(recommend, recommender, users, requests, batch_size):
    expected = []
    for start in range(0, len(users), batch_size):
        batch = slice(start, start + batch_size)
        expected += recommender.recommend(list(users)[batch], list(users.values())[batch], top_k=7)
    assert recommend(requests, batch_size=batch_size, top_k=7) == expected


def test_lists_tuples_generators_and_columns_are_several_requests(recommend, requests):
    expected = [recommend(request) for request in requests]
    assert recommend(requests) == expected
    assert recommend(tuple(requests)) == expected
    assert list(recommend(request for request in requests)) == expected
    assert recommend(Dataset.from_dict({"request": requests})["request"]) == expected
    assert recommend([]) == []


def test_a_dataset_of_requests_is_several_requests(recommend, requests):
    rows = [request for request in requests if isinstance(request, dict) and "history" in request]
    assert recommend(Dataset.from_list(rows)) == recommend(rows)


def test_an_absent_history_is_what_the_store_knows(recommend, recommender, users):
    user = list(users)[0]
    seen = recommender.store.seen([user])[0]
    expected = recommender.recommend([user])[0]
    assert recommend({"user": user}) == recommend({"user": user, "history": None}) == expected
    assert tokens_of(recommend, {"user": user}) == tokens_in(recommend, render(HISTORY_TEMPLATES[0], user, seen))


def test_an_empty_history_asks_by_user_id_only(recommend, users):
    user = list(users)[0]
    expected = tokens_in(recommend, render(USER_ONLY_TEMPLATES[0], user))
    assert tokens_of(recommend, {"user": user, "history": []}) == expected


def test_seen_items_are_left_out_unless_they_are_asked_for(recommend, recommender, users):
    user = list(users)[0]
    stranger = [one for one in recommender.store.ids("item") if one not in recommender.store.seen([user])[0]][:2]
    count = recommender.store.count("item")
    found = items(recommend({"user": user, "history": stranger}, top_k=count))
    assert set(found) == set(recommender.store.ids("item")) - {*stranger, *recommender.store.seen([user])[0]}
    assert len(recommend({"user": user, "history": stranger}, top_k=count, exclude_seen=False)) == count


def test_a_history_alone_is_enough(recommend, recommender, users):
    history = list(users.values())[3]
    text = HISTORY_ONLY_TEMPLATE.text.replace("{history}", named(history))
    assert tokens_of(recommend, {"history": history}) == tokens_in(recommend, text)
    found = recommend({"history": history}, top_k=recommender.store.count("item"))
    assert set(items(found)) == set(recommender.store.ids("item")) - set(history)
    # The same as asking with the finished prompt.
    assert found == recommend(text, top_k=recommender.store.count("item"))


def test_of_a_long_history_the_latest_items_are_read_and_none_is_recommended(recommend, recommender):
    history = recommender.store.ids("item")[:250]
    tokens = tokens_of(recommend, {"history": history})
    limit, width = recommend.tokenizer.model_max_length, len(tokens_in(recommend, f"item_{history[0]}")) - 1
    assert limit - width < len(tokens) <= limit
    count = (len(tokens) - len(tokens_in(recommend, HISTORY_ONLY_TEMPLATE.text.replace("{history}", "")))) // width
    assert tokens == tokens_in(recommend, HISTORY_ONLY_TEMPLATE.text.replace("{history}", named(history[-count:])))
    assert not {*items(recommend({"history": history}, top_k=50))} & {*history}


def test_a_whole_prompt_is_a_request_too(recommend, recommender, users):
    user, history = list(users.items())[2]
    text = render(UNSEEN_TEMPLATE, user, history)
    found = recommend(text, top_k=300)
    assert found == recommender.recommend([user], [history], template=UNSEEN_TEMPLATE, top_k=300)[0]
    assert not {*history, *recommender.store.seen([user])[0]} & {*items(found)}


def test_the_wording_may_be_ones_own(recommend, recommender, users):
    user, history = list(users.items())[2]
    request = {"user": user, "history": history}
    own = "Now {user} wants more like {history} please."
    text = own.format(user=f"user_{user}", history=named(history))
    assert tokens_of(recommend, request, prompt=own) == tokens_in(recommend, text)
    expected = recommender.recommend([user], [history], template=UNSEEN_TEMPLATE)[0]
    assert recommend(request, prompt=UNSEEN_TEMPLATE.text) == expected
    text = f"More like item_{history[0]} please."
    assert recommend({"history": history[:1]}, prompt="More like {history} please.") == recommend(text)


def test_a_finished_text_is_asked_as_it_is_and_the_request_is_left_out_of_the_answer(recommend, users):
    (_, history), (other, _) = list(users.items())[2:4]
    text = f"What would user_{other} enjoy next?"
    assert tokens_of(recommend, {"history": history}, prompt=text) == tokens_in(recommend, text)
    found = recommend({"history": history}, prompt=text, top_k=300)
    assert found == [one for one in recommend(text, top_k=300) if one["item"] not in history]


def test_defaults_can_be_set_once(trained_repository, recommend, requests):
    own = pipeline(TASK, model=str(trained_repository), device="cpu", top_k=3, batch_size=2, exclude_seen=False)
    assert own(requests) == recommend(requests, top_k=3, batch_size=2, exclude_seen=False)
    assert len(own(requests[0], top_k=4)) == 4


@pytest.mark.parametrize(
    ("request_", "error", "says"),
    [
        ({"user": "nobody"}, KeyError, "user 'nobody' is unknown"),
        ({"user": "u001.x"}, KeyError, "user 'u001.x' is unknown"),
        ({"history": ["f001", "nothing"]}, KeyError, "item 'nothing' is unknown"),
        ({"users": "u001"}, ValueError, "must be a dict with 'user', 'history' or both"),
        (7, ValueError, "a request is 7 but must be"),
        ({"user": 1}, ValueError, "users must be a list of ids, which are strings, but one is 1"),
        ({"user": ["u001"]}, ValueError, r"but one is \['u001'\]"),
        ({"history": "f001"}, ValueError, "the history of request 0 must be a list of ids, not 'f001'"),
        ({"history": [1]}, ValueError, "history of request 0 must be a list of ids, which are strings, but one is 1"),
        ({"user": "u001", "history": 5}, ValueError, "the history of request 0 must be a list of ids, not 5"),
        ({}, ValueError, "neither a user nor a history is named"),
        ({"history": []}, ValueError, "neither a user nor a history is named"),
        ("What would user_nobody like?", KeyError, "user 'nobody"),
    ],
)
def test_what_is_wrong_with_a_request_is_said_in_one_line(recommend, request_, error, says):
    with pytest.raises(error, match=says) as caught:
        recommend(request_)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("prompt", ["More like {history}, please.", "{history} {other}", "{"])
def test_a_wording_that_is_no_template_is_refused(recommend, prompt):
    with pytest.raises(ValueError, match="or {history} alone"):
        recommend({"history": ["f001"]}, prompt=prompt)


def test_a_finished_text_must_name_somebody(recommend):
    with pytest.raises(ValueError, match="the prompt 'Something nice please.' names no user and no item"):
        recommend({"user": "u001"}, prompt="Something nice please.")


def test_a_wording_that_names_a_user_is_refused_where_none_can_be_made_of_the_history(recommend):
    with pytest.raises(ValueError, match="'For {user} please.' names a user, but"):
        recommend({"history": ["f001"]}, prompt="For {user} please.")


def test_with_fism_a_user_with_a_history_stays_this_user(fism_repository):
    recommend = pipeline("generative-retrieval", model=str(fism_repository))
    found = recommend([{"user": user, "history": ["f001", "f002"]} for user in ("u001", "u002")], top_k=200)
    one, other = ({row["item"]: row["score"] for row in rows} for rows in found)
    assert all(one[item] != other[item] for item in one.keys() & other.keys())


def test_with_fism_a_history_alone_gets_what_its_user_would(fism_repository):
    recommend = pipeline("generative-retrieval", model=str(fism_repository))
    store = recommend.recommender.store
    users = store.ids("user")[:4]
    # The same words for both: scores of different wordings lie so close that rounding could order them.
    for wording in (None, "What should {user} try after {history} then?"):
        of_users = recommend([{"user": user} for user in users], top_k=5, prompt=wording)
        of_histories = recommend([{"history": seen} for seen in store.seen(users)], top_k=5, prompt=wording)
        assert of_histories == of_users
    # A wording without the user leaves T5 alone with the items.
    assert recommend({"history": store.seen(users)[0]}, top_k=5, prompt="What fits {history} best?") != of_users[0]


def test_a_wording_without_the_user_is_refused_where_there_is_one(recommend):
    with pytest.raises(ValueError, match="must hold {user} once"):
        recommend({"user": "u001"}, prompt="More like {history} please.")


def test_an_unknown_argument_is_refused(recommend):
    with pytest.raises(TypeError, match="top_n"):
        recommend({"user": "u001"}, top_n=3)


def test_a_store_can_be_given_and_must_belong_to_the_model(trained_repository, recommend, tmp_path):
    store = EmbeddingStore.open(trained_repository)
    parts = {"model": recommend.model, "tokenizer": recommend.tokenizer, "device": "cpu"}
    assert pipeline(TASK, **parts, store=store)({"user": "u001"}) == recommend({"user": "u001"})
    store.space_ids["item"] = "another"
    with pytest.raises(ValueError, match="load store and tokenizer of the same repository"):
        pipeline(TASK, **parts, store=store)
    without = shutil.copytree(trained_repository, tmp_path / "without", ignore=shutil.ignore_patterns("store"))
    with pytest.raises(FileNotFoundError, match="no embedding store"):
        pipeline(TASK, model=str(without), device="cpu")


def test_saved_again_it_is_the_same_pipeline(recommend, requests, tmp_path):
    recommend.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "pipeline_generative_retrieval.py").is_file()
    again = pipeline(TASK, model=str(tmp_path / "again"), device="cpu")
    assert isinstance(again, GenerativeRetrievalPipeline)
    assert again(requests) == recommend(requests)


def test_saved_again_it_reads_histories_the_same(fism_repository, tmp_path):
    first = pipeline(TASK, model=str(fism_repository), device="cpu")
    first.save_pretrained(tmp_path / "again")
    again = pipeline(TASK, model=str(tmp_path / "again"), device="cpu")
    assert again({"history": ["f026", "f036"]}) == first({"history": ["f026", "f036"]})


def test_it_is_not_pushed_with_the_users_in_it(recommend):
    with pytest.raises(NotImplementedError, match="tokenrec push"):
        recommend.push_to_hub("somebody/something")


def test_a_filter_leaves_only_items_that_it_fits(trained_repository, users):
    store = EmbeddingStore.open(trained_repository)
    chosen = store.ids("item")[10:14]
    store.set_metadata(chosen, [{"genre": "jazz"}] * 4)
    recommend = pipeline(TASK, model=str(trained_repository), store=store, device="cpu")
    found = recommend({"user": list(users)[0], "history": []}, where={"genre": "jazz"}, exclude_seen=False)
    assert sorted(items(found)) == sorted(chosen)


def test_one_bad_request_does_not_lose_the_others(recommend, recommender, users):
    """Requests of all kinds, with and without batches; a prompt that cannot be read is not asked."""
    user, history = list(users.items())[2]
    text = render(UNSEEN_TEMPLATE, user, history)
    requests = [
        {"user": user},
        {"user": "nobody"},
        "What next for user_nobody?",
        {"user": "nobody", "history": history},
    ]
    requests += [{"user": user, "history": [*history, "gone"]}, "nobody", {}, text]
    for batch_size in (1, 3, 8):
        found = recommend(requests, on_unknown="skip", top_k=3, batch_size=batch_size)
        assert [len(rows) for rows in found] == [3, 0, 0, 3, 3, 0, 0, 3]
        assert [rows[0].get("note") for rows in found if rows] == [
            None,
            "user 'nobody' is unknown",
            "item 'gone' is unknown",
            None,
        ]
        assert (
            items(found[0]) == items(recommend({"user": user}, top_k=3))
            and items(found[7]) == items(recommend(text))[:3]
        )
        popular = recommend(requests, on_unknown="popular", top_k=3, batch_size=batch_size)
        assert [items(popular[row]) for row in (1, 2, 5, 6)] == [list(recommender.store.popular(3))] * 4
        assert popular[2][0]["note"].startswith("the text names user 'nobody', which is unknown")
    own = "Now {user} wants more like {history} please."
    assert recommend({"user": "nobody", "history": history}, prompt=own, on_unknown="skip")


def test_all_bad_requests_of_a_list_are_named_at_once(recommend):
    with pytest.raises(KeyError) as caught:
        recommend([{"user": "u001"}, {"user": "nobody"}, {"history": ["gone"]}])
    assert "user 'nobody' is unknown (request 1); item 'gone' is unknown (request 2); " in caught.value.args[0]


def test_code_tokens_in_a_prompt_name_nobody_unless_they_are_allowed(recommend, recommender, trained_repository):
    codes = recommender.tokenizer.codes("user")
    own = [row for row in range(20) if (codes == codes[row]).all(axis=1).sum() == 1]
    text = f"What should user_{recommender.tokenizer.ids('user')[own[0]]} try next?"
    coded = recommend.tokenizer.decode(tokens_in(recommend, text)[:-1], resolve_ids=False)
    with pytest.raises(ValueError, match="names no user and no item"):
        recommend(coded)
    allowed = pipeline(TASK, model=str(trained_repository), device="cpu")
    allowed.tokenizer.allow_code_text = True
    # What the user has seen is left out, as if the user were named.
    assert allowed(coded, top_k=50) == recommend(text, top_k=50)
