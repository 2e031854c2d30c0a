"""The caller: imports the stubs and calls them. Types and results are those that the stubs declare."""

from __future__ import annotations

from examples.remote_call.remote_call import longest, score, scored, weigh

TEXTS = ["alpha", "beta", "gamma", "delta", "omega"]


def main() -> None:
    """The entry of the role "player"."""
    judges: list[str] = weigh("a", 2.0)
    print("judges:", ", ".join(judges))

    scores = score(
        TEXTS, wanted="aeo"
    )  # comes back at once; each item is there when its judge has it
    for text, points in zip(TEXTS, scores, strict=True):
        print(f"{text}: {points:g}")

    print("longest:", longest.options(timeout=30, idempotent=True)(TEXTS))
    print("scored by the first judge:", scored.future().result(timeout=30))
