"""Decoding a real model with drafted tokens against the same without: an answer that repeats its prompt, and one that
doesn't.

    python benchmarks/speculation.py [--dtype bfloat16] [--tp 2] [--draft FOLDER] [--draft-tokens 7]

All alternate in one run; figures are medians. The bound is that a step takes as long as a plain one, however many
tokens it runs: tokens ÷ steps.
"""

from __future__ import annotations

import argparse
import os
import statistics
from typing import Any

import multicard as mc
from common import report

TEXT = (
    "The harbour master keeps a ledger of every vessel that enters: its name, its flag, the hour of its arrival, the "
    "depth of its keel and the number of its crew. On Mondays the ledger is copied by hand, and the copy is carried to "
    "the lighthouse, where the keeper compares it with a list of his own and marks whatever differs in red ink."
)
TASKS = {
    "repeats its prompt": f"{TEXT}\n\nRepeat the text above.",
    "is new": "Write a short story about a lighthouse keeper.",
}


def contestants(args: argparse.Namespace) -> dict[str, mc.LLM]:
    threads = args.threads or max(1, len(os.sched_getaffinity(0)) // args.tp)
    loading: dict[str, Any] = {"tp": args.tp, "dtype": args.dtype, "threads_per_rank": threads}
    loading["compile"] = not args.uncompiled
    drafts = [None, "prompt", *([args.draft] if args.draft else [])]
    return {
        f"draft={draft}": mc.LLM(args.model, draft=draft, draft_tokens=args.draft_tokens, **loading) for draft in drafts
    }


def measure(running: dict[str, mc.LLM], task: str, new: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant."""
    answers: dict[str, list[mc.Generation]] = {who: [] for who in running}
    for round_ in range(rounds + 1):
        for who, llm in running.items():
            answer = llm.generate(TASKS[task], max_new_tokens=new)
            if round_:  # the first warms up
                answers[who].append(answer)
    plain, rows = None, []
    for who, each in answers.items():
        answer, seconds = each[0], statistics.median(answer.timings["decode"] for answer in each)
        count = len(answer.token_ids) - 1
        plain = plain or (answer.token_ids, seconds)
        rows.append(
            {
                "answer": task,
                "who": who,
                "tokens": count + 1,
                "ms/token": seconds / count * 1e3,
                "× plain": plain[1] / seconds,
                "bound": count / (count - answer.accepted),
                "drafted": answer.drafted,
                "accepted": answer.accepted / answer.drafted if answer.drafted else None,
                "same tokens": answer.token_ids == plain[0],
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/smollm2")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--tp", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="for each rank; 0: the cores divided by the ranks")
    parser.add_argument("--draft", help="a smaller checkpoint's folder, beside looking up")
    parser.add_argument("--draft-tokens", type=int, default=7)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--uncompiled", action="store_true", help="with compile=False")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    running = contestants(args)
    try:
        rows = [row for task in TASKS for row in measure(running, task, args.new, args.rounds)]
    finally:
        for llm in running.values():
            llm.close()
    about = {"model": args.model, "dtype": args.dtype, "tp": args.tp, "draft_tokens": args.draft_tokens}
    report(rows, args.json, **about, rounds=args.rounds, compile=not args.uncompiled)


if __name__ == "__main__":
    main()
