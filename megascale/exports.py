"""Names that a package offers, each imported when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from megascale.installation import complaint_about


def lazily(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of `package` (PEP 562), whose names are in `modules`.

    `modules` says which module has a name; one that ends in the name itself is that module. So a
    package costs nothing to import, and needs torch only where a name does. Where a package of an
    extra is missing, the ModuleNotFoundError says what installs it.
    """

    def __getattr__(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            module = import_module(modules[name])
        except ModuleNotFoundError as error:
            complaint = complaint_about(error, f"{package}.{name}")
            if complaint is None:
                raise
            raise ModuleNotFoundError(complaint, name=error.name) from None
        return module if modules[name] == f"{package}.{name}" else getattr(module, name)

    def __dir__() -> list[str]:
        return sorted({*vars(import_module(package)), *modules})

    return __getattr__, __dir__
