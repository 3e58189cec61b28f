"""What a planned query will do, as a tree: which rows are read, what is gathered, and how each layer is scored.

It is read off the compiled syntax tree, so that it shows what runs and not what was meant to.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from sqlglot import exp

from metaql.algebra import bare
from metaql.bind import aggregates_of, bind
from metaql.catalogue import Catalogue, alias_of, ancestors, cte_of, visible_ctes
from metaql.cost import joined
from metaql.logical import Block, Gather, Relation
from metaql.pairs import HITS, LIST, LISTS, PAIRS
from metaql.parse import to_sql
from metaql.readable import NAMES, gathers, readable, short, vector_text
from metaql.scanned import SCANNED
from metaql.scope import Scope, Unsure, name_of
from metaql.stats import ONE, UNKNOWN, Count, Statistics, statistics_of
from metaql.udfs.best import BEST
from metaql.udfs.precondition import MACRO as PRECONDITION
from metaql.udfs.score import SCORE
from metaql.udfs.scores import SCORES

_PRODUCTS = frozenset({"inner_product", "cosine_similarity", SCORE})
_TILES = frozenset({SCORES, BEST})


@dataclass(frozen=True)
class Operand:
    """One side of a product: so many different gradients, each the sum of ``gathered`` samples (1 for a sample;
    unknown too for what is laid out in any case)."""

    text: str
    rows: Count
    gathered: Count
    patterns: tuple[str, ...] = ()


@dataclass(frozen=True)
class Score:
    """Products of gradients that a node computes: for ``rows`` pairs of its operands."""

    function: str
    left: Operand
    right: Operand | None
    rows: Count
    tiles: bool = False
    scan: bool = False


@dataclass(frozen=True)
class Node:
    """A step of the plan, with how many rows it yields; ``query`` counts them, for EXPLAIN ANALYZE."""

    text: str
    rows: Count = UNKNOWN
    score: Score | None = None
    children: tuple[Node, ...] = ()
    query: str | None = None


def physical(tree: exp.Expr, catalogue: Catalogue) -> Node:
    """The plan of a compiled statement."""
    return _Reader(catalogue).statement(tree)


@dataclass
class _Reader:
    catalogue: Catalogue
    _seen: dict[str, Count] = field(default_factory=dict)

    def statement(self, tree: exp.Expr) -> Node:
        if isinstance(tree, exp.Query):
            return self.query(tree)
        query = tree.find(exp.Query)
        written = tree.copy()
        inner = written.find(exp.Query)
        if query is None or inner is None:
            return Node(short(to_sql(tree)))
        inner.replace(exp.var("…"))
        return Node(short(to_sql(written)), children=(self.query(query),))

    def query(self, query: exp.Expr) -> Node:
        if isinstance(query, exp.Subquery):
            return self.query(query.this)
        if isinstance(query, exp.Select):
            return self.select(query)
        if isinstance(query, exp.SetOperation):
            kind = type(query).__name__ + ("" if query.args.get("distinct") else " all")
            return Node(kind.capitalize(), children=(self.query(query.this), self.query(query.expression)))
        return Node(short(to_sql(query)))

    def select(self, select: exp.Select) -> Node:
        """From the last step to the first."""
        block, statistics = self._block(select), statistics_of(select, self.catalogue)
        rows = (
            joined(block, statistics) if block else statistics.estimate(self._of_source(select, exp.Literal.number(1)))
        )
        node = self._source(select, block, statistics, rows)
        aggregates = [to_sql(one) for one in aggregates_of(select, self.catalogue)]
        for call in self._calls(select):
            score = self._score(call, select, block, statistics, rows)
            tiles = name_of(call) in _TILES
            gathered = () if tiles else tuple(self._vectors(call))
            text = f"Score {_product_text(score)}{' in tiles' if tiles else ''}"
            if name_of(call) == BEST:
                text += f", the best {call.expressions[3].name} of each {call.expressions[4].name}"
            node = Node(text, score.rows, score, (node, *gathered))
        own = (*self._own_vectors(select), *self._nested(select))
        return self._top(select, Node(node.text, node.rows, node.score, (*node.children, *own), node.query), aggregates)

    def _top(self, select: exp.Select, node: Node, aggregates: list[str]) -> Node:
        group = select.args.get("group")
        if group is not None or aggregates:
            keys = "all keys" if group is not None and group.args.get("all") else ""
            keys = keys or ", ".join(readable(key) for key in (group.expressions if group else ()))
            node = Node(
                f"Group by {keys}" if group is not None else "Aggregate", UNKNOWN if group else ONE, children=(node,)
            )
        for key, name in (("having", "Having"), ("qualify", "Qualify")):
            if select.args.get(key):
                node = Node(short(f"{name} {readable(select.args[key].this)}"), children=(node,))
        if select.args.get("distinct"):
            node = Node("Distinct", children=(node,))
        order, limit = select.args.get("order"), select.args.get("limit")
        if order or limit:
            by = ", ".join(readable(one) for one in order.expressions) if order else ""
            count = f"{readable(limit.expression)} rows" if limit and limit.expression else ""
            text = " ".join(
                part
                for part in (
                    "Top" if order and limit else "Order" if order else "Limit",
                    count,
                    f"by {by}" if by else "",
                )
                if part
            )
            node = Node(short(text), children=(node,))
        return node

    def _source(self, select: exp.Select, block: Block | None, statistics: Statistics, rows: Count) -> Node:
        items = [part.this for part in (select.args.get("from_"), *(select.args.get("joins") or ())) if part]
        children = []
        for number, item in enumerate(items):
            relation = block.relations[number] if block else None
            children.append(self._item(item, select, relation, block, statistics, number))
        where = select.args.get("where")
        if len(children) == 1:
            return children[0]
        if not children:
            return Node("One row", ONE)
        if block is None:
            joins = " ".join(to_sql(join) for join in select.args.get("joins") or ())
            text = f"Join: {joins}" + (f" where {readable(where.this)}" if where else "")
        else:
            ties = " AND ".join(readable(one.sql) for one in block.conjuncts if len(one.reads) > 1)
            text = f"Join on {ties}" if ties else "Cross product"
        return Node(short(text), rows, children=tuple(children), query=self._counting(select))

    def _item(
        self,
        item: exp.Expr,
        select: exp.Select,
        relation: Relation | Gather | None,
        block: Block | None,
        statistics: Statistics,
        number: int,
    ) -> Node:
        alias = alias_of(item, number)
        if isinstance(item, exp.Subquery) and alias in (PAIRS, HITS):
            return self.query(item)
        if isinstance(item, exp.Subquery) and alias == LISTS:
            return self._lists(item)
        alone = [one for one in block.conjuncts if one.reads == {alias}] if block else []
        rows = statistics.rows((relation,), tuple(alone)) if relation is not None else UNKNOWN
        where = " AND ".join(readable(one.sql) for one in alone)
        inner: exp.Expr | None = item if isinstance(item, exp.Subquery) else None
        if isinstance(item, exp.Table):
            cte = cte_of(item, select)
            inner = cte if cte is not None and is_of_gradients(cte.this) else None
        name = item.sql("duckdb") if isinstance(item, exp.Table) else alias
        text = short(f"Scan {name}" + (f" where {where}" if where else ""))
        if inner is None:
            condition = " AND ".join(f"({to_sql(one.sql)})" for one in alone)
            query = f"{visible_ctes(select)}SELECT count(*) FROM {to_sql(item)}" + (
                f" WHERE {condition}" if where else ""
            )
            return Node(text, rows, query=query)
        vectors = tuple(self._own_vectors(inner.this)) if isinstance(inner.this, exp.Select) else ()
        if vectors:
            return Node(f"{text[5:]}: by group", rows, children=vectors)
        return Node(text, rows, children=(self.query(inner.this),))

    def _nested(self, select: exp.Select) -> Iterator[Node]:
        """Sub-queries in expressions, other than the operands of products."""
        for query in select.find_all(exp.Subquery):
            around = [one for one in ancestors(query.parent) if one is select or one.parent is select]
            within = [one for one in ancestors(query.parent) if one is not select]
            if query.find_ancestor(exp.Query) is not select or not is_of_gradients(query):
                continue
            operand = any(SCANNED in one.meta or name_of(one) in _PRODUCTS | _TILES for one in within)
            if not operand and around[0].arg_key not in ("from_", "joins", "with_"):
                each = " for each row" if self._aliases(query, select) else ""
                yield Node(f"Sub-query{each}", children=(self.query(query),))

    def _lists(self, item: exp.Subquery) -> Node:
        side = item.this.args["from_"].this.this
        block, statistics = self._block(side), statistics_of(side, self.catalogue)
        rows = joined(block, statistics) if block else UNKNOWN
        return Node(f"Lists of {LIST} gradients", rows, children=(self._source(side, block, statistics, rows),))

    def _vectors(self, call: exp.Anonymous) -> Iterator[Node]:
        """What an operand that is a sub-query gathers."""
        for argument in call.expressions[:2]:
            query = bare(argument)
            if isinstance(query, exp.Subquery) and isinstance(query.this, exp.Select):
                vectors = list(self._own_vectors(query.this))
                yield from vectors or [self.query(query)]

    def _own_vectors(self, select: exp.Select) -> Iterator[Node]:
        """Averages and sums of gradients that a SELECT computes."""
        if select is None or not isinstance(select, exp.Select):
            return
        for node in select.find_all(exp.Anonymous):
            if (
                name_of(node) in NAMES
                and node.find_ancestor(exp.Query) is select
                and not isinstance(node.parent, exp.PropertyEQ)
            ):
                yield self._gather(node, select)

    def _gather(self, call: exp.Anonymous, select: exp.Select) -> Node:
        block, statistics = self._block(select), statistics_of(select, self.catalogue)
        rows = joined(block, statistics) if block else UNKNOWN
        group = select.args.get("group")
        by = f" by {', '.join(to_sql(key) for key in group.expressions)}" if group else ""
        source = self._source(select, block, statistics, rows)
        return Node(short(f"Gather {vector_text(call)}{by}"), ONE if not group else UNKNOWN, children=(source,))

    def _calls(self, select: exp.Select) -> list[exp.Anonymous]:
        """The SELECT's own products and norms, equal ones once."""
        found: dict[str, exp.Anonymous] = {}
        for node in select.find_all(exp.Anonymous):
            if SCANNED in node.meta and node.find_ancestor(exp.Query) is select:
                call = node.meta[SCANNED]
                call.parent = node.parent
                found.setdefault(to_sql(call), call)
            if name_of(node) in _PRODUCTS | _TILES | {"norm"} and node.find_ancestor(exp.Query) is select:
                found.setdefault(to_sql(node), node)
        return list(found.values())

    def _score(
        self, call: exp.Anonymous, select: exp.Select, block: Block | None, statistics: Statistics, rows: Count
    ) -> Score:
        if name_of(call) in _TILES:
            return self._tile(call, select, block, statistics)
        operands = [self._operand(one, select, block, statistics) for one in call.expressions[:2]]
        function = "inner_product" if name_of(call) == SCORE else name_of(call)
        scan = SCANNED in call.meta
        return Score(function, operands[0], operands[1] if len(operands) > 1 else None, rows, scan=scan)

    def _tile(self, call: exp.Anonymous, select: exp.Select, block: Block | None, statistics: Statistics) -> Score:
        """Rows with members of lists: for each row all members, or those with the same keys."""
        measure, rows, lists = call.expressions[:3]
        left = self._operand(rows, select, block, statistics)
        side = _members(select)
        inner = self._block(side)
        count = joined(inner, statistics_of(side, self.catalogue)) if inner else UNKNOWN
        vector = next(item.this for item in side.expressions if item.alias == lists.name)
        keyed = any(item.alias.startswith("metaql_key") for item in side.expressions)
        right = Operand(vector_text(vector), count, ONE)
        return Score(measure.name, left, right, UNKNOWN if keyed else left.rows * count, tiles=True)

    def _operand(self, argument: exp.Expr, select: exp.Select, block: Block | None, statistics: Statistics) -> Operand:
        patterns: list[str] = []
        node = bare(argument)
        while isinstance(node, exp.Anonymous) and name_of(node) == "layers":
            pattern = node.expressions[1]
            patterns += [pattern.name] if isinstance(pattern, exp.Literal) else []
            node = bare(node.expressions[0])
        laid_out = _is_preconditioned(node)
        if isinstance(node, exp.Anonymous) and name_of(node) == PRECONDITION:
            node = bare(node.expressions[0])
        text = vector_text(argument)
        if isinstance(node, exp.Subquery):
            gathered = UNKNOWN if laid_out else self._gathered(node)
            return Operand(text, ONE, gathered, (*patterns, *_gathered_patterns(node)))
        aliases = self._aliases(node, select)
        relations = [one for one in (block.relations if block else ()) if one.alias in aliases]
        rows = UNKNOWN if block is None else ONE
        for relation in relations:
            alone = tuple(one for one in block.conjuncts if one.reads == {relation.alias}) if block else ()
            rows = rows * statistics.rows((relation,), alone)
        grouped = any(
            isinstance(one, Relation) and isinstance(one.item, exp.Subquery) and gathers(one.item) for one in relations
        )
        summed = laid_out or grouped or name_of(node) in NAMES
        return Operand(text, rows, UNKNOWN if summed else ONE, tuple(patterns))

    def _block(self, select: exp.Expr) -> Block | None:
        if not isinstance(select, exp.Select):
            return None
        plain = _same_rows(select, exp.Literal.number(1))
        with_ = select.args.get("with_")
        plain.set("with_", with_.copy() if with_ is not None else None)
        plain.parent = select.parent
        try:
            return bind(plain, self.catalogue)[1]
        except Unsure:
            return None

    def _gathered(self, query: exp.Subquery) -> Count:
        """How many samples a sub-query adds up; 1 where it yields a sample's own gradient."""
        select = query.this
        block = self._block(select)
        return joined(block, statistics_of(select, self.catalogue)) if block else UNKNOWN

    def _aliases(self, node: exp.Expr, select: exp.Select) -> frozenset[str]:
        try:
            return Scope(select, self.catalogue).reads(node)
        except Unsure:
            return frozenset()

    def _counting(self, select: exp.Select) -> str:
        return self._of_source(select, exp.Count(this=exp.Star(), big_int=True))

    def _of_source(self, select: exp.Select, chosen: exp.Expr) -> str:
        return visible_ctes(select) + to_sql(_same_rows(select, chosen))


