"""What the code of a stage means, as one hash: the part of a result's identity that comes from source files.

A stage depends on every file of this package that its module imports, directly or not, inside functions included,
and on no other. Comments, docstrings and formatting do not count, so that editing them repeats no training.
"""

import ast
import functools
import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent

# Derivable from the rest of the tree, or without meaning at run time.
_SILENT_FIELDS = frozenset({"ctx", "kind", "type_comment", "type_ignores"})

_CSRC_SUFFIXES = frozenset({".cpp", ".cu", ".cuh", ".h", ".hpp"})
_CSRC_TOKEN = re.compile(
    r"""(?P<comment>//(?:\\\n|[^\n])*|/\*.*?\*/)
      | (?P<splice>\\\n)
      | (?P<newline>\n)
      | (?P<blank>[ \t\r\f\v]+)
      | (?P<raw>(?:u8|[uUL])?R"(?P<mark>[^\s()\\]*)\(.*?\)(?P=mark)")
      | (?P<text>(?:u8|[uUL])?(?:"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'))
      | (?P<word>\.?[0-9](?:[eEpP][+-]|'[0-9A-Za-z]|[\w.])*|\w+)
      | (?P<sign><<<|>>>|<=>|<<=|>>=|->\*|\.\.\.|::|->|\+\+|--|<<|>>|<=|>=|==|!=|&&|\|\||\#\#|[-+*/%&|^]=|.)""",
    re.DOTALL | re.VERBOSE,
)


def fingerprint(module: str, root: Path = PACKAGE, csrc: bool = False) -> str:
    """Hash the meaning of a module and of everything in its package that it imports.

    Parameters
    ----------
    module : str
        Dotted name, for example ``swconv.training.loop``.
    root : Path
        Folder of the package; its name is the first part of `module`.
    csrc : bool
        Whether the C++ and CUDA sources beside the package count too, and ``setup.py``, which holds their flags.

    Returns
    -------
    str
        16 hexadecimal digits. Computed once per process.

    Raises
    ------
    ModuleNotFoundError
        `module`, or a module of the package that it imports, has no file.
    FileNotFoundError
        `csrc` is asked for and there are no sources.
    """
    digest = hashlib.sha256()
    for name, path in sorted(closure(module, root).items()):
        digest.update(f"{name}\n{_meaning(path)}\n".encode())
    if csrc:
        for path in csrc_files(root):
            digest.update(f"{path.relative_to(root.parent).as_posix()}\n{_meaning(path)}\n".encode())
    return digest.hexdigest()[:16]


@functools.cache
def closure(module: str, root: Path = PACKAGE) -> dict[str, Path]:
    """Files of the package that importing `module` can load, by module name.

    The packages on the way to a module belong to it, because importing it runs their ``__init__.py``.
    """
    if _file(module, root) is None:
        raise ModuleNotFoundError(f"fingerprint needs a module of {root}, got {module}, which has no file there")
    found: dict[str, Path] = {}
    pending = [module]
    while pending:
        name = pending.pop()
        if name in found:
            continue
        path = _file(name, root)
        if path is None:
            raise ModuleNotFoundError(f"{module} imports {name}, which has no file in {root}")
        found[name] = path
        if "." in name:
            pending.append(name.rpartition(".")[0])
        pending.extend(_imports(name, path, root))
    return found


def csrc_files(root: Path = PACKAGE) -> list[Path]:
    """The compiled sources beside the package, and the ``setup.py`` that compiles them."""
    sources = sorted(p for p in (root.parent / "csrc").rglob("*") if p.suffix in _CSRC_SUFFIXES)
    if not sources:
        raise FileNotFoundError(f"fingerprint with csrc=True needs C++ sources in {root.parent / 'csrc'}, found none")
    return [*sources, root.parent / "setup.py"]


def _file(name: str, root: Path) -> Path | None:
    """Where a module of the package lies, or None when it is not one."""
    package, *parts = name.split(".")
    if package != root.name:
        return None
    base = root.joinpath(*parts)
    candidates = (base / "__init__.py", base.with_suffix(".py")) if parts else (base / "__init__.py",)
    return next((path for path in candidates if path.is_file()), None)


def _imports(name: str, path: Path, root: Path) -> Iterator[str]:
    """Modules of the package that a file imports, at any depth of its code."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(_tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == root.name)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                above = package.rsplit(".", node.level - 1)[0] if node.level > 1 else package
                source = f"{above}.{source}" if source else above
            if source.split(".")[0] == root.name:
                yield source
                members = (f"{source}.{alias.name}" for alias in node.names)
                yield from (member for member in members if _file(member, root) is not None)


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


@functools.cache
def _meaning(path: Path) -> str:
    """A file's tokens without what means nothing, as text that is the same for every version of Python."""
    if path.suffix != ".py":
        return _csrc_meaning(path.read_text(encoding="utf-8"))
    parts: list[str] = []
    _write(_tree(path), parts.append)
    return " ".join(parts)


def _write(node: object, emit: Callable[[str], None]) -> None:
    """A syntax tree without positions, comments and bare strings."""
    if isinstance(node, ast.AST):
        emit(f"({type(node).__name__}")
        for field in node._fields:
            value = getattr(node, field, None)
            if value is None or value == [] or field in _SILENT_FIELDS:
                continue
            emit(field)
            _write(value, emit)
        emit(")")
    elif isinstance(node, list):
        emit("[")
        for item in node:
            if not _is_docstring(item):
                _write(item, emit)
        emit("]")
    else:
        emit(repr(node))


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _csrc_meaning(text: str) -> str:
    """C++ or CUDA tokens, one blank apart; only a preprocessor directive ends with its line."""
    tokens: list[str] = []
    at_line_start, in_directive = True, False
    for match in _CSRC_TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "newline":
            if in_directive:
                tokens.append("\n")
            at_line_start, in_directive = True, False
        elif kind not in ("comment", "splice", "blank"):
            in_directive = in_directive or (at_line_start and token == "#")
            at_line_start = False
            tokens.append(token)
    return " ".join(tokens)
