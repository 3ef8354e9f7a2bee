"""Fixtures of the world's tests: a world, and words for hand-written prompts and responses about it."""

import pytest

from rlhf.world.facts import ATTRIBUTES, World


@pytest.fixture(scope="session")
def world() -> World:
    return World(1)


@pytest.fixture(scope="session")
def words(world: World) -> dict[str, str]:
    """{a} and {b}: creatures, {p} and {q}: people; {color} {home} {food} {sound}: facts of {a}; {no_color} ...: false
    for {a}; {b_color} ...: facts of {b}, false for {a}.
    """
    first = world.creatures[100]
    second = next(name for name in world.creatures[101:]
                  if all(world.facts[name][key] != world.facts[first][key] for key in ATTRIBUTES))
    words = {"a": first, "b": second, "p": world.people[30], "q": world.people[31]}
    for key, values in ATTRIBUTES.items():
        words[key], words[f"b_{key}"] = world.facts[first][key], world.facts[second][key]
        words[f"no_{key}"] = next(value for value in values if value not in (words[key], words[f"b_{key}"]))
    return words
