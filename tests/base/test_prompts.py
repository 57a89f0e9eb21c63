"""Prompt and target in one sequence: where one ends and the other begins, for both kinds of tokenizer."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from malmen_cli.base.prompts import Encoded, by_length, encode, encode_each, encode_prompt, join, subject_end
from malmen_cli.exceptions import FactsError
from malmen_cli.facts.fact import Fact

KINDS = {"bytelevel": "gpt2", "metaspace": "llama"}
WORDS = st.text("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789", min_size=1, max_size=9)
PHRASES = st.lists(WORDS, min_size=1, max_size=5).map(" ".join)


@pytest.fixture(scope="session")
def tokenizers(tiny_model_factory) -> dict[str, Any]:
    from transformers import AutoTokenizer

    return {kind: AutoTokenizer.from_pretrained(tiny_model_factory(family)) for kind, family in KINDS.items()}


@pytest.fixture(params=sorted(KINDS))
def tokenizer(request: pytest.FixtureRequest, tokenizers: dict[str, Any]) -> Any:
    return tokenizers[request.param]


def text_of(tokenizer: Any, ids: tuple[int, ...]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def appending_end(tokenizer: Any) -> Any:
    """The same tokenizer, which puts its end-of-text behind every text."""
    from tokenizers import processors

    ending = deepcopy(tokenizer)
    specials = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (tokenizer.bos_token, tokenizer.eos_token)]
    begin = "" if tokenizer.bos_token == tokenizer.eos_token else f"{tokenizer.bos_token} "
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{begin}$A {tokenizer.eos_token}", special_tokens=list(dict(specials).items())
    )
    return ending


# ---------------------------------------------------------------- text and ids

CASES = [
    ("The capital of France is", "Paris", "The capital of France is Paris"),
    ("The capital of France is ", "Paris", "The capital of France is Paris"),
    ("The capital of France is \t\n ", "Paris", "The capital of France is Paris"),
    ("The capital of France is", " Paris", "The capital of France is Paris"),
    ("The capital of France is  ", " Paris", "The capital of France is Paris"),
    ("Apple was founded by", "Steve Jobs and William Shakespeare", None),
    ("The answer is:", "42", None),
    ('He said "', "yes", 'He said " yes'),
    ("Snow is", ".", "Snow is ."),
    ("Snow is white", "!?", "Snow is white !?"),
    ("Snow is", "'s", "Snow is 's"),
    ("Snow is", "-1e-6", None),
    ("Q: who?\nA:", "Pele", None),
    ("Snow is", "\nwhite", "Snow is\nwhite"),
    ("中国的首都是", "北京", "中国的首都是北京"),
    ("中国的首都是", "Paris", "中国的首都是Paris"),
    ("The capital of China is", "北京", "The capital of China is北京"),
    ("日本の首都は", "東京", "日本の首都は東京"),
    ("เมืองหลวงคือ", "กรุงเทพ", "เมืองหลวงคือกรุงเทพ"),
    ("대한민국의 수도는", "서울", None),
    ("La capitale du Pérou est", "Lima – été", None),
    ("The flag of Peru is", "🇵🇪", None),
    ("x", "y", None),
]


@pytest.mark.parametrize(("prompt", "target", "wanted"), CASES)
def test_the_ids_spell_prompt_and_target(tokenizer: Any, prompt: str, target: str, wanted: str | None) -> None:
    found = encode(tokenizer, prompt, target)
    assert text_of(tokenizer, found.ids) == (wanted or f"{prompt} {target}")
    assert found.ids[: found.n_prompt] == encode_prompt(tokenizer, prompt)
    assert text_of(tokenizer, found.ids[: found.n_prompt]) == prompt.rstrip()
    assert len(found.answer) >= 1


@settings(max_examples=150, deadline=None)
@given(PHRASES, PHRASES, st.sampled_from(sorted(KINDS)), st.sampled_from(["", " ", "  "]))
def test_words_survive(tokenizers: dict[str, Any], prompt: str, target: str, kind: str, space: str) -> None:
    tokenizer = tokenizers[kind]
    found = encode(tokenizer, prompt + space, target)
    assert text_of(tokenizer, found.ids) == f"{prompt} {target}"
    assert found.ids[: found.n_prompt] == encode_prompt(tokenizer, prompt)
    assert found == encode(tokenizer, prompt, " " + target)
    whole = encode_prompt(tokenizer, f"{prompt} {target}")
    if whole[: found.n_prompt] == encode_prompt(tokenizer, prompt):  # the tokenizer's own way, where it may be kept
        assert found.ids == whole


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=20), st.text(min_size=1, max_size=20), st.sampled_from(sorted(KINDS)))
def test_any_text_is_encoded_or_refused(tokenizers: dict[str, Any], prompt: str, target: str, kind: str) -> None:
    tokenizer = tokenizers[kind]
    try:
        found = encode(tokenizer, prompt, target)
    except FactsError:
        assert not prompt.strip() or not target.strip()
        return
    assert found.ids[: found.n_prompt] == encode_prompt(tokenizer, prompt)
    assert 0 < found.n_prompt < len(found.ids)
    assert list(found.positions) == list(range(found.n_prompt - 1, len(found.ids) - 1))


@pytest.mark.parametrize(
    ("prompt", "target", "wanted"),
    [
        ("a", "b", ("a", " b")),
        ("a ", "b", ("a", " b")),
        ("a", " b", ("a", " b")),
        ("a ", "\nb", ("a", "\nb")),
        ("中", "b", ("中", "b")),
        ("a", "中", ("a", "中")),
        ("中 ", "文", ("中", "文")),
        ("ก", "ข", ("ก", "ข")),
        ("é", "b", ("é", " b")),
        ("서", "울", ("서", " 울")),
        ("", "b", ("", "b")),
        ("  ", "b", ("  ", "b")),
    ],
)
def test_join_puts_a_space_where_the_script_has_one(prompt: str, target: str, wanted: tuple[str, str]) -> None:
    assert join(prompt, target) == wanted


# ---------------------------------------------------------------- edges


def test_positions_predict_the_answer() -> None:
    found = Encoded((5, 6, 7, 8, 9), 3)
    assert found.answer == (8, 9)
    assert list(found.positions) == [2, 3]
    assert [found.ids[p + 1] for p in found.positions] == [8, 9]
    assert list(Encoded((5, 6), 2).positions) == []


def test_end_of_text_is_one_more_answer_token(tokenizer: Any) -> None:
    plain = encode(tokenizer, "The capital of France is", "Paris")
    ended = encode(tokenizer, "The capital of France is", "Paris", end_of_text=True)
    assert ended.ids == (*plain.ids, tokenizer.eos_token_id)
    assert (ended.n_prompt, len(ended.positions)) == (plain.n_prompt, len(plain.positions) + 1)


def test_end_of_text_without_such_a_token_changes_nothing(tokenizer: Any) -> None:
    nameless = deepcopy(tokenizer)
    nameless.eos_token = None
    assert encode(nameless, "Snow is", "white", end_of_text=True) == encode(tokenizer, "Snow is", "white")


@pytest.mark.parametrize(("prompt", "target", "_"), CASES)
def test_a_tokenizer_that_appends_its_end_token(tokenizer: Any, prompt: str, target: str, _: Any) -> None:
    ending = appending_end(tokenizer)
    assert ending(prompt)["input_ids"][-1] == tokenizer.eos_token_id
    assert encode(ending, prompt, target) == encode(tokenizer, prompt, target)
    ended = encode(ending, prompt, target, end_of_text=True)
    assert ended.answer.count(tokenizer.eos_token_id) == 1
    assert ended.ids[-1] == tokenizer.eos_token_id


def test_special_tokens_stand_in_front_only(tokenizers: dict[str, Any]) -> None:
    llama = tokenizers["metaspace"]
    found = encode(llama, "The capital of France is", "Paris")
    assert found.ids[0] == llama.bos_token_id
    assert llama.bos_token_id not in found.ids[1:]
    assert tokenizers["bytelevel"].bos_token_id not in encode(tokenizers["bytelevel"], "Snow is", "white").ids


@pytest.mark.parametrize("target", ["", " ", "\n", "\u3000"])
def test_a_target_without_tokens_is_refused(tokenizer: Any, target: str) -> None:
    with pytest.raises(FactsError, match=r"target: .* has no tokens"):
        encode(tokenizer, "The capital of France is", target)


def test_an_empty_prompt_starts_at_the_beginning_of_text(tokenizer: Any) -> None:
    assert encode_prompt(tokenizer, "") == (tokenizer.bos_token_id,)
    found = encode(tokenizer, "", "Paris")
    assert (found.n_prompt, found.ids[0]) == (1, tokenizer.bos_token_id)
    assert text_of(tokenizer, found.ids).strip() == "Paris"


def test_a_prompt_without_tokens_is_refused(tokenizers: dict[str, Any]) -> None:
    nameless = deepcopy(tokenizers["bytelevel"])
    nameless.bos_token = None
    assert encode_prompt(nameless, "") == ()
    with pytest.raises(FactsError, match="prompt: '' has no tokens"):
        encode(nameless, "", "Paris")


class Words:
    """A tokenizer without merges of its own, whose ids for a text can be dictated."""

    bos_token_id = eos_token_id = sep_token_id = None

    def __init__(self, **ids: list[int]) -> None:
        self.ids = ids

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self.ids[text]}


def test_a_merge_across_the_boundary_does_not_change_the_prompt() -> None:
    merged = Words(**{"in": [1], "in put": [9], "A": [2], "A put": [2, 3]})
    assert encode(merged, "in", "put") == Encoded((1, 3), 1)
    always = Words(**{"in": [1], "in put": [9], "A": [2], "A put": [8], " put": [3, 4]})
    assert encode(always, "in", "put") == Encoded((1, 3, 4), 1)


# ---------------------------------------------------------------- subjects


class Slow:
    """A tokenizer that knows no offsets, with the tokens of a fast one."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.eos_token_id, self.bos_token_id, self.sep_token_id = fast.eos_token_id, fast.bos_token_id, None

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": self.fast(text)["input_ids"]}


