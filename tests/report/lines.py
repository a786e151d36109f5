"""Result lines as a decode run writes them, but without a run; `test_page_of_a_run` compares the keys."""

from __future__ import annotations

from html.parser import HTMLParser

EVIL = "<script>alert('x')</script> & \"$\\frac{$ --> ]]>"


def edit(**changes) -> dict:
    return {
        "position": 3,
        "old_token": "7",
        "new_token": "<8>",
        "reward_before": -1.0,
        "reward_after": 0.126,
        "energy_before": 4.0,
        "energy_after": 3.0,
        "accepted": True,
        "gradient_norm": 0.5,
        "entropy": 0.1,
        "score": None,
        **changes,
    }


def line(key: str = "p0", decoder: str = "greedy", **changes) -> dict:
    return {
        "id": key,
        "decoder": decoder,
        "config": "0" * 12,
        "prompt": f"2 < {key}?",
        "completion": f"{decoder} says yes",
        "answer": "yes",
        "expected": "yes & no",
        "correct": False,
        "finished": True,
        "reward": 1.0,
        "gold_reward": None,
        "logps": -2.0,
        "energy": 1.0,
        "ids": [7, 8],
        "rollouts": [{"text": "yes", "reward": 1.0, "logps": -2.0}],
        "proposals": 0,
        "accepted": 0,
        "counts": {},
        "proposal_kl": None,
        "trace": [],
        "curve": [[1, 2e9, 3, 0.1, 0]],
        "cost": {
            "policy_calls": 10,
            "reward_calls": 4,
            "sequential_calls": 14,
            "tokens": 30,
            "flops": 2e9,
            "cached_steps": 0,
            "rows": [],
        },
        "seconds": 0.5,
        **changes,
    }


class Page(HTMLParser):
    """Tags opened and closed, their attributes, and the text between; `pres` has the text of each <pre>."""

    VOID = {"meta", "br", "hr", "img", "link", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.pres, self.cells = "", [], []
        self.feed(text)
        self.close()
        assert not self.open
        # a browser drops the first line break of a <pre>
        self.pres = [pre.removeprefix("\n") for pre in self.pres]

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "pre":
            self.pres.append("")
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if "pre" in self.open:
            self.pres[-1] += data
        if self.open and self.open[-1] in ("th", "td"):
            self.cells[-1] += data
