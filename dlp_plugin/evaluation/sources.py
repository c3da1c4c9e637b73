"""Reads files and datasets as one text."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import fsspec
from datasets import Dataset, IterableDataset, load_dataset, load_dataset_builder
from datasets.exceptions import DatasetsError
from fsspec.utils import infer_compression
from llmcompressor.args import DatasetArguments
from llmcompressor.transformers.data import CustomDataset, TextGenerationDataset
from transformers import PreTrainedTokenizerBase

__all__ = ["read_pieces"]

# Suffixes of files that ``datasets`` reads as rows, to its reader and the reader's options.
_READERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_TEXTS = (".txt", ".md", ".text")
_ENCODING = "utf-8-sig"  # Windows puts a byte order mark in front of a text
_ROLES = {"human": "user", "gpt": "assistant"}  # ShareGPT's names to those of chat templates

Rows = Dataset | IterableDataset


def read_pieces(
    source: str | Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    config: str | None,
    split: str | None,
    usual_split: str,
    column: str,
    streaming: bool,
) -> Iterator[str]:
    """Yield pieces whose concatenation is the text of a file or dataset.

    :param source: a file, a local folder, or the name of a dataset
    :param tokenizer: of the model
    :param config: the dataset's configuration
    :param split: the dataset's split
    :param usual_split: the split to take if ``split`` is None and there are several
    :param column: the dataset's column that holds the text
    :param streaming: whether to read rows of a dataset only when they are needed
    :return: pieces of text, one per row of a dataset
    :raises FileNotFoundError: if there is neither such a file nor such a dataset
    :raises ValueError: if the source cannot be read, has no such split or column, or a row has no
        text
    """
    path = Path(source)
    if path.is_file() and split is not None and split.partition("[")[0] != "train":
        raise ValueError(
            f"{source} is a single file, so its only split is 'train', not {split!r}: leave the "
            "split out"
        )
    if path.is_file() and _ending(path) not in _READERS:
        yield _text_of(path)
        return
    rows = _rows(str(source), tokenizer, config, split, usual_split, streaming)
    for number, row in enumerate(_reading(rows, source)):
        if column not in row:
            raise ValueError(
                f"{source} has no column {column!r}; it has {list(row)}: name one of them"
            )
        value = row[column]
        where = f"{source}: {column!r} of row {number}"
        if isinstance(value, str):
            yield f"\n\n{value}" if number else value
        elif _is_chat(value):
            yield _chat_text(value, tokenizer, where)
        else:
            raise ValueError(
                f"{where} is {value!r} instead of text: leave such rows out, or name another column"
            )


def _ending(path: Path) -> str:
    """Return a file's suffix in lower case, without that of a compression."""
    inner = path.with_suffix("") if infer_compression(path.name.lower()) else path
    return inner.suffix.lower()


def _text_of(path: Path) -> str:
    compression = infer_compression(path.name.lower())
    try:
        with fsspec.open(str(path), "rt", encoding=_ENCODING, compression=compression) as opened:
            text: str = opened.read()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text (byte {error.start}): convert it, e.g. with iconv"
        ) from None
    except Exception as error:  # each compression library raises errors of its own
        reason = str(error) or type(error).__name__
        raise ValueError(f"{path} cannot be read ({reason}): is it damaged?") from error
    return text


def _rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: str | None,
    split: str | None,
    usual_split: str,
    streaming: bool,
) -> Rows:
    path = Path(source)
    local = source.startswith((".", "/", "~")) or _ending(path) in (*_TEXTS, *_READERS)
    if local and not path.exists():
        raise FileNotFoundError(f"there is no file or folder {source}: check the path")
    arguments: dict[str, Any] = {"path": source, "name": config}
    try:
        if path.is_file():
            reader, options = _READERS[_ending(path)]
            usual_split = "train"
            arguments = {"path": reader, "data_files": glob.escape(source), **options}
        elif path.is_dir():
            made: Any = load_dataset_builder(**arguments).config
            if len(made.data_files or ()) == 1:
                (usual_split,) = map(str, made.data_files)
            if hasattr(made, "sample_by"):  # the text reader, to which a row is a line by default
                arguments |= {"sample_by": "document", "encoding": _ENCODING}
        elif _host_knows(source):
            return _host_rows(source, tokenizer, config, split or usual_split, streaming)
        load: Any = load_dataset  # typed for a literal ``streaming`` only
        rows: Rows = load(**arguments, split=split or usual_split, streaming=streaming)
    except StopIteration:  # raised by the JSON reader if there are no rows
        return Dataset.from_dict({})
    except (OSError, ValueError, DatasetsError) as error:
        raise _told(source, error) from error
    return rows


def _host_knows(source: str) -> bool:
    """Whether llm-compressor has a dataset of this name, such as ``open_platypus``."""
    try:
        kind = TextGenerationDataset.get_value_from_registry(source) if ":" not in source else None
    except KeyError:
        return False
    return kind not in (None, CustomDataset)


def _host_rows(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    config: str | None,
    split: str,
    streaming: bool,
) -> Rows:
    """Load a dataset of llm-compressor, with the text that ``oneshot()`` would calibrate on."""
    arguments = DatasetArguments(dataset=source, dataset_config_name=config, streaming=streaming)
    known: Any = TextGenerationDataset.load_from_registry(
        source,
        dataset_args=arguments,
        split=split,
        processor=deepcopy(tokenizer),  # the host may add a padding token or a chat template
    )
    rows: Rows = known.load_dataset()
    return rows if known.preprocess is None else rows.map(known.preprocess)


def _reading(rows: Rows, source: str | Path) -> Iterator[Any]:
    """Yield rows, and turn errors of reading into one line; streamed rows are only read here."""
    try:
        yield from rows
    except (OSError, ValueError, DatasetsError) as error:
        raise _told(str(source), error) from error


def _told(source: str, error: Exception) -> OSError | ValueError:
    """Turn an error of ``datasets`` into one with a single line."""
    cause = error.__cause__ if isinstance(error, DatasetsError) else None
    reason = (str(cause or error).strip() or type(error).__name__).splitlines()[0]
    if Path(source).is_file():
        return ValueError(
            f"{source} cannot be read ({reason}): it is damaged, or its suffix is wrong"
        )
    kinds = (FileNotFoundError, OSError)  # subclasses may require more arguments than a message
    kind = next((kind for kind in kinds if isinstance(error, kind)), ValueError)
    return kind(
        f"{source} is not a file, and cannot be read as a dataset ({reason}): check the path, or "
        "the dataset's name, configuration and split"
    )


def _is_chat(value: object) -> bool:
    """Whether a value is a conversation: messages with ``role`` or, as in ShareGPT, ``from``."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(each, dict) and ("role" in each or "from" in each) for each in value)
    )


def _chat_text(
    messages: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, where: str
) -> str:
    """Write a conversation as text by the tokenizer's chat template."""
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{where} is a conversation, but the model's tokenizer has no chat template: give a "
            "tokenizer with one, or name a column of text"
        )
    told = []
    for message in messages:
        if "from" in message:
            speaker = message["from"]
            message = {"role": _ROLES.get(speaker, speaker), "content": message.get("value")}
        # In a table, a message has None for fields that only other messages have.
        told.append({key: value for key, value in message.items() if value is not None})
    try:
        return str(tokenizer.apply_chat_template(told, tokenize=False))
    except Exception as error:  # a template is a program, and may raise anything
        raise ValueError(
            f"{where} does not fit the tokenizer's chat template ({error}): leave such rows out"
        ) from error
