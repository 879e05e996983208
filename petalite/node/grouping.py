"""Options that belong together, as one parameter of a command.

A command takes a frozen dataclass; typer is shown its fields as options, in a panel of the help that bears
the dataclass's docstring. So what several commands share is written once, and a command has as many
parameters as it has concerns.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Annotated, Any, get_type_hints

from typer.models import OptionInfo


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """The same command as typer is to see it: every parameter that is a dataclass replaced by its fields,
    whose annotations are `Annotated[type, typer.Option(...)]`."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        parameter.name: parameter.annotation
        for parameter in signature.parameters.values()
        if is_dataclass(parameter.annotation) and isinstance(parameter.annotation, type)
    }
    flat: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        flat += _options(groups[parameter.name]) if parameter.name in groups else [parameter]

    @functools.wraps(command)
    def flattened(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        command(**given)

    keyword = inspect.Parameter.KEYWORD_ONLY
    flattened.__signature__ = inspect.Signature([one.replace(kind=keyword) for one in flat])  # type: ignore[attr-defined]
    flattened.__annotations__ = {one.name: one.annotation for one in flat}
    return flattened


def _options(group: type[Any]) -> list[inspect.Parameter]:
    hints = get_type_hints(group, include_extras=True)
    panel = inspect.getdoc(group)
    parameters = []
    for field in fields(group):
        kind, info = hints[field.name].__origin__, copy(_option_of(hints[field.name]))
        info.rich_help_panel = panel
        parameters.append(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=Annotated[kind, info],
            )
        )
    return parameters


def _option_of(hint: Any) -> OptionInfo:
    return next(extra for extra in hint.__metadata__ if isinstance(extra, OptionInfo))
