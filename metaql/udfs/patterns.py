"""The vector space of a store's gradients, and its parts named by patterns over parameter names.

A pattern is a shell glob (``*``, ``?``, ``[abc]``) that matches a parameter's whole name, ``fc1.weight``; the
name of a module that holds it, ``fc1``, stands for all its parameters. Patterns joined by ``|`` select what any
of them selects, and those joined by `` & `` what all of them select; ``|`` binds more tightly.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from metaql.errors import QueryError, UnknownNameError
from metaql.storage.schema import Layer

AND, OR = " & ", " | "


@dataclass(frozen=True)
class Chosen:
    """Some parameters of a layer, by their place in ``layer.parameters``."""

    layer: Layer
    places: tuple[int, ...]

    @property
    def whole(self) -> bool:
        """Whether these are all the layer's parameters."""
        return len(self.places) == len(self.layer.parameters)


@dataclass(frozen=True)
class Term:
    """A layer of one space beside the layer of another that holds the same parameters.

    ``places`` pairs the places of a parameter in the one and in the other.
    """

    left: Layer
    right: Layer
    places: tuple[tuple[int, int], ...]

    @cached_property
    def by_factors(self) -> bool:
        """Whether samples of the one layer can be multiplied with samples of the other by their factors."""
        left, right = self.left, self.right
        alike = left is right or (
            (left.kind, left.groups, left.parameters[0].shape) == (right.kind, right.groups, right.parameters[0].shape)
        )
        return alike and left.input_width is not None and all(place == other for place, other in self.places)

    @cached_property
    def weight(self) -> bool:
        """Whether the left layer's first parameter counts."""
        return any(place == 0 for place, _ in self.places)

    @cached_property
    def bias(self) -> bool:
        """Whether the left layer's second parameter counts."""
        return any(place == 1 for place, _ in self.places)


class Space:
    """All recorded parameters of a model, in the order in which a gradient is laid out."""

    def __init__(self, layers: tuple[Layer, ...]) -> None:
        self.layers = layers
        self._selections: dict[str, tuple[Chosen, ...]] = {}
        self._terms: dict[tuple[str, int, str], tuple[Space, tuple[Term, ...]]] = {}
        self._home = {
            parameter.name: (layer, place) for layer in layers for place, parameter in enumerate(layer.parameters)
        }

    def select(self, pattern: str) -> tuple[Chosen, ...]:
        """What the pattern selects, layer by layer; ``''`` selects everything.

        Raises UnknownNameError when one of the globs matches no parameter.
        """
        if pattern not in self._selections:
            self._selections[pattern] = self._select(pattern)
        return self._selections[pattern]

    def shared(self, pattern: str, other: Space, other_pattern: str) -> tuple[Term, ...]:
        """The layers of both selections' intersection, side by side.

        A vector is zero outside its selection, so only the intersection counts in an inner product. Raises
        QueryError when one space lacks a parameter of it, or has it in another shape: such gradients are of
        different models.
        """
        key = (pattern, id(other), other_pattern)
        if key not in self._terms:
            # The other space is kept with its terms, so that its id can't be given to another meanwhile.
            self._terms[key] = (other, self._shared(pattern, other, other_pattern))
        return self._terms[key][1]

    def _select(self, pattern: str) -> tuple[Chosen, ...]:
        globs = pattern.split(AND) if pattern else []
        for glob in (one for each in globs for one in alternatives(each)):
            if not any(matches(glob, name) for name in self._home):
                raise UnknownNameError(self._unknown(glob))
        chosen = []
        for layer in self.layers:
            places = tuple(
                place
                for place, parameter in enumerate(layer.parameters)
                if all(matches(glob, parameter.name) for glob in globs)
            )
            if places:
                chosen.append(Chosen(layer, places))
        return tuple(chosen)

    def _unknown(self, glob: str) -> str:
        names = ", ".join(parameter.name for layer in self.layers for parameter in layer.parameters)
        return f"no recorded parameter matches the layer pattern '{glob}'. Recorded are: {names}"

    def _shared(self, pattern: str, other: Space, other_pattern: str) -> tuple[Term, ...]:
        mine, theirs = self.select(pattern), other.select(other_pattern)
        if other is self:
            return _intersect(mine, theirs)
        wanted = {name for name in _names(mine) if all(matches(g, name) for g in _globs(other_pattern))}
        wanted |= {name for name in _names(theirs) if all(matches(g, name) for g in _globs(pattern))}
        pairs: dict[tuple[str, str], list[str]] = {}
        for name in (name for name in self._home if name in wanted):
            self._check(name, other)
            pairs.setdefault((self._home[name][0].name, other._home[name][0].name), []).append(name)
        for name in wanted - self._home.keys():
            other._check(name, self)
        return tuple(
            Term(
                self._home[names[0]][0],
                other._home[names[0]][0],
                tuple((self._home[name][1], other._home[name][1]) for name in names),
            )
            for names in pairs.values()
        )

    def _check(self, name: str, other: Space) -> None:
        if name not in other._home:
            raise QueryError(
                f"these gradients are over different parameters: '{name}' is recorded in one of the two stores"
                " and not in the other. Restrict both to what they share, for instance"
                " inner_product(layers(g, 'fc1'), layers(h, 'fc1'))"
            )
        (layer, place), (layer_there, place_there) = self._home[name], other._home[name]
        here, there = layer.parameters[place].shape, layer_there.parameters[place_there].shape
        if here != there:
            raise QueryError(
                f"these gradients are of different models: '{name}' has shape {here} in one store"
                f" and {there} in the other"
            )


def alternatives(globs: str) -> list[str]:
    """Those joined by ``|``, with or without spaces around it."""
    return [each.strip() for each in globs.split("|")]


def matches(globs: str, name: str) -> bool:
    """Whether one of the globs, joined by ``|``, matches a parameter's name, or that of a module that holds it."""
    parts = name.split(".")
    names = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    return any(fnmatchcase(each, glob) for glob in alternatives(globs) for each in names)


def _globs(pattern: str) -> list[str]:
    return pattern.split(AND) if pattern else []


def _names(selection: tuple[Chosen, ...]) -> list[str]:
    return [chosen.layer.parameters[place].name for chosen in selection for place in chosen.places]


def _intersect(mine: tuple[Chosen, ...], theirs: tuple[Chosen, ...]) -> tuple[Term, ...]:
    places = {chosen.layer.name: set(chosen.places) for chosen in theirs}
    terms = []
    for chosen in mine:
        common = [place for place in chosen.places if place in places.get(chosen.layer.name, ())]
        if common:
            terms.append(Term(chosen.layer, chosen.layer, tuple((place, place) for place in common)))
    return tuple(terms)
