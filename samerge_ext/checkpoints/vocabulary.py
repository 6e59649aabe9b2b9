"""Vocabularies of model folders: which number a token has, read from tokenizer files as JSON or text, and where two differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from filecmp import cmp
from fnmatch import fnmatchcase
from pathlib import Path

from samerge_ext.checkpoints.reading import MAX_JSON_BYTES, CheckpointError, cut, read_bytes, read_json, shown

FAST, WORDS, MAP, ADDED, CONFIG = "tokenizer.json", "vocab.txt", "vocab.json", "added_tokens.json", "tokenizer_config.json"
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
PIECES = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "spm.model")  # of sentencepiece
OPAQUE = ("tekken.json", "*.tiktoken")  # compared byte by byte
MOVED = 0.01  # the share of tokens with another number from which on a merge of the embeddings means nothing
# Matrices with a row, and biases with a number, for each token: the ends of their names.
OF_TOKENS = (
    "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "token_embedding.weight", "wte.weight",
    "shared.weight", "embed_in.weight", "embed_out.weight", "lm_head.weight", "lm_head.bias", "lm_head.decoder.weight",
    "lm_head.decoder.bias", "predictions.decoder.weight", "predictions.decoder.bias", "predictions.bias",
)  # fmt: skip

Tokens = dict[int, str]  # number -> token


class Vocabulary:
    """The tokenizer files of a model folder, read when they are compared."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[str, Tokens] = {}

    def files(self) -> list[str]:
        """The names of the files that say which tokens there are."""
        names = [name for name in (FAST, WORDS, MAP, *PIECES) if (self.folder / name).is_file()]
        return names + sorted(path.name for pattern in OPAQUE for path in self.folder.glob(pattern))

    def tokens(self, name: str) -> Tokens:
        """What a file says, with added_tokens.json where the file has no place for added tokens. Raises CheckpointError."""
        if name not in self._read:
            self._read[name] = _tokens(self.folder / name)
            if name != FAST and (self.folder / ADDED).is_file():
                self._read[name].update(_numbered(read_json(self.folder / ADDED)))
        return self._read[name]

    def numbers(self) -> dict[str, int]:
        """The number of every token, also of those that transformers adds as it loads the tokenizer; empty without files.

        Raises CheckpointError for files that do not tell it, as a sentencepiece model whose numbers a tokenizer's code moves.
        """
        names = self.files()
        if not names:
            return {}
        if names[0] not in (FAST, WORDS, MAP, "tokenizer.model"):
            raise CheckpointError(
                f"{self.folder / names[0]} does not tell the numbers of all tokens; write a tokenizer.json beside it with "
                f"transformers: AutoTokenizer.from_pretrained({str(self.folder)!r}).save_pretrained({str(self.folder)!r})"
            )
        tokens = self.tokens(names[0])
        if others := [token for token in tokens.values() if not isinstance(token, str)]:
            raise CheckpointError(f"{self.folder / names[0]} lists {shown(others[0])} as a token, which is no text; restore it")
        numbers = {token: number for number, token in tokens.items()}
        for number, token in self._decoder().items():
            numbers.setdefault(token["content"], number)
        return numbers

    def added(self) -> dict[str, dict]:
        """The tokens that were added to the tokenizer, with their flags."""
        found = {token["content"]: token for token in self._decoder().values()}
        if (self.folder / FAST).is_file():
            found.update({token["content"]: token for token in read_json(self.folder / FAST).get("added_tokens") or ()})
        elif (self.folder / ADDED).is_file():
            found = {token: {} for token in read_json(self.folder / ADDED)} | found
        return found

    def next_number(self) -> int:
        """What the tokenizers library gives the next token that is added."""
        numbers = self.numbers()
        if not (self.folder / FAST).is_file():
            return len(numbers)
        own = _model(read_json(self.folder / FAST)).get("vocab") or ()
        return max(len(own), *(numbers[token] + 1 for token in self.added()), 0)

    def _decoder(self) -> dict[int, dict]:
        """The added tokens that the tokenizer's configuration lists."""
        listed = read_json(self.folder / CONFIG).get("added_tokens_decoder") if (self.folder / CONFIG).is_file() else None
        try:
            return {int(number): {**token, "content": str(token["content"])} for number, token in (listed or {}).items()}
        except (TypeError, ValueError, AttributeError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / CONFIG}: added_tokens_decoder lists no tokens ({cut(repr(error), 200)}); save it again"
            ) from error

    def same_bytes(self, other: Vocabulary, name: str, others_name: str) -> bool:
        pairs = [(self.folder / name, other.folder / others_name)]
        if name != FAST:
            pairs.append((self.folder / ADDED, other.folder / ADDED))
        return all(
            cmp(a, b, shallow=False) if a.is_file() and b.is_file() else not (a.is_file() or b.is_file()) for a, b in pairs
        )


