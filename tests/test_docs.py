"""The pages of the documentation: each message has its row, and the programs run."""

import ast
import itertools
import re
import string
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

import pyro_symeq

ROOT = Path(__file__).parent.parent
PACKAGE = Path(pyro_symeq.__file__).parent
HOLE = "…"  # stands on the page for what a message fills in


class Source:
    """A source file, with a reader of the messages that are written in it."""

    def __init__(self, file):
        self.name = str(file.relative_to(PACKAGE.parent))
        self.tree = ast.parse(file.read_text(encoding="utf-8"))
        functions = (n for n in ast.walk(self.tree) if isinstance(n, ast.FunctionDef))
        self.functions = {function.name: function for function in functions}

    def walk(self, node=None, scope=None):
        """All nodes, each with the function around it."""
        for child in ast.iter_child_nodes(node or self.tree):
            yield child, scope
            yield from self.walk(child, child if isinstance(child, ast.FunctionDef) else scope)

    def messages(self):
        """The texts of all errors and warnings with their lines, and with holes in them."""
        for node, scope in self.walk():
            if isinstance(node, ast.Call) and is_message(node):
                for text in self.texts(node.args[0], scope):
                    yield f"{self.name}:{node.lineno}", text

    def texts(self, node, scope):
        """What an expression can say; a hole for what is known when it is said."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                options = [self.texts(part, scope) for part in parts]
                return ["".join(choice) for choice in itertools.product(*options)]
            case ast.FormattedValue(value=value):
                return self.texts(value, scope)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                options = self.texts(left, scope), self.texts(right, scope)
                return ["".join(choice) for choice in itertools.product(*options)]
            case ast.IfExp(body=one, orelse=other):
                return self.texts(one, scope) + self.texts(other, scope)
            case ast.Name(id=name):
                value = assigned(scope, name) or assigned(self.tree, name) or CONSTANTS.get(name)
                return [HOLE] if value is None else self.texts(value, scope)
            case ast.Call(func=ast.Attribute(value=template, attr="format")):
                return [blanked(text) for text in self.texts(template, scope)]
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)):
                helper = self.functions.get(name)
                returned = [] if helper is None else returns(helper)
                return [t for value in returned for t in self.texts(value, helper)] or [HOLE]
        return [HOLE]


def assigned(scope, name):
    """What a function or a module assigns to a name."""
    nodes = ast.walk(scope) if isinstance(scope, ast.FunctionDef) else getattr(scope, "body", [])
    values = [n.value for n in nodes if isinstance(n, ast.Assign) and is_name(n.targets, name)]
    return values[-1] if values else None


def is_name(targets, name):
    return [target.id for target in targets if isinstance(target, ast.Name)] == [name]


def returns(function):
    return [n.value for n in ast.walk(function) if isinstance(n, ast.Return) and n.value]


def blanked(template):
    """A template of ``str.format`` with holes for its fields."""
    fields = string.Formatter().parse(template)
    return "".join(text + (HOLE if field is not None else "") for text, field, *_ in fields)


def is_message(call):
    """Whether an error is made, or a warning given, with a text."""
    name = ast.unparse(call.func)
    return bool(call.args) and (is_public_error(name) or name == "warnings.warn")


def is_public_error(name):
    return name[0].isupper() and name.endswith("Error")


SOURCES = [Source(file) for file in sorted(PACKAGE.rglob("*.py"))]
CONSTANTS = {
    target.id: node.value
    for source in SOURCES
    for node in source.tree.body
    if isinstance(node, ast.Assign)
    for target in node.targets
    if isinstance(target, ast.Name) and isinstance(node.value, (ast.Constant, ast.JoinedStr))
}
MESSAGES = {text: line for source in SOURCES for line, text in source.messages()}
ROWS = [
    row.replace(r"\|", "|")
    for row in re.findall(
        r"^\| `(.+?)` \|",
        (ROOT / "docs/errors.md").read_text(encoding="utf-8"),
        flags=re.MULTILINE,
    )
]


def test_messages_can_be_read():
    assert len(MESSAGES) > 40
    unread = [line for text, line in MESSAGES.items() if len(text.split(HOLE)[0]) < 4]
    assert not unread, "these messages begin with what only a run can tell"


def test_what_is_raised_is_a_message():
    """No error leaves the package whose text is hidden from this test."""
    helpers = {
        name
        for source in SOURCES
        for name, function in source.functions.items()
        for value in returns(function)
        if isinstance(value, ast.Call) and is_message(value)
    }
    for source in SOURCES:
        for node, _ in source.walk():
            if isinstance(node, ast.Raise) and node.exc is not None:
                assert isinstance(node.exc, ast.Call), f"{source.name}:{node.lineno}"
                name = ast.unparse(node.exc.func).split(".")[-1]
                is_known = is_message(node.exc) or name in helpers
                is_caught = name in ("_Misfit", "CannotRecord")
                assert is_known or is_caught, f"{source.name}:{node.lineno}"


def test_each_message_has_its_row():
    found = {text: [row for row in ROWS if text.startswith(row)] for text in MESSAGES}
    wrong = {f"{MESSAGES[text]}: {text}": rows for text, rows in found.items() if len(rows) != 1}
    assert not wrong, "docs/errors.md needs one row for each of these"


def test_each_row_has_its_message():
    assert len(ROWS) == len(set(ROWS))
    stale = [row for row in ROWS if not any(text.startswith(row) for text in MESSAGES)]
    assert not stale, "docs/errors.md tells of messages that are not in the code"


PAGES = [
    "apart.md",
    "coming_from_svi.md",
    "semi_supervised.md",
    "collapse.md",
    "cost.md",
    "failures.md",
    "games.md",
    "implicit_priors.md",
    "ladders.md",
    "lightning.md",
    "metrics.md",
    "sampling.md",
    "schedules.md",
]


@pytest.mark.parametrize("page", PAGES)
def test_the_programs_of_a_page_run(page, tmp_path):
    """The blocks of a page make up one program, which prints what the page says it does."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    blocks = defaultdict(str)
    for language, block in re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        blocks[language] += block + "\n\n"
    file = tmp_path / "program.py"
    file.write_text(blocks["python"], encoding="utf-8")
    warnings = [] if page == "lightning.md" else ["-W", "error"]  # Lightning has advice to give
    command = [sys.executable, *warnings, file]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert result.returncode == 0, result.stderr
    for line in blocks["text"].split("\n"):
        assert line in result.stdout
