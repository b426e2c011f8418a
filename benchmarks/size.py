"""How much code there is: `python benchmarks/size.py [--functions]`.

A line of code holds a token that is neither a comment nor a docstring; imports count, blank lines do not. `--functions`
lists what tests/test_size.py refuses: functions that are too long or take too much, without a reason beside them.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]
BUDGET = {"core": 9_000, "tools": 3_000}
LINES, PARAMETERS = 60, 8
REASON = "# Long: ", "# Many parameters: "
"""What a comment above the function begins with, when there is a reason."""
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
_NOTHING = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}


def code_lines(source: str) -> set[int]:
    """Numbers of the lines that hold code."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        for text in getattr(node, "body", None) or [] if not isinstance(node, ast.Lambda | ast.IfExp) else []:
            # Texts that document a constant stand behind it.
            if (
                isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
                and isinstance(text.value.value, str)
            ):
                docstrings |= set(range(text.lineno, text.end_lineno + 1))
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in _NOTHING:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return lines - docstrings


def sizes(package: Path) -> Counter[str]:
    """Lines of code by part of a package: a folder, or all modules beside them (`.`)."""
    counted: Counter[str] = Counter()
    for path in sorted(package.rglob("*.py")):
        inside = path.relative_to(package)
        counted[inside.parts[0] if len(inside.parts) > 1 else "."] += len(code_lines(path.read_text(encoding="utf-8")))
    return counted


def excessive(path: Path) -> list[str]:
    """Functions of a file that are over the limits of lines below the docstring or parameters, without a reason."""
    source, found = path.read_text(encoding="utf-8"), []
    written = source.split("\n")
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, _FUNCTIONS):
            continue
        begin = node.body[0].end_lineno if ast.get_docstring(node) else node.body[0].lineno - 1
        length = node.end_lineno - begin
        given = node.args
        parameters = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
        parameters = [parameter for parameter in parameters if parameter.arg not in ("self", "cls")]
        first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
        above = []
        while written[first - 2 - len(above)].strip().startswith("#"):
            above.append(written[first - 2 - len(above)].strip())
        for much, limit, reason, what in (
            (length, LINES, REASON[0], "lines"),
            (len(parameters), PARAMETERS, REASON[1], "parameters"),
        ):
            if much > limit and not any(line.startswith(reason) for line in above):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {much} {what}, {limit} at most")
    return found


def main(arguments: list[str]) -> None:
    """Prints the sizes, or the functions."""
    package = ROOT / "nqf"
    if arguments == ["--functions"]:
        print(*(line for path in sorted(package.rglob("*.py")) for line in excessive(path)), sep="\n")
        return
    counted = sizes(package)
    for part, lines in sorted(counted.items(), key=lambda item: (item[0] == "tools", item[0])):
        print(f"{part:<12}{lines:>7,}")
    other = [path for path in package.rglob("*") if path.suffix in (".css", ".js", ".html", ".j2", ".jinja")]
    written = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in other)
    print(f"\n{'core':<12}{counted.total() - counted['tools']:>7,}  of {BUDGET['core']:,}")
    print(f"{'tools':<12}{counted['tools']:>7,}  of {BUDGET['tools']:,}")
    print(f"{'beside':<12}{written:>7,}  lines of templates, styles and scripts")


if __name__ == "__main__":
    main(sys.argv[1:])