@dataclass(frozen=True)
class Difference:
    """How a vocabulary differs from another one's.

    text: in words. total: whether most tokens, or more than `MOVED` of them, have other numbers, so that rows of the embeddings
    stand for other tokens.
    """

    text: str
    total: bool


def difference(base: Vocabulary, expert: Vocabulary) -> Difference | None:
    """How the expert's vocabulary differs from the base's; None where they are the same, or one of them is missing.

    Settings, merges and the order in files do not count. Where both folders hold several kinds of files, the first one that
    both have decides, as it is what a tokenizer is loaded from; what only a later one says is no total difference.
    Raises CheckpointError for a file that cannot be read.
    """
    for rank, (name, others_name) in enumerate(_comparable(base, expert)):
        if base.same_bytes(expert, name, others_name):
            continue
        if any(fnmatchcase(name, pattern) for pattern in OPAQUE):
            return Difference(f"{name} is another file", total=False)
        found = _compare(base.tokens(name), expert.tokens(others_name), shifted=(name in PIECES) != (others_name in PIECES))
        if found:
            return Difference(f"by {others_name}, {found.text}", found.total and rank == 0)
    return None


def vocabulary_advice(name: str, base_shape: Sequence[int], expert_shape: Sequence[int]) -> str | None:
    """Why the embeddings or the output matrix of an expert has more or fewer rows than the base's, and what to do; None for
    tensors that have no row per token, or that differ in more than their rows."""
    if not name.endswith(OF_TOKENS) or list(base_shape[1:]) != list(expert_shape[1:]) or base_shape[0] == expert_shape[0]:
        return None
    base, expert = base_shape[0], expert_shape[0]
    more, small = ("the expert", base) if expert > base else ("the base", expert)
    return (
        f"The expert has {expert} tokens, the base {base}: tokens were added to {more}, or its vocabulary was padded. Folders "
        "with their tokenizers are merged token by token with tokenizer: union, which gives all models all tokens, or tokenizer: "
        f"base (in Python tokenizer='union'). Or load {more} with transformers, call resize_token_embeddings({small}), which "
        "leaves the tokens out, and save it to a new folder."
    )


def _comparable(base: Vocabulary, expert: Vocabulary) -> list[tuple[str, str]]:
    """Pairs of files that both number the same tokens: those of one name; else a tokenizer.json and what it is made from."""
    mine, others = base.files(), expert.files()
    if same := [(name, name) for name in mine if name in others]:
        return same
    return [(a, b) for a in mine for b in others if (a == FAST and _makes(b, base)) or (b == FAST and _makes(a, expert))][:1]


def _makes(name: str, fast: Vocabulary) -> bool:
    """Whether the numbers of an older file are those of a tokenizer.json made from it. (A vocab.txt may be of another kind.)"""
    if name == WORDS:
        return _model(read_json(fast.folder / FAST)).get("type") == "WordPiece"
    return name == MAP or name in PIECES


