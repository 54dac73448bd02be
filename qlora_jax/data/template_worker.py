"""The program of the process that renders chat templates: jinja2 in a sandbox, under kernel limits.

Run as a file, not imported: it needs only jinja2 and starts in a tenth of a second. A line of JSON
in, a line of JSON out, until its input ends:

    {"template": ..., "calls": [variables, ...]}  ->  {"texts": [...], "spans": [[[0, 5]], ...]}
                                                  ->  {"error": kind, "message": ...}

The sandbox keeps a template from running code; CPU time and memory are the kernel's to limit, since
a template can spend both inside one C call, where no Python check runs.
"""

import datetime
import json
import os
import resource
import signal
import sys
from typing import Any

import jinja2
from jinja2 import ext, nodes, sandbox
from jinja2.utils import Namespace

MAX_OUTPUT = 1 << 20  # characters
MAX_MEMORY = 256 << 20  # bytes above what the program itself takes
MAX_SECONDS = 2.0  # of CPU time, for one line of input


class TooLong(Exception):
    """The output is larger than MAX_OUTPUT."""


class Generation(ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks what the assistant writes.

    Attributes:
      written: characters rendered so far.
      spans: [start, end) of every marked piece.
    """

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way to say it)

    def __init__(self, environment: jinja2.Environment):
        super().__init__(environment)
        self.restart()

    def restart(self) -> None:
        self.written, self.spans = 0, []

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

    def mark(self, caller: Any) -> str:
        text = caller()
        self.spans.append([self.written, self.written + len(text)])
        return text


class Environment(sandbox.ImmutableSandboxedEnvironment):
    """The sandbox; what it forbids is an error at once, not an empty string."""

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        raise sandbox.SecurityError(f"{attribute} of a {type(obj).__name__} is not for templates")


class PlainNamespace(Namespace):
    """A namespace without private names."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise sandbox.SecurityError(f"the private name {name} is not for templates")
        super().__setitem__(name, value)


def make_namespace(*args: Any, **kwargs: Any) -> PlainNamespace:
    """`namespace()` of templates."""
    namespace = PlainNamespace()
    for name, value in dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


def make_dict(*args: Any, **kwargs: Any) -> dict:
    """`dict()` of templates: a function, so that the type is not within reach."""
    return dict(*args, **kwargs)


def raise_exception(message: str) -> None:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def strftime_now(format: str) -> str:
    """The local time, for templates that state the date."""
    return datetime.datetime.now().strftime(format)


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """JSON without jinja2's escaping of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def make_environment() -> Environment:
    """The environment that transformers gives to chat templates, and nothing else."""
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, ext.loopcontrols]
    )
    del environment.globals["lipsum"]
    environment.globals.update(
        raise_exception=raise_exception,
        strftime_now=strftime_now,
        namespace=make_namespace,
        dict=make_dict,
    )
    environment.filters["tojson"] = tojson
    return environment


def render(template: jinja2.Template, variables: dict) -> tuple[str, list]:
    """The text and the marked spans of one call."""
    generation = template.environment.extensions[Generation.identifier]
    generation.restart()
    pieces = []
    for piece in template.generate(**variables):
        pieces.append(piece)
        generation.written += len(piece)
        if generation.written > MAX_OUTPUT:
            raise TooLong(f"more than {MAX_OUTPUT} characters")
    return "".join(pieces), generation.spans


def answer(template: jinja2.Template, calls: list[dict]) -> dict:
    """All calls of a request."""
    rendered = [render(template, variables) for variables in calls]
    return {"texts": [text for text, _ in rendered], "spans": [spans for _, spans in rendered]}


def answer_or_error(environment: Environment, request: dict, known: dict) -> dict:
    """The reply to a request; `known` keeps the last compiled template."""
    source = request["template"]
    try:
        if source not in known:
            known.clear()
            known[source] = environment.from_string(source)
        return answer(known[source], request["calls"])
    except Exception as error:
        kind = next((name for name, classes in KINDS if isinstance(error, classes)), "failed")
        return {"error": kind, "message": (str(error) or type(error).__name__)[:500]}


KINDS = (
    ("syntax", jinja2.TemplateSyntaxError),
    ("security", sandbox.SecurityError),
    ("undefined", jinja2.UndefinedError),
    ("raised", jinja2.TemplateError),
    ("output", TooLong),
    ("memory", MemoryError),
)


def limit_memory() -> None:
    """Lets the process grow by MAX_MEMORY and no more."""
    try:
        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: no figure to add to, and its kernel ignores the limit
        return
    resource.setrlimit(resource.RLIMIT_AS, (used + MAX_MEMORY,) * 2)


def main() -> None:
    """Answers lines until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to answer
    environment, known = make_environment(), {}
    limit_memory()
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)  # SIGPROF ends the process
        reply = json.dumps(answer_or_error(environment, json.loads(line), known))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.write(reply + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
