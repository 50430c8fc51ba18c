"""Extension of Griffe: Sphinx's roles in docstrings, such as ``:class:`~package.Class```, become links or code."""

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:attr|class|data|func|meth|mod):`(~?)([\w.]+)`")


def to_markdown(docstring: str) -> str:
    """Links to what has a place in the API reference, else code."""

    def link(match: re.Match[str]) -> str:
        short, path = match.groups()
        code = f"<code>{path.rpartition('.')[2] if short else path}</code>"
        return f'<autoref optional identifier="{path}">{code}</autoref>' if "." in path else code

    return ROLE.sub(link, docstring)


class Roles(griffe.Extension):
    """Rewrites each docstring as it is read."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of a module, class, function or attribute."""
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)
