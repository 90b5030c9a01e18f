"""Tests of push and pull against a Hub double on loopback."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import typer
from hub_double import TOKEN
from huggingface_hub import RepoCard
from repository_checks import contents

import tokenrec_hf
from tokenrec_hf import EmbeddingStore, FISMModel, LightGCNModel, MQTokenizerModel, Recommender, TokenRecTokenizer
from tokenrec_hf.cli import app
from tokenrec_hf.cli.app import main
from tokenrec_hf.models.codes import fetch_repository
from tokenrec_hf.repository.repository import Repository

NAME = "tester/demo"


@pytest.fixture
def repository(trained_repository, tmp_path):
    copy = tmp_path / "repository"
    shutil.copytree(trained_repository, copy)
    return copy


@pytest.fixture(scope="module")
def expected(trained_repository):
    """What the repository recommends to three users."""
    recommender = Recommender.from_pretrained(trained_repository)
    users = recommender.store.ids("user")[:3]
    return dict(zip(users, recommender.recommend(users, top_k=5)))


def run(script, environment):
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_a_pushed_repository_recommends_elsewhere_what_it_recommends_here(hub, repository, expected, tmp_path):
    Repository(repository).push_to_hub(NAME, include_users=True)
    script = f"""
import json, torch
import tokenrec_hf
from transformers import AutoModel, AutoTokenizer
torch.set_num_threads({os.environ.get("OMP_NUM_THREADS", "1")})
users = {list(expected)!r}
one = tokenrec_hf.Recommender.from_pretrained({NAME!r})
parts = AutoModel.from_pretrained({NAME!r}), AutoTokenizer.from_pretrained({NAME!r}), tokenrec_hf.EmbeddingStore.from_pretrained({NAME!r})
other = tokenrec_hf.Recommender(*parts)
print(json.dumps([dict(zip(users, way.recommend(users, top_k=5))) for way in (one, other)]))
"""
    assert json.loads(run(script, hub.environment(tmp_path / "elsewhere"))) == [expected, expected]


def test_a_push_is_one_commit_of_what_a_repository_holds(hub, repository):
    strays = [
        "credentials.json",
        "notes.txt",
        "private.py",
        "store/items-0000000000000000.safetensors",
        "store/my.json",
    ]
    for name in strays:
        (repository / name).write_text("mine")
    address = Repository(repository).push_to_hub(NAME, include_users=True)
    pushed = hub.repositories["model", NAME]
    assert pushed.messages == ["initial commit", "Upload TokenRec recommender"]
    assert address.endswith(pushed.branches["main"])
    files = hub.files(NAME)
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "metrics.json",
        "recipe.yaml",
        "mq_item/config.json",
    } <= set(files)
    assert {"store/store.json", "collaborative/model.safetensors"} <= set(files)
    assert not set(strays) & set(files)
    assert "mine" not in files.values()
    assert not any(path.startswith("training/") for path in files)


def test_the_command_names_the_files_that_it_leaves_out(hub, repository, capsys):
    (repository / "credentials.json").write_text("{}")
    assert main(["push", str(repository), NAME]) == 0
    assert "not uploaded: credentials.json." in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["recipe.yaml", "store/store.json", "mq_item/model.safetensors"])
def test_a_link_to_a_file_elsewhere_is_not_pushed(hub, repository, tmp_path, name):
    (repository / name).rename(tmp_path / "secret")
    (repository / name).symlink_to(tmp_path / "secret")
    with pytest.raises(ValueError, match=r"is a link to .*secret, outside the repository"):
        Repository(repository).push_to_hub(NAME)
    assert ("model", NAME) not in hub.repositories or set(hub.files(NAME)) <= {".gitattributes"}


def test_what_was_downloaded_can_be_pushed_again(hub, repository):
    Repository(repository).push_to_hub(NAME)
    Repository.from_pretrained(NAME).push_to_hub("tester/again")
    assert set(hub.files("tester/again")) == set(hub.files(NAME))


def test_the_cached_copy_of_a_hub_repository_is_read_but_not_changed(hub, repository):
    Repository(repository).push_to_hub("tester/cached")
    opened = Repository.from_pretrained("tester/cached")
    assert opened.info()["counts"]["item"] == 300
    before = contents(opened.folder)
    for change in (opened.repair, lambda: opened.add(metadata={}), lambda: opened.remove(items=[])):
        with pytest.raises(
            ValueError, match="is the cached copy of the Hub repository tester/cached.* `hf download tester"
        ):
            change()
    assert contents(opened.folder) == before


def test_nothing_of_users_is_pushed_unless_asked(hub, repository):
    users = EmbeddingStore.open(repository).ids("user")
    Repository(repository).push_to_hub(NAME)
    files = hub.files(NAME)
    assert not any(path.startswith("collaborative/") for path in files)
    for path, content in files.items():
        # In a table, ids lie one after the other; in a text, they are words.
        assert not any((one + other).encode() in content for one, other in itertools.pairwise(users)), path
        if not path.endswith(".safetensors"):
            assert not set(re.findall(r"\w+", content.decode())) & set(users), path


def test_a_repository_without_users_recommends_to_histories(hub, repository):
    Repository(repository).push_to_hub(NAME)
    folder = fetch_repository(NAME)
    recommender = Recommender.from_pretrained(NAME)
    assert recommender.store.count("user") == 0
    assert recommender.store.ids("item") == EmbeddingStore.open(repository).ids("item")
    with pytest.raises(KeyError, match="user 'u001' is unknown"):
        recommender.recommend(["u001"])
    from transformers import pipeline

    history = recommender.store.ids("item")[:3]
    found = pipeline("generative-retrieval", model=NAME)({"history": history}, top_k=4)
    assert found == pipeline("generative-retrieval", model=str(repository))({"history": history}, top_k=4)
    assert len(found) == 4
    assert not {row["item"] for row in found} & set(history)
    assert folder.is_dir()


def test_the_item_side_of_fism_is_pushed_without_histories(hub, fism_repository, tmp_path):
    Repository(shutil.copytree(fism_repository, tmp_path / "own")).push_to_hub(NAME)
    here = EmbeddingStore.open(fism_repository)
    users = here.ids("user")
    for path, content in hub.files(NAME).items():
        assert not any((one + other).encode() in content for one, other in itertools.pairwise(users)), path
    pushed = FISMModel.from_pretrained(fetch_repository(NAME) / "collaborative")
    assert pushed.config.num_users == 0 and pushed.edge_users.numel() == pushed.edge_items.numel() == 0
    from transformers import pipeline

    requests = [{"history": seen} for seen in here.seen(users[:5])]
    found = pipeline("generative-retrieval", model=NAME)(requests, top_k=4)
    known = Recommender.from_pretrained(fism_repository).recommend(users[:5], top_k=4)
    assert [[row["item"] for row in one] for one in found] == [[row["item"] for row in one] for one in known]


@pytest.mark.parametrize("kind", ["create", "preupload", "lfs batch", "lfs upload", "commit"])
def test_a_push_that_breaks_off_leaves_the_old_revision_whole(hub, repository, kind, monkeypatch):
    # The client tries again, and waits in between.
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    Repository(repository).push_to_hub(NAME)
    before, messages = hub.files(NAME), list(hub.repositories["model", NAME].messages)
    newer = repository.parent / "newer"
    shutil.copytree(repository, newer)
    store = EmbeddingStore.open(newer)
    store.delete("item", store.ids("item")[-1:])
    store.save_pretrained(newer / "store")
    hub.drop_at = kind
    with pytest.raises(OSError, match="the Hub could not be reached for tester/demo"):
        Repository(newer).push_to_hub(NAME)
    hub.drop_at = None
    assert hub.files(NAME) == before
    assert hub.repositories["model", NAME].messages == messages
    assert Recommender.from_pretrained(NAME).store.count("item") == EmbeddingStore.open(repository).count("item")
    Repository(newer).push_to_hub(NAME)
    assert Recommender.from_pretrained(NAME).store.count("item") == store.count("item")
    # The files of the former store are named by their content.
    assert sum(path.startswith("store/items") for path in hub.files(NAME)) == 1


def test_a_push_takes_a_committed_change_along_and_sweeps_the_copy_of_a_killed_push(hub, repository, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Repository, "_finish", lambda repository: None)
        Repository(repository).remove(users=EmbeddingStore.open(repository).ids("user")[:1])
    if (child := os.fork()) == 0:
        monkeypatch.setattr(
            "huggingface_hub.HfApi.upload_folder", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        )
        Repository(repository).push_to_hub(NAME, include_users=True)
    os.waitpid(child, 0)
    assert len(list(repository.glob(".push-*/repository/store/users-*"))) == 1
    Repository(repository).push_to_hub(NAME, include_users=True)
    assert not list(repository.glob(".push-*"))
    store = Recommender.from_pretrained(NAME).store
    assert store.ids("user") == EmbeddingStore.open(repository).ids("user")
    assert store.count("user") == 999 and not any(".update" in name for name in hub.files(NAME))


def test_revisions_are_branches(hub, repository):
    Repository(repository).push_to_hub(NAME)
    main_branch = hub.files(NAME)
    Repository(repository).push_to_hub(NAME, revision="with-users", include_users=True, commit_message="Now with users")
    assert hub.files(NAME) == main_branch and hub.repositories["model", NAME].messages[-1] == "Now with users"
    assert Recommender.from_pretrained(NAME, revision="with-users").store.count("user") > 0
    assert EmbeddingStore.from_pretrained(NAME, revision="with-users").count("user") > 0
    with pytest.raises(FileNotFoundError, match="the Hub repository tester/demo has no revision 'none'"):
        Recommender.from_pretrained(NAME, revision="none")


def test_a_private_repository_needs_a_token(hub, repository):
    Repository(repository).push_to_hub(NAME, private=True)
    for read in (part.from_pretrained for part in (Recommender, Repository, EmbeddingStore)):
        with pytest.raises(FileNotFoundError, match="no repository of that name that your token may read"):
            read(NAME, token=False)
    assert Recommender.from_pretrained(NAME).store.count("item")


def test_a_token_that_is_given_reaches_the_mq_tokenizers_too(hub, repository, tmp_path):
    Repository(repository).push_to_hub(NAME, private=True)
    script = f"""