def _compare(base: Tokens, expert: Tokens, *, shifted: bool) -> Difference | None:
    """shifted: one of them may count from elsewhere, so only the order of the tokens that both have is compared."""
    number_of = {token: number for number, token in base.items()}
    shift = 0
    if shifted:
        steps = Counter(number_of[token] - number for number, token in expert.items() if token in number_of)
        shift = steps.most_common(1)[0][0] if steps else 0
    common = [(token, number_of[token], number) for number, token in expert.items() if token in number_of]
    moved = [found for found in common if base.get(found[2] + shift) != found[0]]
    gone = {token for token, _, _ in moved}
    kept = len(common) - len(moved)
    if kept < 0.5 * min(len(base), len(expert)) or len(moved) > MOVED * len(common):
        count = min(len(base), len(expert)) - kept
        token, before, after = moved[0] if moved else ("", 0, 0)
        example = f", such as {shown(token)}, which is {after} here and {before} there" if moved else ""
        return Difference(f"{count} of {min(len(base), len(expert))} tokens have another number or are others{example}", True)
    if shifted:
        return None
    replaced = [
        f"{number} is {shown(expert[number])} and was {shown(base[number])}"
        for number in expert.keys() & base.keys()
        if expert[number] != base[number] and expert[number] not in gone
    ]
    more = [shown(expert[number]) for number in sorted(expert.keys() - base.keys())]
    fewer = [shown(base[number]) for number in sorted(base.keys() - expert.keys())]
    parts = [
        ("other numbers", [f"{shown(token)} {after}, was {before}" for token, before, after in moved]),
        ("other tokens", replaced),
        ("tokens more", more),
        ("tokens fewer", fewer),
    ]
    text = ", ".join(f"{len(found)} {what} ({_some(found)})" for what, found in parts if found)
    return Difference(text, total=False) if text else None


def _tokens(path: Path) -> Tokens:
    try:
        if path.name == WORDS:
            lines = read_bytes(path, MAX_JSON_BYTES).decode("utf-8", errors="replace").split("\n")
            return {number: line.strip("\r") for number, line in enumerate(lines[:-1] if not lines[-1] else lines)}
        if path.name == MAP:
            return _numbered(read_json(path))
        if path.name in PIECES:
            return dict(enumerate(_pieces(read_bytes(path, MAX_JSON_BYTES))))
        return _fast_tokens(read_json(path))
    except CheckpointError:
        raise
    except (TypeError, ValueError, OverflowError, AttributeError, KeyError, IndexError) as error:
        fault = cut(repr(error), 200)
        raise CheckpointError(f"{path} cannot be read as a tokenizer ({fault}); download it or save it again") from error


def _numbered(numbers: dict) -> Tokens:
    """From token -> number; nested by language in some models, whose tokens are then told apart by it."""
    if numbers and all(isinstance(inner, dict) for inner in numbers.values()):
        return {number: token for inner in numbers.values() for token, number in inner.items()}
    return {int(number): token for token, number in numbers.items()}


def _model(content: dict) -> dict:
    model = content.get("model")
    return model if isinstance(model, dict) else {}


def _fast_tokens(content: dict) -> Tokens:
    """Of a tokenizer.json: a vocabulary as an object, or, of Unigram, as a list of tokens and scores; and added tokens."""
    vocabulary = _model(content).get("vocab") or {}
    if isinstance(vocabulary, dict):
        tokens = _numbered(vocabulary)
    else:
        tokens = {number: entry[0] for number, entry in enumerate(vocabulary)}
    tokens.update({int(added["id"]): added["content"] for added in content.get("added_tokens") or ()})
    return tokens


def _pieces(data: bytes) -> list[str]:
    """The pieces of a sentencepiece model: strings in field 1 of the messages in field 1, in Protocol Buffers' encoding."""
    return [_fields(piece)[0].decode("utf-8", errors="replace") for piece in _fields(data)]


def _fields(data: bytes) -> list[bytes]:
    """The values of field 1, where it has a length; other fields are passed over."""
    found, position = [], 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 2:
            length, position = _varint(data, position)
            if position + length > len(data):
                raise ValueError("it is cut off")
            if key >> 3 == 1:
                found.append(data[position : position + length])
            position += length
        elif kind == 0:
            _, position = _varint(data, position)
        elif kind in (1, 5):
            position += 8 if kind == 1 else 4
        else:
            raise ValueError(f"byte {position} begins no field")
    return found


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value, bits = 0, 0
    while bits < 70:  # numbers of 64 bits
        byte = data[position]
        value |= (byte & 127) << bits
        position, bits = position + 1, bits + 7
        if byte < 128:
            return value, position
    raise ValueError(f"byte {position} ends no number")


def _some(texts: list[str], count: int = 3) -> str:
    return ", ".join(texts[:count]) + (" …" if len(texts) > count else "")
