"""Files, folders and datasets as one text, whatever they are written in."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard
from datasets import Dataset
from helpers import CALIBRATION_TEXT, SHIPPED, command, word_tokenizer
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase

from dlp_plugin.evaluation.sources import read_pieces
from dlp_plugin.evaluation.text import read_tokens

ROWS = {"text": ["7 8 9", "12 11"], "body": ["1 2", "3 4"], "label": [0, 1]}
TOKENS = [7, 8, 9, 12, 11]
# A word for every speaker, so that it is seen who is taken for whom.
TEMPLATE = (
    "{% for message in messages %}{{ {'system': 51, 'user': 52, 'assistant': 53}[message.role] }}"
    " {{ message.content }} {% endfor %}"
)
CHATS = [
    [{"role": "system", "content": "1"}, {"role": "user", "content": "2"}],
    [{"role": "user", "content": "3"}, {"role": "assistant", "content": "4"}],
]
CHAT_TOKENS = [51, 1, 52, 2, 52, 3, 53, 4]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    found = word_tokenizer()
    found.backend_tokenizer.pre_tokenizer = WhitespaceSplit()
    return found


def text_of(source: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    settings = {"config": None, "split": None, "usual_split": "train", "column": "text"}
    return "".join(read_pieces(source, tokenizer, streaming=False, **settings))


def arrow(file: Path) -> None:
    Dataset.from_dict(ROWS).save_to_disk(file.with_name("saved"))
    next(file.with_name("saved").glob("*.arrow")).rename(file)


WRITERS: dict[str, Callable[[Path], object]] = {
    "jsonl": lambda file: Dataset.from_dict(ROWS).to_json(file),
    "json": lambda file: Dataset.from_dict(ROWS).to_json(file, lines=False),
    "csv": lambda file: Dataset.from_dict(ROWS).to_csv(file),
    "CSV": lambda file: Dataset.from_dict(ROWS).to_csv(file),
    "tsv": lambda file: Dataset.from_dict(ROWS).to_csv(file, sep="\t"),
    "parquet": lambda file: Dataset.from_dict(ROWS).to_parquet(file),
    "arrow": arrow,
}


class TestAFile:
    @pytest.mark.parametrize("ending", WRITERS)
    def test_of_rows_is_read_by_its_ending(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str
    ) -> None:
        file = tmp_path / f"rows[1].{ending}"
        WRITERS[ending](file)
        assert read_tokens(file, tokenizer) == TOKENS
        assert read_tokens(file, tokenizer, column="body") == [1, 2, 3, 4]
        assert read_tokens(file, tokenizer, limit=2) == [7, 8]
        with pytest.raises(ValueError, match=r"has no column 'x'; it has \['text', 'body', 'label"):
            read_tokens(file, tokenizer, column="x")
        with pytest.raises(ValueError, match=r"'label' of row 0 is 0 instead of text"):
            read_tokens(file, tokenizer, column="label")

    @pytest.mark.parametrize("ending", ["txt", "jsonl"])
    @pytest.mark.parametrize("compression", ["gz", "zst"])
    def test_that_is_compressed_is_the_same(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str, compression: str
    ) -> None:
        text = {"txt": "7 8 9\n\n12 11", "jsonl": '{"text": "7 8 9"}\n{"text": "12 11"}\n'}[ending]
        compress = {"gz": gzip.compress, "zst": zstandard.compress}[compression]
        file = tmp_path / f"rows.{ending}.{compression}"
        file.write_bytes(compress(text.encode()))
        assert read_tokens(file, tokenizer) == TOKENS

    @pytest.mark.parametrize("ending", ["txt", "jsonl"])
    def test_has_one_split(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str
    ) -> None:
        file = tmp_path / f"test.{ending}"
        file.write_text({"txt": "7 8", "jsonl": '{"text": "7 8"}\n'}[ending])
        assert read_tokens(file, tokenizer, usual_split="test") == [7, 8]
        assert read_tokens(file, tokenizer, split="train") == [7, 8]
        message = r"is a single file, so its only split is 'train', not 'test': leave the"
        with pytest.raises(ValueError, match=message):
            read_tokens(file, tokenizer, split="test")

    def test_may_be_read_in_part(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        Dataset.from_dict(ROWS).to_json(tmp_path / "rows.jsonl")
        assert read_tokens(tmp_path / "rows.jsonl", tokenizer, split="train[:50%]") == [7, 8, 9]


class TestAFolder:
    def test_of_texts_has_a_document_per_file(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        """Its text is the file's: a reader of lines would part them by blank lines."""
        lines = "7 8\n9\n\n\n12 11\n"
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + lines.encode())
        assert text_of(tmp_path, tokenizer) == text_of(tmp_path / "a.txt", tokenizer) == lines
        (tmp_path / "b.txt").write_text("5")
        assert text_of(tmp_path, tokenizer) == f"{lines}\n\n5"
        assert read_tokens(tmp_path, tokenizer) == [*TOKENS, 5]

    def test_has_the_splits_that_its_files_are_named_for(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        (tmp_path / "train.txt").write_text("7 8")
        assert read_tokens(tmp_path, tokenizer, usual_split="test") == [7, 8]
        (tmp_path / "test.txt").write_text("9")
        assert read_tokens(tmp_path, tokenizer, usual_split="test") == [9]
        assert read_tokens(tmp_path, tokenizer) == [7, 8]
        with pytest.raises(ValueError, match=r"\(Unknown split \"validation\". Should be one of"):
            read_tokens(tmp_path, tokenizer, split="validation")


class TestADatasetThatLlmCompressorNames:
    """Its class finds the dataset on the hub; here a folder of that name lies in its place."""

    def test_has_the_texts_that_oneshot_calibrates_on(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        rows = {"instruction": ["7 8", "9"], "input": ["", ""], "output": ["11", "12"]}
        folder = tmp_path / "garage-bAInd" / "Open-Platypus"
        folder.mkdir(parents=True)
        Dataset.from_dict(rows).to_json(folder / "train.jsonl")
        monkeypatch.chdir(tmp_path)
        for limit in (None, 10_000):
            tokens = read_tokens("open_platypus", tokenizer, limit=limit)
            assert [token for token in tokens if token] == [7, 8, 11, 9, 12]

    def test_a_folder_of_that_name_is_the_folder(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "open_platypus").mkdir()
        (tmp_path / "open_platypus" / "train.txt").write_text("7 8")
        monkeypatch.chdir(tmp_path)
        assert read_tokens("open_platypus", tokenizer) == [7, 8]


class TestConversations:
    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    def test_go_through_the_chat_template(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str
    ) -> None:
        tokenizer.chat_template = TEMPLATE
        rows = Dataset.from_dict({"messages": CHATS})
        (rows.to_json if ending == "jsonl" else rows.to_parquet)(tmp_path / f"chats.{ending}")
        file = tmp_path / f"chats.{ending}"
        assert read_tokens(file, tokenizer, column="messages") == CHAT_TOKENS
        with pytest.raises(ValueError, match=r"it has \['messages'\]: name one of them"):
            read_tokens(file, tokenizer)

    def test_as_sharegpt_has_them(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        tokenizer.chat_template = TEMPLATE
        names = {"system": "system", "user": "human", "assistant": "gpt"}
        chats = [[{"from": names[m["role"]], "value": m["content"]} for m in c] for c in CHATS]
        Dataset.from_dict({"conversations": chats}).to_json(tmp_path / "chats.jsonl")
        found = read_tokens(tmp_path / "chats.jsonl", tokenizer, column="conversations")
        assert found == CHAT_TOKENS

    def test_fields_of_other_messages_are_not_there(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.content }} {% if 'name' in m %}{{ m.name }} {% endif %}"
            "{% endfor %}"
        )
        chat = [{"role": "user", "content": "1"}, {"role": "user", "content": "2", "name": "3"}]
        (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n")
        assert read_tokens(tmp_path / "chats.jsonl", tokenizer, column="messages") == [1, 2, 3]

    def test_that_the_template_refuses(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
    ) -> None:
        tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
        Dataset.from_dict({"messages": CHATS}).to_json(tmp_path / "chats.jsonl")
        message = r"'messages' of row 0 does not fit .* \(roles must alternate\): leave such rows"
        with pytest.raises(ValueError, match=message):
            read_tokens(tmp_path / "chats.jsonl", tokenizer, column="messages")

    def test_without_a_template(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        Dataset.from_dict({"messages": CHATS}).to_json(tmp_path / "chats.jsonl")
        message = "'messages' of row 0 is a conversation, but the model's tokenizer has no chat tem"
        with pytest.raises(ValueError, match=message):
            read_tokens(tmp_path / "chats.jsonl", tokenizer, column="messages")

    @pytest.mark.parametrize("value", [[], ["hello"], [{"content": "no role"}]])
    def test_lists_of_something_else(
        self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, value: list
    ) -> None:
        (tmp_path / "rows.jsonl").write_text(json.dumps({"text": value}) + "\n")
        with pytest.raises(ValueError, match=r"'text' of row 0 is \[.*instead of text"):
            read_tokens(tmp_path / "rows.jsonl", tokenizer)


class TestWhatCannotBeRead:
    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.txt", b"", "holds nothing but white space: give one with text in it"),
            ("a.txt", b" \n\t\n", "holds nothing but white space"),
            ("a.jsonl", b"", "holds nothing but white space"),
            ("a.jsonl", b'{"text": " "}\n', "holds nothing but white space"),
            ("a.txt.gz", b"no gzip", r"a\.txt\.gz cannot be read \(.*\): is it damaged\?"),
            ("a.txt.gz", gzip.compress(b"ab" * 99, mtime=0)[:-20], r"a\.txt\.gz cannot be read"),
            ("a.jsonl", b'{"text": "b\n', r"a\.jsonl cannot be read \(JSON parse er"),
            ("a.csv", b"text\nb\xff\n", r"a\.csv cannot be read \('utf-8' codec"),
            ("a.parquet", b"PAR1", r"a\.parquet cannot be read \(.*: it is damaged"),
        ],
    )
    @pytest.mark.parametrize("limit", [None, 3])
    def test_a_file(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tmp_path: Path,
        name: str,
        content: bytes,
        message: str,
        limit: int | None,
    ) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_tokens(tmp_path / name, tokenizer, limit=limit)

    @pytest.mark.parametrize("name", ["gone.jsonl", "gone.txt.gz", "gone.parquet"])
    def test_a_file_that_is_not_there(self, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        with pytest.raises(FileNotFoundError, match=f"there is no file or folder {name}: check"):
            read_tokens(name, tokenizer)

    def test_a_text_in_a_folder(self, tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
        (tmp_path / "a.txt").write_bytes(b"a\xff")
        with pytest.raises(ValueError, match=r"cannot be read as a dataset \('utf-8' codec can't"):
            read_tokens(tmp_path, tokenizer)


def test_the_terminal_measures_rows_as_their_text(tmp_path: Path) -> None:
    """The default split is the test's, and a file has none."""
    text = CALIBRATION_TEXT.read_text()[:4000]
    (tmp_path / "text.txt").write_text(text)
    Dataset.from_dict({"body": [text]}).to_json(tmp_path / "rows.jsonl")
    rows = ["--data", tmp_path / "rows.jsonl", "--column", "body"]
    measured = [
        command("ppl", SHIPPED, "--length", 64, *data).stdout.splitlines()
        for data in (["--data", tmp_path / "text.txt"], rows)
    ]
    (figure,) = [line for line in measured[0] if line.startswith("perplexity ")]
    assert figure in measured[1]
    asked = command("ppl", SHIPPED, *rows, "--split", "test", code=1).stderr
    assert "rows.jsonl is a single file, so its only split is 'train'" in asked
