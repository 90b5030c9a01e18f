"""T5's vocabulary, from where it is: the small one of the package, a `spiece.model`, a folder, or the Hub.

Knows nothing about users, items or codes.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def load_t5_tokenizer(source: Any = None) -> Any:
    """A T5 tokenizer.

    Args:
        source: a tokenizer (returned as it is); the path of a `spiece.model`, or of a folder with one or with a
            `tokenizer.json`; a name on the Hub; or `None` for the bundled one.

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
    from transformers import T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(source)
    # Where it finds no vocabulary, transformers returns a tokenizer of the special tokens alone, without a word.
    if len(tokenizer) <= len(tokenizer.all_special_tokens) + 1:
        raise ValueError(
            f"there is no T5 vocabulary in {str(source)!r}: it is no folder with a spiece.model or tokenizer.json and could not be "
            "fetched from the Hub; check the name, or leave it out to take the bundled one."
        )
    return tokenizer


def bundled_t5_tokenizer() -> Any:
    """The small English T5 tokenizer that comes with the package (800 tokens), for a T5 that is trained from scratch."""
    return read_sentencepiece(Path(__file__).parents[1] / "assets" / "spiece.model")


def read_sentencepiece(path: str | os.PathLike) -> Any:
    """The T5 tokenizer of a `spiece.model` file, the same as `T5Tokenizer.from_pretrained` of its folder.

    Needs neither the network nor the `sentencepiece` package, unlike `from_pretrained` of a file.

    Raises:
        ValueError: the file is not a SentencePiece model.
    """
    from transformers import T5Tokenizer
    from transformers.convert_slow_tokenizer import import_protobuf

    # In a `try`, where transformers does not count it among what everybody needs who loads a shared tokenizer.
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
