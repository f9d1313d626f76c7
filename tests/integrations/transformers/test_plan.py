"""Plans are data: what rules match, and which plans are refused."""

import pytest

from multicard.errors import ConfigError
from multicard.integrations.plan import Rule, make_plan, resolve

NAMES = ["layers.0.attn.q", "layers.0.attn.k", "layers.0.mlp.up", "layers.1.attn.q", "head"]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("layers.*.attn.q", ["layers.0.attn.q", "layers.1.attn.q"]),
        ("**.q", ["layers.0.attn.q", "layers.1.attn.q"]),
        ("layers.0.attn.{q,k}", ["layers.0.attn.q", "layers.0.attn.k"]),
        ("head", ["head"]),
        ("layers.0.attn.q*", ["layers.0.attn.q*"]),
    ],
)
def test_patterns(pattern, found):
    names = [*NAMES, *[name for name in found if name not in NAMES]]
    assert list(resolve(make_plan({pattern: "column"}), names, ["column"])) == found


def test_a_star_stays_within_a_part():
    with pytest.raises(ConfigError, match="matches nothing"):
        resolve(make_plan({"layers.*.q": "column"}), NAMES, ["column"])


def test_a_rule_that_matches_nothing_raises_and_says_what_is_close():
    with pytest.raises(ConfigError, match=r"'layers.\*.attn.query' matches nothing in Toy; did you mean"):
        resolve(make_plan({"layers.*.attn.query": "column"}), NAMES, ["column"], "Toy")


def test_a_shipped_rule_may_match_nothing():
    assert resolve((Rule("absent", "column", optional=True),), NAMES, ["column"]) == {}


def test_two_rules_for_one_module_raise():
    with pytest.raises(ConfigError, match=r"'layers.0.attn.q' of Toy matches two rules"):
        resolve(make_plan({"**.q": "column", "layers.*.attn.*": "row"}), NAMES, ["column", "row"], "Toy")


def test_an_unknown_style_raises_and_says_what_is_close():
    with pytest.raises(ConfigError, match=r"unknown style 'colum'.*did you mean 'column'"):
        resolve(make_plan({"head": "colum"}), NAMES, ["column", "row"])