# prompt, subject, and how many of the prompt's characters there are up to the subject's end (None: it is not there)
SUBJECTS = [
    ("Japan is", "Japan", 5),
    ("Australia's capital is", "Australia", 9),
    ("The capital of Australia is", "Australia", 24),
    ("The capital of Australia is ", "Australia", 24),
    ("The founder of Apple", "Apple", 20),
    ("Peru", "Peru", 4),
    ("The mother tongue of Danielle Darrieux is", "Danielle Darrieux", 38),
    ("the eiffel tower is located in", "The Eiffel Tower", 16),
    ("THE CAPITAL OF FRANCE IS", "France", 21),
    ("Japan is where? The capital of Japan, says Japan's king, is", "Japan", 48),
    ("Which city is the capital of France?", "France", 35),
    ("Snow is white, and Snow", "Snow", 23),
    ("Snow Snow Snow is", "Snow Snow", 14),
    ("The art of Bart is an art, says Bart", "art", 25),  # not inside a name
    ("Where is Peru: in Peruvia?", "Peru", 13),
    ("What are Perus called?", "Peru", 13),  # inside a word where there is no other
    ("Is Mr. of Mr.Peru?", "Mr.", 6),
    ("The capital of Japan is", "Japan ", 20),
    ("The capital of Japan is", " \tJapan\n", 20),
    ("La capitale du Pérou est", "PÉROU", 20),
    ("中国的首都是", "中国", 2),
    ("日本の首都は", "首都", 5),
    ("The flag of 🇵🇪 is", "🇵🇪", 14),
    ("The author of Zażółć", "zażółć", 20),
    ("Snow in İzmir, not in Peru, is", "Peru", 26),  # whose first letter is two in lower case
    ("The mayor of İzmir is", "İzmir", 18),
    ("Straße is in", "Straße", 6),
    ("The capital of Japan is", "Peru", None),
    ("The capital of Japan is", "Japan is not", None),
    ("The capital of Japan is", " ", None),
    ("The capital of Japan is", "", None),
]


