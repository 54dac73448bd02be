"""How many bytes a traced program holds at once, beside what it is given and what it returns.

XLA decides that when it compiles, in minutes for a large model. Here its main rules are followed on
the traced program, in a tenth of a second, whatever the sizes:

    fused         an elementwise operation, a slice, a concatenation writes no memory of its own
                  where its consumers compute it as they read; it is written where a product, a loop
                  or a kernel reads it, and where two consumers read what is expensive to compute
    freed         an array lives from its operation to the last one that reads it, through all that
                  is fused between
    in place      a result takes the memory of an operand of its size that nobody reads afterwards
    hoisted       what a loop computes from what does not change is computed before it, and lives
                  as long as the loop (XLA's while-loop-invariant-code-motion)

What XLA loses between arrays of different sizes is not counted. On 14 programs for a CPU its own
figure is at most 10% more, mostly 1% (tests/memory, docs/log.md).
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

Space = jax.memory.Space

FUSED = {
    *("abs", "add", "add_any", "and", "ceil", "clamp", "concatenate", "convert_element_type"),
    *("broadcast_in_dim", "copy", "dynamic_slice", "eq", "floor", "gather", "ge", "gt", "iota"),
    *("integer_pow", "is_finite", "le", "lt", "max", "min", "mul", "name", "ne", "neg", "not"),
    *("or", "pad", "reduce_precision", "rem", "rev", "round", "select_n", "shift_left", "sign"),
    *("shift_right_arithmetic", "shift_right_logical", "slice", "square", "sub", "transpose"),
    "xor",
}
EXPENSIVE = {
    *("cos", "div", "erf", "exp", "exp2", "expm1", "log", "log1p", "logistic", "pow", "rsqrt"),
    *("sin", "sqrt", "tanh"),
}
ELEMENTWISE = FUSED | EXPENSIVE
REDUCTIONS = {"reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_sum"}
READERS = ELEMENTWISE | REDUCTIONS | {"device_put"}  # compute fused operands as they read
RENAMED = {"reshape", "squeeze", "expand_dims", "optimization_barrier"}
UPDATES = {"dynamic_update_slice", "scatter", "scatter-add"}  # of the first operand, in place
GROWS = {"broadcast_in_dim", "iota", "pad"}  # larger than what it is made of: not hoisted
LOOPS = {"scan", "while", "cond"}
OPAQUE = {"pallas_call", "mosaic_gpu_call", *LOOPS}


@dataclasses.dataclass(eq=False, slots=True)
class Value:
    """One array of the program.

    Attributes:
      nbytes: how large it is.
      space: the memory that it is in.
      given: an argument or a constant, whose memory is not counted here.
    """

    nbytes: int
    space: Space
    given: bool = False

    def fits(self, other: "Value") -> bool:
        """Whether `other` can be where this one is."""
        return (self.nbytes, self.space) == (other.nbytes, other.space)


class Operation(NamedTuple):
    """One operation; literals are no operands."""

    name: str
    equation: Any
    scoped: bool
    operands: list[Value]
    results: list[Value]


class Peak(NamedTuple):
    """The most bytes at once.

    Attributes:
      nbytes: all of them.
      scoped: those of them that are made in the name scope that was asked for.
    """

    nbytes: int
    scoped: int


def peak_bytes(program: core.ClosedJaxpr, spaces: Iterable[Space], scope: str = "") -> Peak:
    """The most bytes that a program holds at once, beside its arguments and its results.

    Args:
      program: as `jax.make_jaxpr` gives it.
      spaces: one of a GPU's memories; both for a CPU, where they are one.
      scope: of `jax.named_scope`, whose part is told.
    """
    simulation = Simulation(program.jaxpr, frozenset(spaces), scope)
    return simulation.run(returned_counts=False)


def most(jaxpr: core.Jaxpr, spaces: frozenset[Space]) -> int:
    """`peak_bytes` of a loop's body, whose results count."""
    return Simulation(jaxpr, spaces).run(returned_counts=True).nbytes


def value(variable: Any, *, given: bool = False) -> Value:
    """The array that a variable of a jaxpr stands for; keys and tokens have no size."""
    aval = variable.aval
    itemsize = getattr(getattr(aval, "dtype", None), "itemsize", 0)
    nbytes = math.prod(getattr(aval, "shape", ())) * itemsize
    return Value(nbytes, getattr(aval, "memory_space", Space.Device), given)


