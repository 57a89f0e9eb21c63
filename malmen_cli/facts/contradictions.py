"""Facts that contradict each other by meaning: one subject, one relation, two targets, in whatever spelling."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from malmen_cli.facts.fact import Fact

# Of sentences, not of names: C++, C# and 5 - 3 keep theirs.
_NOISE = re.compile(r"""[.,;:!?"'`“”‘’«»()\[\]{}…_、。，；：？！「」]+""")


def contradictions(facts: Iterable[Fact]) -> Iterator[tuple[Fact, Fact]]:
    """Every fact that says otherwise than an earlier one, with the first such one.

    Two facts are of one relation where a prompt or rephrase of one is a prompt or rephrase of the other, but for
    capitals, white space and punctuation; equal prompts are refused by the readers already.
    """
    said: dict[tuple[str, str], Fact] = {}
    for fact in facts:
        keys = {_relation(fact, wording) for wording in (fact.prompt, *fact.rephrases)}
        known = (said[key] for key in sorted(keys) if key in said)
        earlier = next((one for one in known if _plain(one.target) != _plain(fact.target)), None)
        if earlier is not None:
            yield earlier, fact
        for key in keys:
            said.setdefault(key, fact)


def _relation(fact: Fact, wording: str) -> tuple[str, str]:
    """(subject, what is asked of it)."""
    asked, subject = _plain(wording), _plain(fact.subject or "")
    return (subject, asked.replace(subject, "\0", 1)) if subject and subject in asked else ("", asked)


def _plain(text: str) -> str:
    return " ".join(_NOISE.sub(" ", text.casefold()).split())
