"""Trains the small SentencePiece model that is bundled with the package (`tokenrec_hf/assets/spiece.model`).

The bundled model lets everything run offline and fast, with a T5 that is trained from scratch. A pretrained T5 needs its own
`spiece.model`. The corpus is made here: our prompts, English about likes and dislikes, and every character to be covered.

    pip install sentencepiece
    python examples/train_sentencepiece.py --output spiece.model
"""

import argparse
import io
import os
import random
import string

import sentencepiece

from tokenrec_hf.models.prompts import SEEN_TEMPLATES, UNSEEN_TEMPLATE, render


def _words(text: str) -> list[str]:
    return text.split()


SUBJECTS = ["I", "you", "we", "they", "people", "everyone", "nobody", "someone", "the user", "this user", "this person"]
SUBJECTS += ["my sister", "your brother", "our friends", "her mother", "his father", "a reader", "the listener"]
SUBJECTS += ["a viewer", "the customer", "the child", "most of them", "another user", "he", "she", "it"]
VERBS = _words(
    "like love enjoy want need watch read play hear buy choose pick try rate review recommend suggest prefer hate"
)
VERBS += _words(
    "avoid miss finish start share keep remember forget expect describe compare find follow collect describe"
)
VERBS += _words("interact wonder decide think know help guess ask give take make see look say tell show use visit own")
PAST = _words(
    "liked loved enjoyed wanted watched read played heard bought chose picked tried rated reviewed recommended"
)
PAST += _words("suggested preferred hated avoided finished started shared kept remembered collected interacted decided")
PAST += _words(
    "viewed listened clicked ordered visited purchased selected spent asked found followed owned given taken"
)
ADJECTIVES = _words(
    "good bad new old great funny sad slow fast loud quiet short long dark light similar different popular"
)
ADJECTIVES += _words(
    "rare cheap expensive modern classic strange warm cold happy serious romantic scary simple strong soft"
)
ADJECTIVES += _words(
    "interesting boring beautiful useful favourite favorite recent next last first best other same many"
)
NOUNS = _words(
    "item items user users song songs album albums artist artists band movie movies film films book books game"
)
NOUNS += _words(
    "games show story music dress shoes shirt jacket cream perfume lipstick product products brand author actor"
)
NOUNS += _words(
    "director genre style taste preference preferences interest interests history list choice choices suggestion"
)
NOUNS += _words(
    "recommendation recommendations rating review catalogue shop store thing things something one ones match"
)
NOUNS += _words("person mood evening weekend summer holiday price colour color size gift question answer description")
LINKS = ["and", "but", "because", "so", "when", "while", "although", "if", "since", "before", "after", "then", "or"]
TIMES = ["today", "yesterday", "last week", "this year", "every day", "in the past", "recently", "lately", "so far"]
TIMES += ["already", "now", "soon", "again", "never", "always", "often", "sometimes", "at home", "with friends"]
QUESTIONS = ["Can you help", "Could you tell me", "What would", "What should", "Which one will", "Do you know what"]
QUESTIONS += ["How much did", "Where can", "Why does", "Who will", "When did", "What else might", "According to what"]
PREPOSITIONS = [
    "of",
    "with",
    "for",
    "by",
    "from",
    "about",
    "on",
    "in",
    "to",
    "like",
    "between",
    "without",
    "over",
    "under",
]


def sentences(count: int, seed: int = 0) -> list[str]:
    """The corpus: `count` made-up sentences, the prompts, and lines that cover the characters."""
    rng = random.Random(seed)
    pick = rng.choice

    def phrase() -> str:
        article = pick(["the", "a", "this", "that", "some", "any", "my", "your", "their", "his", "her", "our"])
        noun = f"{article} {pick(['', pick(ADJECTIVES) + ' '])}{pick(NOUNS)}"
        return noun if rng.random() < 0.6 else f"{noun} {pick(PREPOSITIONS)} {pick(NOUNS)}"

    def clause() -> str:
        auxiliary = pick(["will", "would", "can", "could", "might", "may", "should", "did not", "does not", "has to"])
        verb = pick([pick(PAST), f"{auxiliary} {pick(VERBS)}", f"has {pick(PAST)}", f"have {pick(PAST)}"])
        return f"{pick(SUBJECTS)} {verb} {phrase()} {pick(['', pick(TIMES)])}".strip()

    corpus = []
    for _ in range(count):
        shape = rng.random()
        if shape < 0.4:
            text = f"{clause()}."
        elif shape < 0.7:
            text = f"{clause()}, {pick(LINKS)} {clause()}{pick('.!;:')}"
        else:
            text = f"{pick(QUESTIONS)} {pick(SUBJECTS)} {pick(VERBS)} {phrase()}?"
        corpus.append(text[0].upper() + text[1:])

    # Code tokens follow "user_" and "item_" without white space, so the text that is left of an entity ends in "_".
    for template in [*SEEN_TEMPLATES, UNSEEN_TEMPLATE]:
        corpus += [render(template, "", [""] * 3)] * (count // 50)
    # The trainer takes as a piece only what it meets in two different surroundings, which makes a word of each word here.
    words = sorted({word.strip(string.punctuation) for text in corpus for word in text.split()})
    corpus += [f"{word}, {word}." for word in words]
    latin = [chr(code) for code in range(0xA1, 0x100) if code != 0xAD] + list("–—‘’“”•…€œŒ")
    for character in [*string.printable[:94], *latin]:
        corpus += [character, f"a{character}b", f"{character} {character}"]
    return corpus


def train(output: str, vocab_size: int) -> None:
    """Trains on `sentences()` and writes the model to `output`, whole or not at all."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences(20_000)),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        character_coverage=1.0,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=1,
    )
    with open(f"{output}.tmp", "wb") as file:
        file.write(model.getvalue())
    os.replace(f"{output}.tmp", output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="spiece.model", help="file to write")
    parser.add_argument("--vocab_size", type=int, default=700, help="number of pieces, special ones included")
    arguments = parser.parse_args()
    train(arguments.output, arguments.vocab_size)
    print(f"{arguments.output}: {os.path.getsize(arguments.output):,} bytes")
