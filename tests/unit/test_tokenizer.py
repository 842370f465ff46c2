"""Exact counts by a model's own tokenizer: a small one, made here."""

import json

import pytest

from extproc.errors import ConfigError
from extproc.estimate import MAX_COUNT_BYTES, TokenEstimator
from extproc.parse import MESSAGE_TOKENS, parse
from extproc.request import Endpoint
from extproc.tokenizer import load_tokenizer

tokenizers = pytest.importorskip("tokenizers", reason="needs the extra [tokenizer]")


@pytest.fixture
def path(tmp_path):
    """A vocabulary of whole words: as many tokens as words, and one more at the beginning."""
    words = ["<s>", "[UNK]", "a", "bb", "ccc"]
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_truncation(5)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


@pytest.fixture
def estimator(path):
    return TokenEstimator(load_tokenizer(str(path)))


def test_counts_every_token(path):
    count = load_tokenizer(str(path))
    assert count("a bb ccc 中文") == 5
    assert count("") == 1
    assert count("a " * 1_000) == 1_001  # a truncation in the file is for training, not for serving
    assert load_tokenizer(str(path.parent))("a") == 2


@pytest.mark.parametrize(
    ("endpoint", "body", "tokens"),
    [
        (Endpoint.GENERATE, {"text": "a bb ccc"}, 4),
        (Endpoint.GENERATE, {"text": ["a bb", "ccc"]}, 5),
        (Endpoint.GENERATE, {"input_ids": [1, 2]}, 2),
        (Endpoint.COMPLETIONS, {"prompt": 'a "bb"\n ccc'}, 4),
        (Endpoint.CHAT, {"messages": [{"role": "user", "content": "a bb"}] * 2}, 2 * (3 + MESSAGE_TOKENS)),
        (Endpoint.CHAT, {"messages": [{"content": [{"type": "text", "text": "a b"}]}]}, 3 + MESSAGE_TOKENS),
        (Endpoint.CHAT, {"messages": [{"content": None}], "tools": [1, 2]}, 1 + MESSAGE_TOKENS + 3),
    ],
)
def test_prompts_are_counted(estimator, endpoint, body, tokens):
    assert parse(endpoint, json.dumps(body).encode(), estimator=estimator).prompt_tokens == tokens


@pytest.mark.parametrize(
    ("endpoint", "body"),
    [
        (Endpoint.GENERATE, {"text": "a " * MAX_COUNT_BYTES}),
        (Endpoint.CHAT, {"messages": [{"content": [{"type": "image_url", "image_url": {"url": "http://a"}}]}]}),
        (Endpoint.CHAT, {"messages": "nonsense"}),
        (Endpoint.CHAT, {}),
        (Endpoint.COMPLETIONS, {"prompt": 7}),
    ],
)
def test_what_is_long_or_no_text_is_estimated(estimator, endpoint, body):
    assert (
        parse(endpoint, json.dumps(body).encode(), estimator=estimator).prompt_tokens
        == parse(endpoint, json.dumps(body).encode()).prompt_tokens
    )


def test_a_file_that_is_none_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tokenizer_path: .*no such file"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"tokenizer_path: .*not a tokenizer\.json"):
        load_tokenizer(str(tmp_path))


def test_without_the_extra_it_says_what_to_install(monkeypatch, path):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ConfigError, match=r"pip install 'extproc\[tokenizer\]'"):
        load_tokenizer(str(path))
