"""The docstrings of installed packages, read from their source files with ``ast``; nothing is imported.

    docstring = summary + body        the summary, one sentence, is what a user would search; the body answers it

Files are visited in sorted order and each is read on its own, so the result does not depend on how many processes read.
"""

from __future__ import annotations

import ast
import inspect
import re
import sysconfig
import warnings
from pathlib import Path
from typing import NamedTuple

from tqdm.auto import tqdm

# Folders that hold tests, or copies of other packages (which might be held-out ones).
SKIPPED_FOLDERS = {
    "tests", "test", "testing", "_vendor", "vendor", "vendored", "_vendored", "externals", "extern", "_external",
    "third_party", "__pycache__",
}  # fmt: skip
# Ourselves, and what differs between two environments made from the same constraints.
SKIPPED_PACKAGES = {"ullme", "pip", "setuptools", "wheel", "pkg_resources", "_distutils_hack", "test", "tests"}


class Docstring(NamedTuple):
    package: str  # top-level name: "scipy"
    name: str  # "scipy.linalg._basic.solve"
    summary: str  # first sentence, plain text
    body: str  # the rest, plain text; "" where there is none


def site_packages() -> Path:
    """The folder where this environment's packages are installed."""
    return Path(sysconfig.get_paths()["purelib"])


def source_files(root: Path) -> list[tuple[str, Path]]:
    """(package, file) of every Python source under ``root``, sorted; tests, vendored copies and ullme left out."""
    files = []
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        package = parts[0].removesuffix(".py")
        skipped = package in SKIPPED_PACKAGES or "-" in package or SKIPPED_FOLDERS.intersection(parts[:-1])
        is_test = path.name.startswith("test_") or path.name.endswith("_test.py") or path.name == "conftest.py"
        if not skipped and not is_test:
            files.append((package, path))
    return files


def read_docstrings(root: Path, progress: bool = True) -> list[Docstring]:
    """Every docstring under ``root``, read on all cores."""
    from joblib import Parallel, delayed

    files = source_files(root)
    parallel = Parallel(n_jobs=-1 if len(files) > 500 else 1, batch_size=64, return_as="generator")
    rows = parallel(delayed(read_file)(path, package, root) for package, path in files)
    bar = tqdm(rows, total=len(files), desc="reading docstrings", unit="file", mininterval=1, disable=not progress)
    return [docstring for row in bar for docstring in row]


def read_file(path: Path, package: str, root: Path) -> list[Docstring]:
    """Docstrings of one source file in order of appearance; a file that does not parse has none.

    Strings handed to ``add_docstr`` and ``add_newdoc`` (how torch and numpy document their compiled functions) count.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, RecursionError):
        return []
    found: list[Docstring] = []

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}" if not isinstance(node, ast.Module) else name
            text = ast.get_docstring(node)
            if text:
                found.append(Docstring(package, name, *split(text)))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            texts = map(inspect.cleandoc, _added_docstrings(node.value))
            found.extend(Docstring(package, f"{name}:{node.lineno}", *split(text)) for text in texts)
        elif not isinstance(node, ast.If | ast.Try):
            return
        for child in getattr(node, "body", []):
            visit(child, name)

    visit(tree, ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"))
    return found


def _added_docstrings(call: ast.Call) -> list[str]:
    called = getattr(call.func, "id", getattr(call.func, "attr", "")).lstrip("_")
    if called not in {"add_docstr", "add_docstr_all", "add_newdoc"}:
        return []
    strings = []
    for node in call.args:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):  # "...".format(...)
            node = node.func.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" in node.value:
            strings.append(node.value)
    return strings


_DROPPED_SECTIONS = {"example", "examples", "usage", "references", "see also", "doctest", "tests"}
_FENCE = re.compile(r"^ *(```|~~~).*?^ *\1 *$", re.DOTALL | re.MULTILINE)
_UNDERLINE = re.compile(r"\s*[=\-~^]{3,}\s*$")
_DROPPED_COLON_SECTION = re.compile(r"\s*(?:examples?|usage|references)\s*:{1,2}\s*$", re.IGNORECASE)
_VERSION_NOTE = re.compile(r"\s*\.\. (?:versionadded|versionchanged|deprecated|currentmodule|autosummary)::")
_LINK = re.compile(r"(?::(?:\w+:)*\w+:)?`~?([^`<]*?)(?:\s*<[^`>]*>)?`_{0,2}")  # :func:`x`, `text <url>`_, `x`
_MARKUP = re.compile(r"\.\. [\w-]+::|\[`|`\]|`+|\*\*|~(?=[A-Za-z_])|</?[a-z]+>|%\(\w+\)s|!!! \w+")
_SIGNATURE = re.compile(r"[\w.]+\s*\(.*\)\s*(?:->.*)?$", re.DOTALL)
_SENTENCE_END = re.compile(r"(?<=[a-z)\]'\"])\.\s+(?=[A-Z])")


def plain(text: str) -> str:
    """One line of prose: examples, references, doctests, code fences and markup removed."""
    lines = _FENCE.sub("", text).splitlines()
    kept: list[str] = []
    dropping = False
    for line, following in zip(lines, [*lines, ""][1:], strict=True):
        if line.strip() and _UNDERLINE.match(following):
            dropping = line.strip().lower() in _DROPPED_SECTIONS
        elif _DROPPED_COLON_SECTION.match(line):
            dropping = True
        code = line.strip().startswith((">>>", "... "))
        if not (dropping or code or _UNDERLINE.match(line) or _VERSION_NOTE.match(line)):
            kept.append(line.strip())
    return " ".join(_MARKUP.sub("", _LINK.sub(r"\1", " ".join(kept).replace("``", "`"))).split())


def split(text: str) -> tuple[str, str]:
    """(first sentence, rest) of a docstring as plain text; a leading signature is left out; either may be empty."""
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
    if len(paragraphs) > 1 and _SIGNATURE.match(paragraphs[0].strip()):
        paragraphs = paragraphs[1:]
    if not paragraphs:
        return "", ""
    summary, *overflow = _SENTENCE_END.split(plain(paragraphs[0]), maxsplit=1)
    rest = plain("\n\n".join(paragraphs[1:]))
    return summary.rstrip(" .:"), " ".join([*overflow, rest]).strip()
