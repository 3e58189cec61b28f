"""From an expression over gradients to a sum of terms: the inner product is bilinear, and so is a product of numbers.

    (a + b)·c = a·c + b·c        ⟨u + w·v, h⟩ = ⟨u, h⟩ + w·⟨v, h⟩        cos(u, v) = ⟨u, v⟩ / (‖u‖·‖v‖)

A term is as small as it gets, except that a sum of numbers is one factor as long as it reads one relation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

from sqlglot import exp

from metaql.logical import Precondition, Scalar, Term, Vector
from metaql.methods.solvers import LISSA
from metaql.rules.gather_side import applied
from metaql.scope import Scope, Unsure, name_of
from metaql.udfs.precondition import MACRO as PRECONDITION
from metaql.udfs.score import SCORE

PRODUCTS = frozenset({"inner_product", "cosine_similarity", SCORE})
# A product of sums has as many terms as the product of their lengths.
MOST_TERMS = 64
_MIXED = "an expression mixes the gradients with something that is not linear in them"


def is_product(node: exp.Expr) -> bool:
    """Whether it is an inner product or a cosine of two gradients."""
    return isinstance(node, exp.Anonymous) and name_of(node) in PRODUCTS and len(node.expressions) >= 2


def holds_product(node: exp.Expr) -> bool:
    """Whether a product of gradients is computed in it, in this query or in one further inside."""
    return any(is_product(one) for one in node.walk())


def precondition_of(node: exp.Expr) -> Precondition | None:
    """A call of precondition(…) whose method is surely not NULL, and whose arguments are the same for every row."""
    if not isinstance(node, exp.Anonymous) or name_of(node) != PRECONDITION or len(node.expressions) < 2:
        return None
    method, *others = node.expressions[1:]
    if not (isinstance(method, exp.Literal) and method.is_string) or any(
        one.find(exp.Column, exp.Query) for one in others
    ):
        return None
    # Single batches of random data, one after another, do not commute.
    return Precondition((method, *others), symmetric=method.name != LISSA)


def expand(node: exp.Expr, scope: Scope) -> tuple[Term, ...]:
    """An expression as a sum of terms; Unsure where it is not linear in its products."""
    terms = _Expansion(scope).terms(node)
    if len(terms) > MOST_TERMS:
        raise Unsure("multiplied out, the expression has too many terms")
    if len({len(term.vectors) for term in terms}) > 1 and any(len(term.vectors) == 1 for term in terms):
        raise Unsure(_MIXED)
    return tuple(terms)


class _Expansion:
    def __init__(self, scope: Scope) -> None:
        self._scope = scope

    def terms(self, node: exp.Expr) -> list[Term]:
        node = bare(node)
        if is_product(node):
            return self._product(node)
        if isinstance(node, exp.Neg):
            return _times([Term((self._number("-1"),))], self.terms(node.this))
        if self._scope.is_vector(node) and not isinstance(node, exp.Add | exp.Sub | exp.Mul | exp.Div):
            return self._combination(node)
        if isinstance(node, exp.Case):
            return self._case(node)
        if self._is_scalar(node) and len(self._scope.reads(node)) < 2:
            return [Term((self._scalar(node),))]
        return self._compound(node)

    def _compound(self, node: exp.Expr) -> list[Term]:
        if isinstance(node, exp.Mul):
            return _times(self.terms(node.left), self.terms(node.right))
        if isinstance(node, exp.Add):
            return self.terms(node.left) + self.terms(node.right)
        if isinstance(node, exp.Sub):
            return self.terms(node.left) + _times([Term((self._number("-1"),))], self.terms(node.right))
        if isinstance(node, exp.Div) and self._is_scalar(node.right) and self._divides_evenly(node):
            return _times(self.terms(node.left), self._inverse(node.right))
        if self._is_scalar(node):
            return [Term((self._scalar(node),))]
        raise Unsure(_MIXED)

    def _divides_evenly(self, node: exp.Div) -> bool:
        """Whether a/b is a·(1/b): of whole numbers it may not be, by a setting of DuckDB."""
        if not self._is_scalar(node.left) or self._scope.is_vector(node.left):
            return True
        types = {kind for one in node.find_all(exp.Column) for kind in self._scope.types(one)}
        return bool(types & {"DOUBLE", "FLOAT"})

    def _inverse(self, node: exp.Expr) -> list[Term]:
        """1/(a·b) as 1/a · 1/b, so that each factor reads as little as it can."""
        node = bare(node)
        if isinstance(node, exp.Mul):
            return _times(self._inverse(node.left), self._inverse(node.right))
        one = exp.cast(exp.Literal.number(1), "DOUBLE")
        return [Term((self._scalar(exp.Div(this=one, expression=exp.paren(node.copy()))),))]

    def _product(self, node: exp.Expr) -> list[Term]:
        left, right = (self._combination(one) for one in node.expressions[:2])
        products = [Term(a.factors + b.factors, a.vectors + b.vectors) for a in left for b in right]
        if name_of(node) == "cosine_similarity":
            lengths = [self._inverse_length(one) for one in node.expressions]
            products = _times([Term(tuple(lengths))], products)
        return products

    def _inverse_length(self, node: exp.Expr) -> Scalar:
        """1/‖g‖; NULL for a zero vector, as its cosine is."""
        length = exp.Anonymous(this="norm", expressions=[node.copy()])
        number = exp.Nullif(this=length, expression=exp.Literal.number(0))
        return self._scalar(exp.Div(this=exp.cast(exp.Literal.number(1), "DOUBLE"), expression=number))

    def _combination(self, node: exp.Expr) -> list[Term]:
        """A gradient as a linear combination; restrictions and preconditioners are linear."""
        node = bare(node)
        if isinstance(node, exp.Neg | exp.Add | exp.Sub | exp.Mul | exp.Div):
            combined = self.terms(node)
            if any(len(term.vectors) != 1 for term in combined):
                raise Unsure(_MIXED)
            return combined
        if isinstance(node, exp.Anonymous) and name_of(node) == "layers" and len(node.expressions) == 2:
            pattern = self._scalar(node.expressions[1])
            return self._changed(node, partial(_restricted, pattern=pattern))
        precondition = precondition_of(node)
        if precondition is not None:
            return self._changed(node, partial(_preconditioned, precondition=precondition))
        return [Term((), (Vector(self._scope.qualified(node), self._scope.reads(node)),))]

    def _changed(self, call: exp.Expr, change: Callable[[Vector], Vector]) -> list[Term]:
        """The vectors of a call's first argument, changed."""
        inner = self._combination(call.expressions[0])
        return [Term(term.factors, tuple(map(change, term.vectors))) for term in inner]

    def _case(self, node: exp.Case) -> list[Term]:
        """CASE WHEN c THEN x END => (CASE WHEN c THEN 1 END)·x: both are NULL where c is not true."""
        ifs = node.args["ifs"]
        otherwise = node.args.get("default")
        plain = self._is_scalar(node)
        if node.this or len(ifs) != 1 or not (otherwise is None or isinstance(otherwise, exp.Null)):
            if not plain:
                raise Unsure("a CASE with several outcomes")
            return [Term((self._scalar(node),))]
        if plain and len(self._scope.reads(node)) < 2:
            return [Term((self._scalar(node),))]
        condition, value = ifs[0].this, ifs[0].args["true"]
        conjuncts = condition.flatten() if isinstance(condition, exp.And) else (condition,)
        one = exp.Literal.number(1)
        tests = [exp.Case(ifs=[exp.If(this=each.copy(), true=one.copy())]) for each in conjuncts]
        return _times([Term(tuple(self._scalar(test) for test in tests))], self.terms(value))

    def _is_scalar(self, node: exp.Expr) -> bool:
        """No product of gradients in it, and not a gradient: a number like any other."""
        return not holds_product(node) and not any(self._scope.is_vector(one) for one in _operands(node))

    def _scalar(self, node: exp.Expr) -> Scalar:
        return Scalar(self._scope.qualified(node), self._scope.reads(node))

    def _number(self, text: str) -> Scalar:
        return Scalar(exp.Literal.number(text), frozenset())


