"""Command-line flags generated from settings dataclasses: name, type, range, default and help."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    from florence_fast.train.settings import Settings

ALIASES = {"weight_decay": "--wd", "num_workers": "--workers"}
"""open_clip's spelling of some fields."""


def flags_of(settings: "type[Settings]", without: tuple[str, ...] = ()) -> list[inspect.Parameter]:
    """Return a keyword parameter with its option for every field of ``settings`` that holds a single value.

    A flag is shown with the field's default, but is None when it is not given, so that a file of settings may say
    more. A field without default becomes a required flag.

    Args:
        settings: fields hold int, float, str or bool, or None.
        without: fields that are no flags.
    """
    descriptions = settings.descriptions()
    flags = []
    for field in dataclasses.fields(settings):
        kinds = [kind for kind in (get_args(field.type) or (field.type,)) if kind is not type(None)]
        if field.name in without or kinds[0] not in (int, float, str, bool):
            continue
        required = field.default is dataclasses.MISSING
        option = typer.Option(
            *_names(field.name, is_switch=kinds[0] is bool),
            help=_sentence(descriptions[field.name]),
            show_default=False if required or field.default is None or field.default is False else str(field.default),
            min=field.metadata.get("min"),
            max=field.metadata.get("max"),
        )
        flags.append(keyword(field.name, kinds[0] if required else kinds[0] | None, option, required))
    return flags


def keyword(name: str, kind: Any, option: Any, required: bool = False) -> inspect.Parameter:
    """Return a keyword parameter that typer reads as an option."""
    default = inspect.Parameter.empty if required else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])


def with_flags(function: Callable[..., None], flags: list[inspect.Parameter]) -> Callable[..., None]:
    """Return a function that takes the flags of ``function`` and more, and hands those to it as one dict, ``given``.

    Args:
        function: its parameter ``given`` receives the flags that were given, by name.
        flags: required ones first are not needed; all are keywords.
    """
    own = [p for p in inspect.signature(function).parameters.values() if p.name != "given"]
    added = {flag.name for flag in flags}

    def command(**values: Any) -> None:
        given = {name: value for name, value in values.items() if name in added and value is not None}
        function(**{name: value for name, value in values.items() if name not in added}, given=given)

    parameters = [*flags, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own)]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    command.__doc__ = function.__doc__
    return command


def fields_in(settings: "type[Settings]", given: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of ``given`` that are fields of ``settings``."""
    names = {field.name for field in dataclasses.fields(settings)}
    return {name: value for name, value in given.items() if name in names}


def _names(name: str, is_switch: bool) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    names = [f"{flag}/--no-{flag[2:]}" if is_switch else flag]
    return [*names, ALIASES[name]] if name in ALIASES else names


def _sentence(text: str) -> str:
    """Write a description of the docstring as help: without backticks, with a capital."""
    text = text.replace("`", "")
    return text[:1].upper() + text[1:]
