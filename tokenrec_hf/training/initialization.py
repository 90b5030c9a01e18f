"""Starting points of training (section II-E1 of TokenRec, arXiv 2406.10450): FISM, codebooks, the tokenizer of a store, and T5.

FISM starts from singular vectors, codebooks start from k-means. A T5 starts from a checkpoint or from scratch, and the
embeddings of its code tokens start from the codewords. The functions are only needed to train, so they do not travel with a
trained repository.
"""

from __future__ import annotations

import copy
import os
import string
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse import csr_matrix
from scipy.sparse.linalg import svds
from tokenizers import AddedToken
from transformers import T5Config, T5Tokenizer, TokenizersBackend, set_seed

from ..data.interaction_matrix import InteractionMatrix
from ..models.codes import MQ_FOLDERS
from ..models.configuration_tokenrec import T5GenerativeRetrievalConfig
from ..models.embedding_store import EmbeddingStore, Store
from ..models.modeling_collaborative import FISMModel
from ..models.modeling_mq_tokenizer import MQTokenizerModel, first_least, nearest
from ..models.modeling_t5_retrieval import T5ForGenerativeRetrieval
from ..models.tokenization_tokenrec import LETTERS, TokenRecTokenizer, code_table, token_names
from .recipe import AUTO, RetrievalSettings, Setting

T5_MAX_LENGTH = 512
# The start of FISM, see `start_from_singular_vectors`; random rows are about 1.1 long.
SINGULAR_LENGTH = 2.4
RANDOM_SHARE, SINGULAR_SHARE = 0.25, 0.14
# Points assigned at once: few enough that their distances stay in the cache.
KMEANS_CHUNK = 512
# Share of the residual codebooks that is also fitted to the further vectors of `prepare_mq_tokenizer`.
SHARED_BOOKS = 0.75


@torch.no_grad()
def start_from_singular_vectors(model: FISMModel, interactions: InteractionMatrix) -> None:
    """Moves the fresh rows of items that the same users have towards each other.

    With R_ui = 1 / sqrt(d_u d_i) for the interactions of users and items with d_u and d_i of them, and U S V^T the largest
    singular values and vectors of R, item i has the vector v_i = (V S)_i / |(V S)_i|. So training begins near the item
    vectors of PureSVD (Cremonesi et al., 2010), and takes fewer steps. With ordered histories, q_i gets `SINGULAR_LENGTH` v_i
    added and the other rows of item i half of it. Without order, all rows of item i become `RANDOM_SHARE` q_i +
    `SINGULAR_SHARE` v_i: short rows, which a step turns further.

    Args:
        model: changed in place.
        interactions: the training interactions.
    """
    users, items = interactions.users, interactions.items
    shape = interactions.num_users, interactions.num_items
    degrees = np.bincount(users, minlength=shape[0])[users] * np.bincount(items, minlength=shape[1])[items]
    size = min(*shape, model.config.embedding_dim + 1) - 1  # ARPACK finds all but one
    if size == 0:
        return
    _, values, vectors = svds(csr_matrix((1 / np.sqrt(degrees), (users, items)), shape), k=size, rng=0)
    scaled = torch.from_numpy((vectors * values[:, None]).T.copy()).float()
    rows = F.pad(F.normalize(scaled, dim=-1), (0, model.config.embedding_dim - size))  # [num_items, d]
    short = RANDOM_SHARE * model.item_table.weight + SINGULAR_SHARE * rows
    for _, table in model.tables():
        if model.ordered_histories:
            table.weight.add_(rows, alpha=SINGULAR_LENGTH / (1 if table is model.item_table else 2))
        else:
            table.weight.copy_(short)


@torch.no_grad()
def prepare_mq_tokenizer(
    model: MQTokenizerModel, vectors: torch.Tensor, seed: int = 0, others: torch.Tensor | None = None
) -> None:
    """Fits the input standardisation to the vectors and starts the codebooks by k-means of the encoder outputs.

    Args:
        model: changed in place.
        vectors: the vectors to give codes to, `[n, d]`.
        seed: seed of the k-means.
        others: further vectors of the same space that may get codes later, `[m, d]`. With `residual`, the last quarter of the
            codebooks is fitted to the residuals of `vectors` alone.

    Raises:
        ValueError: there are no vectors, or they have a wrong shape or a value that is not finite.
    """
    vectors = model.checked(vectors)
    if not len(vectors):
        raise ValueError("there are no vectors to train the MQ-Tokenizer on.")
    count, known = model.config.num_codebooks, len(vectors)
    if others is not None:
        vectors = torch.cat([vectors, model.checked(others)])
    model.mean.copy_(vectors.mean(dim=0))
    # One scale for all dimensions, so that distances keep their proportions; a constant input keeps scale 1.
    spread = (vectors - model.mean).square().mean().sqrt()
    model.scale.copy_(spread if spread > 0 else torch.ones(()))
    if model.config.kmeans_init:
        x = model.standardise(vectors)
        for k, codebook in enumerate(model.codebooks):
            if model.config.residual and k >= SHARED_BOOKS * count:
                x = x[:known]
            outputs = x if model.config.residual else model.encoders[k](x)  # [n, d_c]
            codebook.copy_(kmeans(outputs, model.config.codebook_size, seed=seed + k))
            if model.config.residual:
                x = x - codebook[nearest(x[None], codebook[None])[0]]


