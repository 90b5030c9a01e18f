"""The address of an embedding store, to the store: embedded, or on Milvus."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..models.embedding_store import Store


def open_store(uri: str | os.PathLike, token: str | None = None) -> Store:
    """Opens an embedding store of any engine, by its address.

    Args:
        uri: the folder of a store or of a trained repository; the path of a Milvus Lite database, which ends in `.db`; or the
            address of a Milvus server or cluster, `http://host:19530` or `https://...`.
        token: `user:password` or API key of the Milvus server.

    Raises:
        FileNotFoundError: there is no store at `uri`.
        ImportError: `uri` is on Milvus, but `pymilvus` is not installed.
        OSError: the server does not answer, or refuses.
        ValueError: the store is damaged or of another format version.
    """
    # Imported here, because the command line imports this package before it needs torch.
    if str(uri).startswith(("http://", "https://")) or str(uri).endswith(".db"):
        from .milvus import MilvusStore

        return MilvusStore(uri, token)
    from ..models.embedding_store import EmbeddingStore

    return EmbeddingStore.open(uri)
