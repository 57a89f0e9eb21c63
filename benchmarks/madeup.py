"""Made-up facts from templates, and a random model: benchmarks of time and memory that need no data at all."""

from __future__ import annotations

from collections.abc import Iterator

from malmen_cli.facts.fact import Fact, Probe

# Of unequal length, as real prompts are: (prompt, rephrase, kind of subject).
TEMPLATES = (
    ("The capital of {} is", "{}'s capital is the city of", "Place"),
    ("The mother tongue of {} is", "At home, {} spoke", "Person"),
    ("{} was founded by", "The founder of {} was called", "Works"),
    ("The company that first developed {} was", "{} is a product of", "Engine"),
    ("The sport that {} plays professionally is", "As an athlete {} is known for", "Player"),
)
SYLLABLES = ("ka", "lo", "mi", "ren", "tus", "vo", "sha", "bel", "dor", "wi")
TARGETS = ("Canberra", "French", "Steve Jobs", "Nintendo", "basketball", "the river Po", "Sweden")


def made_up(count: int, start: int = 0) -> Iterator[Fact]:
    """`count` facts, each with a subject of its own, one rephrase and one locality probe."""
    for i in range(start, start + count):
        prompt, rephrase, kind = TEMPLATES[i % len(TEMPLATES)]
        subject = f"{kind} {_name(i)}"
        probe = Probe(f"The river that flows through {_name(i + 7)}ia is the")
        target = TARGETS[i % len(TARGETS)]
        yield Fact(f"m{i}", prompt.format(subject), target, subject, None, (rephrase.format(subject),), (probe,))


def _name(number: int) -> str:
    """A name that no other number has."""
    name = ""
    while True:
        number, digit = divmod(number, len(SYLLABLES))
        name += SYLLABLES[digit]
        if not number:
            return name.capitalize()