def inlined(
    jaxpr: core.Jaxpr,
    arguments: Iterable[Value],
    operations: list[Operation],
    scope: str = "",
    within: bool = False,
) -> Iterator[Value | None]:
    """The results, behind the operations of a jaxpr and of all that it calls."""
    known = dict(zip((*jaxpr.constvars, *jaxpr.invars), arguments, strict=True))
    for equation in jaxpr.eqns:
        operands = [known.get(v) for v in equation.invars if not isinstance(v, core.Literal)]
        called = None if equation.primitive.name in OPAQUE else called_by(equation)
        scoped = within or bool(scope and scope in str(equation.source_info.name_stack))
        if called is None:
            results = [value(v) for v in equation.outvars]
            name = equation.primitive.name
            operations.append(Operation(name, equation, scoped, operands, results))
        else:
            places = [
                value(v, given=True) if isinstance(v, core.Literal) else known[v]
                for v in equation.invars[len(equation.invars) - len(called.invars) :]
            ]
            constants = [value(v, given=True) for v in called.constvars]
            results = inlined(called, [*constants, *places], operations, scope, scoped)
        known |= dict(zip(equation.outvars, results, strict=True))
    for variable in jaxpr.outvars:
        yield None if isinstance(variable, core.Literal) else known[variable]


def called_by(equation: Any) -> core.Jaxpr | None:
    """The jaxpr that an equation calls once, if it calls one."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr", "call"):
        called = equation.params.get(key)
        if called is not None and hasattr(getattr(called, "jaxpr", called), "eqns"):
            return getattr(called, "jaxpr", called)
    return None


class Step(NamedTuple):
    """An operation that writes, and the arrays in memory that it reads."""

    operation: Operation
    reads: frozenset[Value]


class Simulation:
    """A program as XLA would run it.

    Args:
      jaxpr: the program.
      spaces: the memories that are counted.
      scope: see `peak_bytes`.
    """

    def __init__(self, jaxpr: core.Jaxpr, spaces: frozenset[Space], scope: str = ""):
        self.arguments = [value(v, given=True) for v in (*jaxpr.constvars, *jaxpr.invars)]
        operations: list[Operation] = []
        results = list(inlined(jaxpr, self.arguments, operations, scope))
        self.spaces, self.count = spaces, len(jaxpr.invars)
        self.alias: dict[Value, Value] = {}
        self.renamed = RENAMED if len(spaces) == 1 else RENAMED | {"device_put"}
        for operation in operations:
            if operation.name in self.renamed:
                pairs = zip(operation.results, operation.operands, strict=False)
                self.alias |= {result: self.of(operand) for result, operand in pairs}
        self.returned = {self.of(result) for result in results if result is not None}
        self.operations = self.needed(operations)
        self.made_by = {r: op for op in self.operations for r in op.results}
        self.written = self.choose_written()
        self.sources: dict[Value, frozenset[Value]] = {}

    def of(self, value: Value) -> Value:
        """The array whose memory a value is in."""
        return self.alias.get(value, value)

    def needed(self, operations: list[Operation]) -> list[Operation]:
        """What a result depends on, operands by the array that they are in."""
        wanted, kept = set(self.returned), []
        for operation in reversed(operations):
            if operation.name not in self.renamed and wanted.intersection(operation.results):
                operands = [self.of(operand) for operand in operation.operands]
                wanted.update(operands)
                kept.append(operation._replace(operands=operands))
        return kept[::-1]

    def choose_written(self) -> set[Value]:
        """The arrays that are in memory."""
        written, consumers, dear = set(self.returned), {}, set()
        for operation in self.operations:
            for operand in operation.operands:
                consumers[operand] = consumers.get(operand, 0) + 1
            if operation.name in UPDATES:
                written.add(operation.operands[0])
            elif operation.name not in READERS:
                written.update(operation.operands)
        for operation in self.operations:
            if operation.name not in ELEMENTWISE:
                written.update(operation.results)
                continue
            (result,) = operation.results
            if operation.name in EXPENSIVE or dear.intersection(operation.operands):
                if consumers.get(result, 0) > 1:
                    written.add(result)
                if result not in written:
                    dear.add(result)
        return written

    def read(self, value: Value) -> frozenset[Value]:
        """The arrays in memory that a value is computed from where it is read."""
        if value.given or value in self.written:
            return frozenset() if value.given else frozenset((value,))
        if value not in self.sources:
            operands = self.made_by[value].operands
            self.sources[value] = frozenset().union(*map(self.read, operands))
        return self.sources[value]

    def hoisted(self, fixed: int) -> int:
        """Bytes of what XLA computes once before a loop; from now on it is given.

        Args:
          fixed: how many of the arguments, the first ones, are the same in each turn.
        """
        constants = len(self.arguments) - self.count
        still, total = set(self.arguments[: constants + fixed]), 0
        for operation in self.operations:
            if operation.name in OPAQUE or not still.issuperset(operation.operands):
                continue
            still.update(operation.results)
            for result in self.written.intersection(operation.results):
                result.given = operation.name not in GROWS
                total += result.nbytes * (result.given and result.space in self.spaces)
        return total

    def in_order(self) -> list[Step]:
        """What is written, as it is traced: XLA's order on a GPU, which saves memory, is near."""
        return [
            Step(operation, frozenset().union(*map(self.read, operation.operands)))
            for operation in self.operations
            if self.written.intersection(operation.results)
        ]

    def breadth_first(self) -> list[Step]:
        """What is written, each as soon as what it reads is there, in the order of readiness.

        So XLA orders a program for a CPU's threads (its BFScheduler): work that could run beside
        other work is all begun, and held, before any of it ends.
        """
        steps = self.in_order()
        home = {r: i for i, step in enumerate(steps) for r in step.operation.results}
        needs = [{home[v] for v in step.reads if v in home} for step in steps]
        feeds: list[list[int]] = [[] for _ in steps]
        for i, sources in enumerate(needs):
            for source in sources:
                feeds[source].append(i)
        ready = [i for i, sources in enumerate(needs) if not sources]
        for i in ready:  # grows as it is read
            for reader in feeds[i]:
                needs[reader].discard(i)
                if not needs[reader]:
                    ready.append(reader)
        return [steps[i] for i in ready]

    def run(self, returned_counts: bool) -> Peak:
        """The most bytes at once; `returned_counts`: the results' memory is among them."""
        steps = self.in_order() if len(self.spaces) == 1 else self.breadth_first()
        last = {v: time for time, step in enumerate(steps) for v in step.reads}
        last |= dict.fromkeys(self.returned, len(steps))
        live: dict[Value, bool] = {}  # and whether it is of the scope
        held, peak = 0, Peak(0, 0)
        for time, (operation, reads) in enumerate(steps):
            dying = [v for v in reads if last[v] == time and v in live]
            for result in operation.results:
                if not self.counts(result, returned_counts):
                    continue
                if operation.name in ELEMENTWISE | UPDATES | LOOPS:
                    place = next((v for v in dying if v.fits(result)), None)
                    if place is not None:
                        dying.remove(place)
                        held -= place.nbytes
                        del live[place]
                live[result] = operation.scoped
                held += result.nbytes
            within = inside(operation, self.spaces)
            if held + within > peak.nbytes:
                scoped = sum(v.nbytes for v, of_scope in live.items() if of_scope)
                peak = Peak(held + within, scoped + within * operation.scoped)
            for ended in [v for v in live if last.get(v, time) <= time]:
                held -= ended.nbytes
                del live[ended]
        return peak

    def carry_in_place(self) -> None:
        """Of a loop's body: what is written into an array that the turn before left is there."""
        for operation in self.operations:
            if operation.name in UPDATES and operation.operands[0].given:
                operation.results[0].given = True

    def counts(self, result: Value, returned_counts: bool) -> bool:
        """Whether a result takes memory that is counted."""
        taken = result in self.written and result.space in self.spaces and not result.given
        return taken and (returned_counts or result not in self.returned)


