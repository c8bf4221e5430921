"""Which architectures run the same attention code under another name?

transformers copies whole attention classes from model to model. Two are the same code here if their sources
agree once docstrings, annotations and the names of models are taken away, so that a zoo of sixty copies cannot
pass for sixty.
"""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap


def fingerprint(cls: type) -> str:
    """A class's source (and its bases', of the same file) without model names, docstrings and annotations."""
    parts = [base for base in cls.__mro__ if base.__module__ == cls.__module__]
    return "\n".join(_plain(base) for base in parts)


def _plain(cls: type) -> str:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):
        return cls.__qualname__
    prefix = _prefix(cls)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            node.decorator_list = []
            node.name = node.name.replace(prefix, "")
            if ast.get_docstring(node) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Name):
            node.id = node.id.replace(prefix, "")
        if isinstance(node, ast.AnnAssign):
            node.annotation = ast.Name("None")
    return ast.dump(tree)


def _prefix(cls: type) -> str:
    """The model's part of class names: what the classes of its file share at their beginning."""
    module = sys.modules[cls.__module__]
    names = [n for n, v in vars(module).items() if isinstance(v, type) and v.__module__ == cls.__module__]
    shared = [n for n in names if n.endswith("PreTrainedModel")]
    return min(shared, key=len).removesuffix("PreTrainedModel") if shared else cls.__name__