def kmeans(points: torch.Tensor, num_clusters: int, num_iterations: int = 20, seed: int = 0) -> torch.Tensor:
    """Lloyd's k-means that handles empty clusters.

    Args:
        points: `[n, d]`.
        num_clusters: number of centres; may exceed n.
        num_iterations: passes over the points.
        seed: seed of the initial centres and of the replacements of empty clusters.

    Returns:
        Centres `[num_clusters, d]`. An empty cluster restarts at a random point; with fewer points than clusters, the
        surplus centres are points with a little noise.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(points), generator=generator)
    picks = order.repeat(-(-num_clusters // len(points)))[:num_clusters].to(points.device)
    centres = points[picks].clone()
    if num_clusters > len(points):
        noise = torch.randn(centres.shape, generator=generator).to(centres) * (1e-3 * points.std(correction=0) + 1e-6)
        centres[len(points) :] += noise[len(points) :]
    parts = points.split(KMEANS_CHUNK)
    # Allocated once: fresh memory for every part would cost a quarter of the product in it.
    memory = points.new_empty(min(KMEANS_CHUNK, len(points)), num_clusters)
    for _ in range(num_iterations):
        squares = centres.square().sum(-1)
        distances = (torch.addmm(squares, part, centres.T, alpha=-2, out=memory[: len(part)]) for part in parts)
        assigned = torch.cat([first_least(one) for one in distances])
        counts = torch.bincount(assigned, minlength=num_clusters)
        sums = torch.zeros_like(centres).index_add_(0, assigned, points)
        centres = torch.where((counts > 0)[:, None], sums / counts.clamp(min=1)[:, None], centres)
        empty = (counts == 0).nonzero().flatten()
        if len(empty) and num_clusters <= len(points):
            centres[empty] = points[torch.randint(len(points), (len(empty),), generator=generator).to(points.device)]
    return centres


def build_tokenizer(
    t5_tokenizer: TokenizersBackend | str | os.PathLike | None = None,
    *,
    user_mq: MQTokenizerModel,
    item_mq: MQTokenizerModel,
    store: Store,
    **kwargs: Any,
) -> TokenRecTokenizer:
    """Makes a tokenizer from T5's vocabulary, 2*K*L code tokens, and the codes of all users and items in the store.

    Args:
        t5_tokenizer: source of the vocabulary, see [`load_t5_tokenizer`]; a tokenizer is not changed.
        user_mq: the users' [`MQTokenizerModel`].
        item_mq: the items' [`MQTokenizerModel`].
        store: the store of ids and vectors to encode.
        kwargs: `on_unknown`, `model_max_length` (default: that of the T5 tokenizer, or 512) and other tokenizer settings.

    Raises:
        ValueError: the store holds vectors of another MQ-Tokenizer, of the wrong size or not finite, or the T5 tokenizer
            already has code tokens.
    """
    base = load_t5_tokenizer(t5_tokenizer)
    tables, codebooks, space_ids = {}, {}, {}
    for kind, mq in (("user", user_mq), ("item", item_mq)):
        space_ids[kind] = mq.space_id
        store.check_space(kind, space_ids[kind], "the tokenizer")
        codebooks[kind] = [mq.config.num_codebooks, mq.config.codebook_size]
        tables[kind] = code_table(kind, store.ids(kind), store.vectors(kind), mq)
        _warn_of_punctuation(kind, store.ids(kind))

    backend = copy.deepcopy(base.backend_tokenizer)
    backend.no_padding()
    backend.no_truncation()
    names = [name for kind in LETTERS for name in token_names(kind, *codebooks[kind]).ravel()]
    present = next((name for name in names if backend.token_to_id(name) is not None), None)
    if present is not None:
        raise ValueError(f"the T5 tokenizer already has the code token {present}; pass a plain T5 tokenizer.")
    backend.add_tokens([AddedToken(name, special=False, normalized=False) for name in names])

    settings = {name: getattr(base, name) for name in ("pad_token", "eos_token", "unk_token", "extra_special_tokens")}
    unlimited = base.model_max_length > 1_000_000
    settings["model_max_length"] = T5_MAX_LENGTH if unlimited else base.model_max_length
    tokenizer = TokenRecTokenizer(
        tokenizer_object=backend, tables=tables, codebooks=codebooks, space_ids=space_ids, **{**settings, **kwargs}
    )
    tokenizer.attach(user_mq=user_mq, item_mq=item_mq)
    return tokenizer


def _warn_of_punctuation(kind: str, ids: Sequence[str]) -> None:
    """Warns once if an id is another one with punctuation at its end, because texts that name the other may be read as this one."""
    known = set(ids)
    for name in ids:
        shorter = name.rstrip(string.punctuation)
        if shorter != name and shorter in known:
            warnings.warn(
                f"{kind} {name!r} is {kind} {shorter!r} with punctuation, so a sentence that ends with {kind}_{name} names {name!r}; "
                "rename one of them if prompts are written as text.",
                stacklevel=3,
            )
            return


def build_retrieval_model(
    settings: RetrievalSettings,
    tokenizer: TokenRecTokenizer,
    user_mq: MQTokenizerModel,
    item_mq: MQTokenizerModel,
    seed: int = 0,
) -> T5ForGenerativeRetrieval:
    """T5 with the tokenizer's vocabulary, from a checkpoint or from scratch, with code tokens initialised from the codewords.

    Args:
        settings: the recipe's section: `backbone` and `config`.
        tokenizer: gives the vocabulary.
        user_mq, item_mq: give the codewords.
        seed: of the fresh weights.

    Raises:
        ValueError: the backbone is neither a folder nor available on the Hub.
    """
    set_seed(seed)
    config: dict[str, Setting] = {
        **{name: value for name, value in settings.config.items() if value != AUTO},
        "embedding_dim": item_mq.config.embedding_dim,
        "space_ids": tokenizer.space_ids,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    user_tokens, item_tokens = (tokenizer.code_token_ids(kind) for kind in MQ_FOLDERS)
    if config.get("pooling") == "history":
        config["entity_tokens"] = entity_tokens(tokenizer)
    if settings.backbone is None:
        model = T5ForGenerativeRetrieval(T5GenerativeRetrievalConfig(vocab_size=len(tokenizer), **config))
    else:
        try:
            model = load_backbone(settings.backbone, **config)
        except OSError as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the backbone {settings.backbone!r} is no folder here and could not be fetched from the Hub ({reason}); "
                "connect, give the folder of a T5 checkpoint as retrieval.backbone, or train from scratch with --recipe best."
            ) from None
        if len(tokenizer) > model.config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    first = int(min(user_tokens.min(), item_tokens.min()))
    for number, (tokens, mq) in enumerate(((user_tokens, user_mq), (item_tokens, item_mq))):
        ids = torch.from_numpy(tokens)
        initialize_code_tokens(model, ids, mq.codebooks, first, seed + number, residual=mq.config.residual)
    if model.config.pooling == "history":
        model.user_codewords.copy_(user_mq.summands().flatten(0, 1))
    return model


def retrieval_store(store: Store, model: T5ForGenerativeRetrieval, tokenizer: TokenRecTokenizer) -> EmbeddingStore:
    """The store that queries of a model are compared with, made from the store of the collaborative vectors."""
    found, items = EmbeddingStore(model.config.query_dim, store.space_ids), store.ids("item")
    found.upsert("user", store.ids("user"), model.user_vectors(store.vectors("user")))
    found.upsert("item", items, model.item_vectors(store.vectors("item"), tokenizer.item_tokens(items)))
    return found


def entity_tokens(tokenizer: TokenRecTokenizer) -> dict[str, dict[str, int]]:
    """How a tokenizer writes ids, for the field `entity_tokens` of [`T5GenerativeRetrievalConfig`]."""
    found = {}
    for kind in MQ_FOLDERS:
        tokens = tokenizer.code_token_ids(kind)
        found[kind] = {
            "first": int(tokens.min()),
            "num_codebooks": tokens.shape[0],
            "codebook_size": tokens.shape[1],
            "prefix": tokenizer.entity_token_ids(kind, []).shape[1] - len(tokens),
        }
    return found


def load_backbone(backbone: str, **settings: Any) -> T5ForGenerativeRetrieval:
    """A model with the weights of a T5 checkpoint and a fresh projection.

    Args:
        backbone: folder or Hub name of a T5, T5 v1.1, flan-T5 or mT5 checkpoint.
        settings: fields of [`T5GenerativeRetrievalConfig`] that replace the backbone's; its sizes cannot be changed.

    Raises:
        OSError: the checkpoint cannot be found.
    """
    fields, _ = T5Config.get_config_dict(backbone)
    # mT5 is a T5 under another name.
    base = T5Config.from_dict({**fields, "model_type": T5Config.model_type}).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "dtype"):
        base.pop(name, None)
    sizes = ("d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    kept = {name: value for name, value in settings.items() if name not in sizes}
    return T5ForGenerativeRetrieval.from_pretrained(backbone, config=T5GenerativeRetrievalConfig(**{**base, **kept}))


@torch.no_grad()
def initialize_code_tokens(
    model: T5ForGenerativeRetrieval,
    token_ids: torch.Tensor,
    codebooks: torch.Tensor,
    num_words: int,
    seed: int = 0,
    residual: bool = False,
) -> None:
    """Gives code tokens embeddings with about the angles of their codewords.

    Codewords are centred, projected from `d_c` to `d_model` by a random Gaussian matrix, which preserves angles, and scaled to
    the standard deviation of the word embeddings that a pretrained backbone was trained with.

    Args:
        model: changed in place.
        token_ids: vocabulary ids of the code tokens, LongTensor `[K, L]`.
        codebooks: c, `[K, L, d_c]`.
        num_words: number of rows of the vocabulary before the first code token.
        seed: seed of the projection matrices, one per codebook.
        residual: the codebooks add up to a vector, so all share one matrix and one scale and the embeddings add up too.
    """
    table = cast(torch.Tensor, model.get_input_embeddings().weight)
    target = table[:num_words].float().std().cpu()
    generator = torch.Generator().manual_seed(seed)
    if residual:  # one book of all codewords
        token_ids, codebooks = token_ids.reshape(1, -1), codebooks.flatten(0, 1)[None]
    for ids, words in zip(token_ids, codebooks.detach().float().cpu()):
        projection = torch.randn(words.shape[1], table.shape[1], generator=generator)
        rows = (words - words.mean(dim=0)) @ projection  # [L, d_model]
        spread = rows.std()
        if not spread > 0:  # one codeword, or equal ones: there are no angles to preserve
            rows, spread = torch.randn(rows.shape, generator=generator), torch.tensor(1.0)
        table[ids.to(table.device)] = (rows * (target / spread)).to(table)


def load_t5_tokenizer(source: TokenizersBackend | str | os.PathLike | None = None) -> TokenizersBackend:
    """A T5 tokenizer.

    Args:
        source: a tokenizer, which is returned unchanged; the path of a `spiece.model`, or of a folder with a `spiece.model` or a
            `tokenizer.json`; a name on the Hub; or `None` for the small English one of the package (for a T5 that is trained
            from scratch).

    Raises:
        ValueError: there is no vocabulary at that place.
    """
    if source is None:
        return bundled_t5_tokenizer()
    if not isinstance(source, (str, os.PathLike)):
        return source
    path = Path(source)
    if path.is_dir() and not (path / "tokenizer.json").exists():
        path = path / "spiece.model"
    if path.is_file():
        return read_sentencepiece(path)
    tokenizer = T5Tokenizer.from_pretrained(source)
    # Where transformers finds no vocabulary, it silently returns a tokenizer of the special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise ValueError(
            f"there is no T5 vocabulary in {str(source)!r}: it is no folder with a spiece.model or tokenizer.json and could not be "
            "fetched from the Hub; check the name, or leave it out to take the bundled one."
        )
    return tokenizer


def bundled_t5_tokenizer() -> TokenizersBackend:
    """The small English T5 tokenizer of the package (800 tokens)."""
    return read_sentencepiece(Path(__file__).parents[1] / "assets" / "spiece.model")


def read_sentencepiece(path: str | os.PathLike) -> TokenizersBackend:
    """The T5 tokenizer of a `spiece.model` file, equal to `T5Tokenizer.from_pretrained` of its folder.

    Unlike `from_pretrained` of a file, it needs neither the network nor the `sentencepiece` package.

    Raises:
        ValueError: the file is not a SentencePiece model.
    """
    from transformers.convert_slow_tokenizer import import_protobuf

    # transformers does not count an import in a `try` among the requirements of a shared tokenizer.
    try:
        from google.protobuf.message import DecodeError
    except ImportError:
        raise ImportError(f"reading {path} needs protobuf; run `pip install protobuf`.") from None
    model = import_protobuf().ModelProto()
    try:
        model.ParseFromString(Path(path).read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path} is not a SentencePiece model; pass the spiece.model of a T5.") from error
    vocab = [(piece.piece, piece.score) for piece in model.pieces]
    vocab += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return T5Tokenizer(vocab=vocab, _spm_precompiled_charsmap=model.normalizer_spec.precompiled_charsmap or None)