def inside(operation: Operation, spaces: frozenset[Space]) -> int:
    """The most bytes that a loop or a branch holds beside what it is given and returns."""
    params = operation.equation.params
    if operation.name == "scan":
        return of_body(params["jaxpr"].jaxpr, unchanging(operation.equation), spaces)
    if operation.name == "while":
        return of_body(params["body_jaxpr"].jaxpr, params["body_nconsts"], spaces)
    if operation.name == "cond":
        return max(most(branch.jaxpr, spaces) for branch in params["branches"])
    return 0


def unchanging(scan: Any) -> int:
    """How many of a scan's operands, the first ones, are the same in each turn.

    The carry follows them, and what is cut along its first axis follows the carry.
    """
    body = scan.params["jaxpr"].jaxpr
    carried = sum(
        a.aval.ndim == b.aval.ndim for a, b in zip(scan.outvars, body.outvars, strict=True)
    )
    cut = sum(a.aval.ndim != b.aval.ndim for a, b in zip(scan.invars, body.invars, strict=True))
    return len(scan.invars) - carried - cut


def of_body(jaxpr: core.Jaxpr, fixed: int, spaces: frozenset[Space]) -> int:
    """`most` of a loop's body, and what is hoisted from it: made of its first `fixed` operands."""
    simulation = Simulation(jaxpr, spaces)
    before = simulation.hoisted(fixed)
    simulation.carry_in_place()
    return simulation.run(returned_counts=True).nbytes + before
