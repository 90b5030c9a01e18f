import os
import shutil
import string
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import T5Tokenizer

import tokenrec_hf
from tokenrec_hf.data.interaction_matrix import InteractionMatrix
from tokenrec_hf.models.configuration_tokenrec import FISMConfig
from tokenrec_hf.models.modeling_collaborative import FISMModel
from tokenrec_hf.models.prompts import SEEN_TEMPLATES, UNSEEN_TEMPLATE, render
from tokenrec_hf.training.initialization import (
    RANDOM_SHARE,
    SINGULAR_LENGTH,
    SINGULAR_SHARE,
    bundled_t5_tokenizer,
    load_t5_tokenizer,
    read_sentencepiece,
    start_from_singular_vectors,
)

MODELS = Path(os.environ.get("TOKENREC_MODELS_DIR") or Path(__file__).parents[3] / "shared" / "models")
REAL = MODELS / "t5_tokenizer" / "spiece.model"
needs_t5 = pytest.mark.skipif(not REAL.exists(), reason=f"no T5 vocabulary at {REAL}; set TOKENREC_MODELS_DIR")
SENTENCE = "Studies have shown that owning a dog is good for you"


@pytest.fixture
def vocabulary_folder(tmp_path):
    shutil.copy(Path(tokenrec_hf.__file__).parent / "assets" / "spiece.model", tmp_path / "spiece.model")
    return tmp_path


def started(interactions, dim, half_life):
    """The tables of a FISM before and after its start from singular vectors."""
    torch.manual_seed(0)
    config = FISMConfig(embedding_dim=dim, half_life=half_life, recent_half_life=0.5)
    model = FISMModel.from_interactions(config, interactions)
    before = [table.weight.detach().clone() for _, table in model.tables()]
    start_from_singular_vectors(model, interactions)
    return before, [table.weight.detach() for _, table in model.tables()]


@pytest.mark.parametrize("half_life", [None, 8])
@pytest.mark.parametrize("dim", [4, 9])
def test_fism_starts_from_the_singular_vectors_of_the_normalised_interactions(dim, half_life):
    """Against the exact decomposition; 9 dimensions are more than 6 users have. The last item has no interactions."""
    pairs = [(u, i) for u in range(6) for i in range(7) if (u * i + u + i) % 3 or u == i]
    users, items = (np.array(side) for side in zip(*pairs))
    before, after = started(InteractionMatrix(users, items, 6, 8), dim, half_life)

    dense = np.zeros((6, 8))
    dense[users, items] = 1
    scaled = dense / np.sqrt(dense.sum(1, keepdims=True) * np.maximum(dense.sum(0), 1))
    _, values, vectors = np.linalg.svd(scaled, full_matrices=False)
    dim = min(dim, 5)  # all singular vectors but the last
    expected = vectors[:dim].T * values[:dim]
    lengths = np.linalg.norm(expected, axis=1, keepdims=True)
    expected = SINGULAR_LENGTH * expected / np.where(lengths > 0, lengths, 1)

    # The signs of singular vectors are arbitrary: their products are compared.
    scales, kept = (
        ([0.5, 1, 0.5], [1, 1, 1]) if half_life else ([SINGULAR_SHARE / SINGULAR_LENGTH] * 2, [RANDOM_SHARE] * 2)
    )
    for table, (scale, share) in enumerate(zip(scales, kept, strict=True)):
        random = before[table if half_life else 1]
        added = (after[table] - share * random).numpy() / scale
        assert added @ added.T == pytest.approx(expected @ expected.T, rel=1e-3, abs=1e-3)


def test_a_vocabulary_file_gives_what_transformers_makes_of_its_folder(vocabulary_folder):
    ours, theirs = (
        read_sentencepiece(vocabulary_folder / "spiece.model"),
        T5Tokenizer.from_pretrained(vocabulary_folder),
    )
    assert ours.backend_tokenizer.to_str() == theirs.backend_tokenizer.to_str()


@pytest.mark.data
@needs_t5
def test_the_vocabulary_of_t5_gives_its_published_ids():
    tokenizer = load_t5_tokenizer(REAL)
    assert len(tokenizer) == 32_100
    assert tokenizer(SENTENCE).input_ids == [6536, 43, 2008, 24, 293, 53, 3, 9, 1782, 19, 207, 21, 25, 1]
    assert tokenizer.convert_tokens_to_ids("<extra_id_0>") == 32_099


def test_a_tokenizer_is_found_by_file_by_folder_and_by_object(vocabulary_folder):
    expected = bundled_t5_tokenizer()(SENTENCE).input_ids
    tokenizer = load_t5_tokenizer(str(vocabulary_folder / "spiece.model"))
    assert tokenizer(SENTENCE).input_ids == expected
    assert load_t5_tokenizer(tokenizer) is tokenizer
    assert load_t5_tokenizer(vocabulary_folder)(SENTENCE).input_ids == expected
    tokenizer.save_pretrained(vocabulary_folder / "saved")
    assert load_t5_tokenizer(vocabulary_folder / "saved")(SENTENCE).input_ids == expected


def test_a_file_that_is_no_vocabulary_is_refused(tmp_path):
    (tmp_path / "spiece.model").write_bytes(b"\xff" * 100)
    with pytest.raises(ValueError, match="spiece.model is not a SentencePiece model"):
        read_sentencepiece(tmp_path / "spiece.model")


def test_the_bundled_vocabulary_has_the_special_tokens_of_t5():
    tokenizer = bundled_t5_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert len(tokenizer) == 800


def test_the_bundled_vocabulary_covers_english_text():
    tokenizer = bundled_t5_tokenizer()
    text = f"{SENTENCE} – “naïve” café, £5… {string.printable}"
    assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_the_bundled_vocabulary_has_whole_words_for_every_prompt():
    tokenizer = bundled_t5_tokenizer()
    assert tokenizer.tokenize("user_ item_") == ["▁user", "_", "▁item", "_"]
    for template in [*SEEN_TEMPLATES, UNSEEN_TEMPLATE]:
        prompt = render(template, "", [""])
        # A token a word, and one for each "_", "," and other mark.
        marks = sum(character in "_,.?" for character in prompt)
        assert len(tokenizer.tokenize(prompt)) == len(prompt.split()) + marks


def test_the_sentencepiece_package_is_not_needed():
    code = (
        "import sys; sys.modules['sentencepiece'] = None\n"
        "from tokenrec_hf.training.initialization import bundled_t5_tokenizer\n"
        "assert len(bundled_t5_tokenizer()) == 800"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_place_without_a_vocabulary_is_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for source in ("no-such/tokenizer", str(tmp_path)):
        with pytest.raises((ValueError, OSError), match="tokenizer|vocabulary"):
            load_t5_tokenizer(source)
