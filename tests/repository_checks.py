"""What the tests of changes to a trained repository look at."""

from datasets import Dataset

from tokenrec_hf import EmbeddingStore, TokenRecTokenizer
from tokenrec_hf.models.modeling_mq_tokenizer import MQTokenizerModel


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def interactions(*pairs):
    return Dataset.from_dict({"user_id": [user for user, _ in pairs], "item_id": [item for _, item in pairs]})


def check_codes(folder):
    """The code table has the ids of the store, and the codes are those of its vectors."""
    store, tokenizer = EmbeddingStore.open(folder), TokenRecTokenizer.from_pretrained(folder)
    for kind in ("user", "item"):
        assert sorted(tokenizer.ids(kind)) == sorted(store.ids(kind))
        codes = MQTokenizerModel.from_pretrained(folder / f"mq_{kind}").encode(store.vectors(kind))
        assert tokenizer.codes(kind, store.ids(kind)).tolist() == codes.tolist()