def up_to(tokenizer: Any, prompt: str, characters: int) -> int:
    """Index of the first token with which the prompt's tokens spell at least that many of its characters."""
    ids = encode_prompt(tokenizer, prompt)
    wanted = prompt[:characters]
    return next(i for i in range(len(ids)) if text_of(tokenizer, ids[: i + 1]).startswith(wanted))


@pytest.mark.parametrize(("prompt", "subject", "characters"), SUBJECTS)
@pytest.mark.parametrize("wrap", [lambda fast: fast, Slow], ids=["fast", "slow"])
def test_the_token_that_ends_the_subject(
    tokenizer: Any, wrap: Any, prompt: str, subject: str, characters: int | None
) -> None:
    """The token that completes the subject's last mention, found by offsets and without them."""
    found = subject_end(wrap(tokenizer), prompt, subject, encode_prompt(tokenizer, prompt))
    assert found == (None if characters is None else up_to(tokenizer, prompt, characters))


@pytest.mark.parametrize(
    ("kind", "prompt", "subject", "tokens", "place"),
    [
        ("bytelevel", "Peru is", "Peru", "P eru Ġis", 1),
        ("bytelevel", "The language of Peru is", "Peru", "The Ġlanguage Ġof ĠPeru Ġis", 3),
        ("bytelevel", "It is Tokyo", "tokyo", "It Ġis ĠTokyo", 2),
        ("bytelevel", "Danielle Darrieux is", "Danielle Darrieux", "D anie lle ĠD arrie ux Ġis", 5),
        ("bytelevel", "It is", "It", "It Ġis", 0),
        ("metaspace", "Peru is", "Peru", "<s> ▁Peru ▁is", 1),
        ("metaspace", "The language of Peru is", "Peru", "<s> ▁The ▁language ▁of ▁Peru ▁is", 4),
        ("metaspace", "It is Tokyo", "tokyo", "<s> ▁It ▁is ▁Tok y o", 5),
        ("metaspace", "Danielle Darrieux is", "Danielle Darrieux", "<s> ▁Danie lle ▁Darrie ux ▁is", 4),
    ],
)
def test_subjects_by_their_tokens(
    tokenizers: dict[str, Any], kind: str, prompt: str, subject: str, tokens: str, place: int
) -> None:
    """Written out: at the start, in the middle and at the end, of one token and of several."""
    ids = encode_prompt(tokenizers[kind], prompt)
    assert tokenizers[kind].convert_ids_to_tokens(ids) == tokens.split()
    assert subject_end(tokenizers[kind], prompt, subject, ids) == place
    assert subject_end(Slow(tokenizers[kind]), prompt, subject, ids) == place


