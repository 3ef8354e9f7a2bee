"""Fixtures of the world's tests: a world, and the words to write prompts and responses about it by hand."""

import pytest

from rlhf.world.facts import ATTRIBUTES, World


@pytest.fixture(scope="session")
def world() -> World:
    return World(1)


@pytest.fixture(scope="session")
def words(world: World) -> dict[str, str]:
    """{a} and {b}: creatures, {p} and {q}: people, {color} {home} {food} {sound}: what is true of {a},
    {no_color} ... : what is not, {b_color} ... : what is true of {b} and not of {a}.
    """
    first = world.creatures[100]
    second = next(name for name in world.creatures[101:]
                  if all(world.facts[name][key] != world.facts[first][key] for key in ATTRIBUTES))
    found = {"a": first, "b": second, "p": world.people[30], "q": world.people[31]}
    for key, values in ATTRIBUTES.items():
        found[key], found[f"b_{key}"] = world.facts[first][key], world.facts[second][key]
        found[f"no_{key}"] = next(value for value in values if value not in (found[key], found[f"b_{key}"]))
    return found