def _is_preconditioned(node: exp.Expr) -> bool:
    """Whether a gradient, or that of a sub-query, has no factors any more."""
    return any(name_of(one) == PRECONDITION for one in node.find_all(exp.Anonymous))


def _gathered_patterns(query: exp.Subquery) -> Iterator[str]:
    """The restriction of all that a sub-query adds up, if there is one for all."""
    sums = [node for node in query.find_all(exp.Anonymous) if name_of(node) in NAMES]
    layers = [node for node in query.find_all(exp.Anonymous) if name_of(node) == "layers"]
    if len(sums) == 1 == len(layers) and isinstance(layers[0].expressions[1], exp.Literal):
        yield layers[0].expressions[1].name


def _same_rows(select: exp.Select, chosen: exp.Expr) -> exp.Select:
    """A SELECT over the same relations and conditions."""
    plain = exp.Select(expressions=[chosen])
    for key in ("from_", "joins", "where"):
        value = select.args.get(key)
        copied = [one.copy() for one in value] if isinstance(value, list) else value
        plain.set(key, copied.copy() if isinstance(copied, exp.Expr) else copied)
    return plain


def _members(select: exp.Select) -> exp.Select:
    """The rows that lists are made of."""
    lists = next(item for item in select.find_all(exp.Subquery) if item.alias == LISTS)
    side = lists.this.args["from_"].this.this
    assert isinstance(side, exp.Select)
    return side


def is_of_gradients(query: exp.Expr) -> bool:
    """Whether gradients are multiplied, measured or added up in it."""
    return any(name_of(node) in _PRODUCTS | {"norm"} | set(NAMES) for node in query.find_all(exp.Anonymous))


def _product_text(score: Score) -> str:
    if score.right is None:
        return f"‖{score.left.text}‖"
    sign = "cos" if score.function == "cosine_similarity" else ""
    return f"{sign}⟨{score.left.text}, {score.right.text}⟩"