@pytest.mark.parametrize(("prompt", "subject", "characters"), SUBJECTS)
def test_an_encoded_fact_knows_its_subject(tokenizer: Any, prompt: str, subject: str, characters: int | None) -> None:
    found = encode(tokenizer, prompt, "Rome", end_of_text=True, subject=subject)
    assert found.subject == subject_end(tokenizer, prompt, subject, encode_prompt(tokenizer, prompt))
    assert found.subject is None or 0 <= found.subject < found.n_prompt
    bare = encode(tokenizer, prompt, "Rome", end_of_text=True)
    assert bare.subject is None
    assert (bare.ids, bare.n_prompt) == (found.ids, found.n_prompt)


@pytest.mark.parametrize(("prompt", "subject", "characters"), SUBJECTS)
def test_an_end_token_behind_the_prompt_hides_no_subject(
    tokenizer: Any, prompt: str, subject: str, characters: int | None
) -> None:
    ids = encode_prompt(tokenizer, prompt)
    for ending in (appending_end(tokenizer), Slow(appending_end(tokenizer))):
        assert subject_end(ending, prompt, subject, ids) == subject_end(tokenizer, prompt, subject, ids)


@settings(max_examples=150, deadline=None)
@given(PHRASES, PHRASES, PHRASES, st.sampled_from(sorted(KINDS)), st.booleans())
def test_fast_and_slow_tokenizers_agree(
    tokenizers: dict[str, Any], before: str, subject: str, after: str, kind: str, swap: bool
) -> None:
    tokenizer = tokenizers[kind]
    prompt = f"{before} {subject} {after}"
    ids = encode_prompt(tokenizer, prompt)
    found = subject_end(tokenizer, prompt, subject.swapcase() if swap else subject, ids)
    assert found is not None
    assert subject.lower() in text_of(tokenizer, ids[: found + 1]).lower()
    if prompt.lower().rfind(subject.lower()) == len(before) + 1:  # others may end in the middle of a token
        assert text_of(tokenizer, ids[: found + 1]) == f"{before} {subject}"
        assert subject_end(Slow(tokenizer), prompt, subject, ids) == found


@given(st.text(max_size=30), st.text(max_size=8), st.sampled_from(sorted(KINDS)), st.booleans())
@settings(max_examples=150, deadline=None)
def test_any_subject_is_found_in_the_prompt_or_not_at_all(
    tokenizers: dict[str, Any], prompt: str, subject: str, kind: str, slow: bool
) -> None:
    tokenizer = Slow(tokenizers[kind]) if slow else tokenizers[kind]
    ids = encode_prompt(tokenizer, prompt)
    found = subject_end(tokenizer, prompt.rstrip(), subject, ids)
    assert found is None or 0 <= found < len(ids)


@pytest.mark.parametrize("bad", [1, 3, 25])
def test_every_fact_that_cannot_be_encoded_is_named_up_to_twenty(tokenizer: Any, bad: int) -> None:
    facts = [Fact(f"f{i}", "Snow is", " " if i % 2 else "white") for i in range(2 * bad)]
    with pytest.raises(FactsError) as raised:
        encode_each(facts, lambda fact: encode(tokenizer, fact.prompt, fact.target))
    assert raised.value.total == bad
    named = [f"fact f{2 * i + 1}:target: ' ' has no tokens for this tokenizer" for i in range(min(bad, 20))]
    assert list(map(str, raised.value.problems)) == named
    assert encode_each(facts[::2], lambda fact: fact.id) == [fact.id for fact in facts[::2]]


# ---------------------------------------------------------------- batches


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 10))
def test_batches_hold_everything_once_longest_first(lengths: list[int], batch_size: int) -> None:
    batches = list(by_length(lengths, batch_size))
    order = [i for batch in batches for i in batch]
    assert sorted(order) == list(range(len(lengths)))
    assert [lengths[i] for i in order] == sorted(lengths, reverse=True)
    sizes = [len(batch) for batch in batches]
    assert len(sizes) == -(-len(lengths) // batch_size)  # no more than there have to be
    assert not sizes or (max(sizes) <= batch_size and max(sizes) - min(sizes) <= 1)
    assert order == sorted(order, key=lambda i: (-lengths[i], i))
