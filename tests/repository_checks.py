"""What the tests of changes to a trained repository look at."""

from datasets import Dataset

from tokenrec_hf import EmbeddingStore, T5ForGenerativeRetrieval, TokenRecTokenizer
from tokenrec_hf.models.codes import LOCK
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel


def contents(folder):
    """The content of all files, locks apart."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != LOCK)
    return {path.relative_to(folder): path.read_bytes() for path in files}


def interactions(*pairs):
    return Dataset.from_dict({"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]})


def check_codes(folder):
    """The code table has the ids of the store, the codes are those of its vectors, and T5's part is that of the codes."""
    model = T5ForGenerativeRetrieval.from_pretrained(folder)
    store, tokenizer = EmbeddingStore.open(folder), TokenRecTokenizer.from_pretrained(folder)
    dim = model.config.embedding_dim
    learned = model.item_vectors(store.vectors("item"), tokenizer.item_tokens(store.ids("item")))
    assert store.vectors("item").allclose(learned, atol=1e-5) and not store.vectors("user")[:, dim:].any()
    for kind in ("user", "item"):
        assert sorted(tokenizer.ids(kind)) == sorted(store.ids(kind))
        codes = MQTokenizerModel.from_pretrained(folder / f"mq_{kind}").encode(store.vectors(kind)[:, :dim])
        assert tokenizer.codes(kind, store.ids(kind)).tolist() == codes.tolist()
