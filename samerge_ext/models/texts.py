"""Calibration texts: read from files or taken from datasets, tokenised by a model folder's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from samerge_ext.checkpoints.places import folder_of
from samerge_ext.checkpoints.reading import shown

Batch = dict[str, Tensor]
# A text, or a record of a dataset that holds one: see `written`.
Text = str | Mapping[str, Any]

TABLES = (".csv", ".tsv", ".json", ".parquet", ".arrow")  # which hold texts, but not one a line
# Files that tokenizers keep their words in, for those whose class does not name them.
VOCABULARIES = ("tokenizer.json", "*.model", "tekken.json", "*.tiktoken", "vocab*")


def read_texts(path: str | Path, limit: int | None = None) -> list[str]:
    """Texts of a .jsonl file (field "text") or of any other text file (one a line); empty lines are left out.

    Raises ValueError, naming file and line, for a record without text, for a file without any or not in UTF-8, and for a folder.
    """
    return [record["text"] for record in _records(Path(path))[:limit]]


def read_records(path: str | Path, limit: int | None = None) -> list[Text]:
    """As `read_texts`, and of a .jsonl file records of the other forms that `text_batches` takes, too."""
    return [record.get("text", record) for record in _records(Path(path), chats=True)[:limit]]


def read_labelled(path: str | Path, limit: int | None = None) -> list[tuple[str, str | int]]:
    """Texts and labels of a .jsonl file (fields "text" and "label", a number from 0 on or a name), in the order of `read_texts`.

    Raises ValueError as that, and for a label that is neither.
    """
    path = Path(path)
    if path.suffix != ".jsonl":
        raise ValueError(f'{path}: labelled texts are a .jsonl file, of objects with the fields "text" and "label"')
    found = []
    for record in _records(path, labelled=True)[:limit]:
        label = record["label"]
        if not isinstance(label, str) and not (type(label) is int and label >= 0):
            raise ValueError(f"{path}: {shown(label)} is no label; numbers from 0 on, or names, are expected")
        found.append((record["text"], label))
    return found


def _records(path: Path, *, labelled: bool = False, chats: bool = False) -> list[dict[str, Any]]:
    """The records of a file: with the field "text", a text, and labelled "label"; with chats as `written` takes them, too."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder; the calibration of a text model is a file with one unlabelled text a line")
    if path.suffix in TABLES:
        raise ValueError(f'{path} is no file with one text a line; write its texts as such, or as .jsonl with the field "text"')
    records = []
    try:
        lines = path.read_bytes().decode("utf-8-sig").split("\n")  # what else splitlines() splits at may be inside of a text
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8 ({error}); convert it") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        record: dict[str, Any] = {"text": line.removesuffix("\r")}
        if path.suffix == ".jsonl":
            try:
                record = json.loads(line)
                if not chats or "text" in record or not _is_chat_or_prompt(record):
                    record = {field: record[field] for field in ("text", *["label"] * labelled)}
                    record["text"] = record["text"].removesuffix("\r")
                    record["text"].encode()  # half of a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
                beside = ', and "label"' if labelled else ""
                raise ValueError(
                    f'{path}, line {number}: expected a JSON object with a text as its field "text"{beside} ({error!r:.200})'
                ) from error
        records.append(record)
    if not records:
        raise ValueError(f"{path} holds no texts; a calibration file has one unlabelled text a line")
    return records


def load_tokenizer(folders: Iterable[str | Path], config: Any = None) -> Any:
    """The tokenizer of the first folder that has one, padding on the right. config: the model's, for folders without config.json.

    transformers makes an empty tokenizer, to which every word is unknown, of a folder without its files. Such a folder is passed
    over; raises ValueError where no folder has one, and where one cannot be loaded.
    """
    from transformers import AutoTokenizer

    places = list(dict.fromkeys(folder_of(folder) for folder in folders))
    for folder in places:
        if not (_holds(folder, VOCABULARIES) or (folder / "tokenizer_config.json").is_file()):
            continue
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, config=config, local_files_only=True, trust_remote_code=False, padding_side="right"
            )
        except Exception as error:  # tokenizers' libraries raise errors of many types
            raise ValueError(f"{folder} has a tokenizer that transformers cannot load: {error}") from error
        files = tuple(tokenizer.vocab_files_names.values())  # none for bytes or characters
        if not files or _holds(folder, (*files, *VOCABULARIES)):
            return _padded(tokenizer, folder)
    raise ValueError(
        f"none of {', '.join(map(str, places))} has the files of a tokenizer (tokenizer.json, vocab.txt, …); copy those of the "
        "model that the experts were fine-tuned from into the base's folder"
    )