from tokenrec_hf import TokenRecTokenizer
tokenizer = TokenRecTokenizer.from_pretrained({NAME!r}, token={TOKEN!r})
size = tokenizer.codes("item").shape[1]
tokenizer.add_items({{"nova": [0.5] * {EmbeddingStore.open(repository).embedding_dim}}})
print(tokenizer.codes("item", ["nova"]).shape == (1, size))
"""
    # The environment of this process has a token, which must not help.
    elsewhere = {**hub.environment(tmp_path / "elsewhere", token=None), "HF_TOKEN": ""}
    assert run(script, elsewhere) == "True\n"


def test_who_may_not_write_is_told_to_log_in(hub, repository):
    with pytest.raises(OSError, match=r"the Hub refused tester/demo with status 401 .*hf auth login"):
        Repository(repository).push_to_hub(NAME, token="hf_wrong")
    assert not hub.repositories


@pytest.mark.parametrize("name", ["no such/name at all", "a/b/c"])
def test_what_is_neither_a_folder_nor_a_name_is_said_to_be(name):
    with pytest.raises(FileNotFoundError, match="there is no folder .*, and no Hub repository can have that name"):
        fetch_repository(name)


def test_offline_and_not_downloaded_is_said():
    with pytest.raises(FileNotFoundError, match="it has not been downloaded before, and the Hub cannot be reached"):
        fetch_repository("tester/never-seen")


def test_an_unfinished_folder_is_not_pushed(hub, repository):
    (repository / "metrics.json").unlink()
    with pytest.raises(FileNotFoundError, match="training has not finished"):
        Repository(repository).push_to_hub(NAME)
    assert not hub.log


def test_an_impossible_name_is_refused(hub, repository):
    with pytest.raises(ValueError, match="is no name for a Hub repository"):
        Repository(repository).push_to_hub("a name/with blanks")


@pytest.mark.parametrize(
    ("part", "kind"),
    [("mq_item", MQTokenizerModel), ("collaborative", LightGCNModel)],
)
def test_parts_load_from_their_subfolders(hub, repository, part, kind):
    Repository(repository).push_to_hub(NAME, include_users=True)
    loaded, local = kind.from_pretrained(NAME, subfolder=part), kind.from_pretrained(repository / part)
    assert all((loaded.state_dict()[name] == value).all() for name, value in local.state_dict().items())


def test_each_class_pushes_itself(hub, repository):
    tokenizer = TokenRecTokenizer.from_pretrained(repository)
    tokenizer.push_to_hub(NAME)
    Recommender.from_pretrained(repository).model.push_to_hub(NAME)
    EmbeddingStore.open(repository).push_to_hub(NAME)
    MQTokenizerModel.from_pretrained(repository / "mq_item").push_to_hub("tester/mq")
    assert {"config.json", "model.safetensors", "codes.safetensors", "store/store.json"} <= set(hub.files(NAME))
    assert TokenRecTokenizer.from_pretrained(NAME).codes("item").tolist() == tokenizer.codes("item").tolist()
    assert MQTokenizerModel.from_pretrained("tester/mq").space_id == tokenizer.space_ids["item"]


def test_commands_push_and_read_a_shared_repository(hub, repository, capsys, expected):
    assert main(["push", str(repository), NAME, "--include-users", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["repository"] == NAME
    assert document["commit"].endswith(hub.repositories["model", NAME].branches["main"])
    user = next(iter(expected))
    assert main(["recommend", NAME, "--user", user, "--top-k", "5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["recommendations"]
    assert [row["item"] for row in found] == [row["item"] for row in expected[user]]
    assert main(["info", NAME]) == 0
    assert "1000 users, 300 items" in capsys.readouterr().out
    assert main(["evaluate", NAME]) == 1
    assert capsys.readouterr().err.startswith("tokenrec: error: ")


def test_the_command_says_that_users_are_left_out(hub, repository, capsys):
    assert main(["push", str(repository), NAME]) == 0
    assert "Users are left out" in capsys.readouterr().out
    assert main(["info", NAME]) == 0
    assert "no users, 300 items" in capsys.readouterr().out


def test_a_space_shows_the_page_of_the_pushed_repository(hub, repository, capsys, monkeypatch):
    assert main(["push", str(repository), NAME, "--revision", "next", "--space", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["space"] == f"{hub.url}/spaces/{NAME}"
    files = {path: content.decode() for path, content in hub.files(NAME, kind="space").items()}
    assert hub.repositories["space", NAME].messages[1:] == ["Upload the page of a TokenRec recommender"]
    assert files["requirements.txt"] == f"tokenrec-hf[demo]=={tokenrec_hf.__version__}\n"
    metadata = RepoCard(files["README.md"], ignore_metadata_errors=False).data.to_dict()
    assert metadata == {"title": "demo", "sdk": "gradio", "app_file": "app.py", "models": [NAME], "tags": ["tokenrec"]}
    ran = []
    monkeypatch.setattr("tokenrec_hf.cli.app.main", ran.append)
    exec(files["app.py"], {})
    name, *arguments = ran[0]
    demo = typer.main.get_command(app.app).commands[name].make_context(name, arguments)
    assert (demo.params["repository"], demo.params["revision"], demo.params["host"]) == (NAME, "next", "0.0.0.0")


def test_without_being_asked_a_push_makes_no_space(hub, repository, capsys):
    assert main(["push", str(repository), NAME]) == 0
    assert [kind for kind, _ in hub.repositories] == ["model"]