def bare(node: exp.Expr) -> exp.Expr:
    """Without parentheses, and without a cast to what an inner product is anyway."""
    while isinstance(node, exp.Paren) or (
        isinstance(node, exp.Cast)
        and not isinstance(node, exp.TryCast)
        and node.to.is_type("double")
        and holds_product(node)
    ):
        node = node.this
    return node


def _operands(node: exp.Expr) -> Iterator[exp.Expr]:
    """The node and what arithmetic combines in it; functions of gradients are numbers."""
    yield node
    if isinstance(node, exp.Binary | exp.Paren | exp.Neg | exp.Case):
        for child in node.iter_expressions():
            yield from _operands(child)


def _restricted(vector: Vector, pattern: Scalar) -> Vector:
    return replace(vector, patterns=(*vector.patterns, pattern))


def _preconditioned(vector: Vector, precondition: Precondition) -> Vector:
    """What is done to the vector before can't be done after."""
    if vector.patterns or vector.precondition:
        vector = Vector(applied(vector.sql, vector.precondition, vector.patterns), vector.all_reads)
    return replace(vector, precondition=precondition)


def _times(left: list[Term], right: list[Term]) -> list[Term]:
    """The terms of a product of numbers, of which one may have gradients in it."""
    if any(a.vectors and b.vectors for a in left for b in right) or len(left) * len(right) > MOST_TERMS:
        raise Unsure(_MIXED)
    return [Term(a.factors + b.factors, a.vectors + b.vectors) for a in left for b in right]