def text_batches(
    texts: Iterable[Text], tokenizer: Any, batch_size: int, max_length: int, *, special_tokens: bool = True
) -> list[Batch]:
    """Tokenised batches {input_ids, attention_mask: [B, S]}, each padded on the right to its longest text.

    texts: each a text, or a record as datasets of TRL's forms have it, of which other columns are not read: with "text"; with
        "messages", a chat; or with "prompt" and "completion", both texts or both messages. Chats are written by the tokenizer's
        chat template, which adds special tokens itself.
    tokenizer: of transformers, or a model folder that has one. max_length: tokens; longer texts are cut.
    special_tokens: False adds special_tokens_mask [B, S], where a batch has other tokens too; logits at special ones then do not
        count.
    """
    if isinstance(tokenizer, str | Path):
        tokenizer = load_tokenizer([tokenizer])
    found = [written(text, tokenizer) for text in texts]
    are_chats = {is_chat for _, is_chat in found}
    if len(are_chats) > 1:
        raise ValueError("some records are chats and some are texts; give batches of one kind")
    chunks = [[text for text, _ in found[start : start + batch_size]] for start in range(0, len(found), batch_size)]
    options = {"padding": True, "truncation": True, "max_length": max_length, "return_tensors": "pt"}
    options["add_special_tokens"] = are_chats != {True}
    options.update(return_token_type_ids=False, return_attention_mask=True, return_special_tokens_mask=not special_tokens)
    batches = [dict(tokenizer(chunk, **options)) for chunk in chunks]
    for batch in batches:
        if "special_tokens_mask" in batch and not (batch["attention_mask"] * (1 - batch["special_tokens_mask"])).any():
            del batch["special_tokens_mask"]
    return batches


def written(record: Text, tokenizer: Any) -> tuple[str, bool]:
    """What a record says as one text, and whether the tokenizer's chat template made it, of messages.

    Raises ValueError for a record of no form that is known, and for a chat where there is no template.
    """
    if isinstance(record, str):
        return record, False
    if "text" in record:
        return record["text"], False
    if not _is_chat_or_prompt(record):
        raise ValueError(
            f'a record has the fields {", ".join(map(shown, record))}; expected "text", "messages", or "prompt" and '
            '"completion", both texts or both messages'
        )
    if "messages" in record:
        said = record["messages"]
    elif isinstance(record["prompt"], str):
        return record["prompt"] + record["completion"], False
    else:
        said = [*record["prompt"], *record["completion"]]
    try:
        return tokenizer.apply_chat_template(said, tokenize=False), True
    except Exception as error:  # templates raise errors of many types
        raise ValueError(
            f"{tokenizer.name_or_path}: a chat cannot be written by its tokenizer's template ({error!s:.300}); give texts, or a "
            "tokenizer whose template fits them"
        ) from error


def _is_chat_or_prompt(record: Mapping[str, Any]) -> bool:
    if "messages" in record:
        return not isinstance(record["messages"], str)
    both = [record.get("prompt"), record.get("completion")]
    return all(isinstance(part, str) for part in both) or all(isinstance(part, list | tuple) for part in both)


def _holds(folder: Path, patterns: Iterable[str]) -> bool:
    return any(path.is_file() for pattern in patterns for path in folder.glob(pattern))


def _padded(tokenizer: Any, folder: Path) -> Any:
    """The tokenizer with a token to pad with; what is padded is masked, so its identity does not matter."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.bos_token
    if tokenizer.pad_token is None:
        raise ValueError(f"{folder}: its tokenizer has no token to pad texts with; set pad_token in its tokenizer_config.json")
    return tokenizer
