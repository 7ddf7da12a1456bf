"""Reading a config: YAML, `key=value` overrides, and errors that name the nearest right key."""

import difflib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_type_hints

from dist_vse.common.errors import UserError, first_line
from dist_vse.common.reading import BadFileError, read_text
from dist_vse.config.named import find_config
from dist_vse.config.schema import TrainConfig

T = TypeVar("T")
MAX_BYTES = 1 << 20  # of a config
_RESOLVER = re.compile(r"\$\{.*:", re.DOTALL)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a YAML file, apply `key=value` overrides such as `loss.name=convse++`, check it all.

    A name such as `demo` means a config of the package, unless there is a file of that name.
    Without a file (None) it is the defaults that are overridden.
    Raises UserError for a missing file, an unknown key (naming the nearest), or a wrong value.
    """
    return load_yaml(path, TrainConfig, overrides)


def load_yaml(path: str | Path | None, schema: type[T], overrides: Sequence[str] = ()) -> T:
    """Read a YAML file into a frozen dataclass; see `load_config`."""
    from omegaconf import OmegaConf  # here, so that `--help` stays fast
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = find_config(path) if path is not None else None
    for override in overrides:
        if "=" not in override:
            hint = "write key=value, such as loss.name=convse++"
            raise UserError(f"{override!r} is no override; {hint}")
    source = path or "the settings given"
    try:
        text = read_text(path, max_bytes=MAX_BYTES) if path is not None else "{}"
        given = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)))
        _refuse_resolvers(given)
        _check_keys(given, schema, schema)
        dotlist = OmegaConf.from_dotlist(list(overrides))
        for name, _, value in (override.partition("=") for override in overrides):
            read = OmegaConf.select(dotlist, name)
            if _is_text(schema, name) and not isinstance(read, str | None):
                OmegaConf.update(dotlist, name, value)  # such as output_dir=2024_11_28
        _check_keys(OmegaConf.to_container(dotlist), schema, schema)
        parts = [_expand_user(part) for part in (given, OmegaConf.to_container(dotlist))]
        merged = OmegaConf.merge(OmegaConf.structured(schema), *parts)
        config = cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        raise UserError(f"{source}: {key}: {reason}" if key else f"{source}: {reason}") from error
    except YAMLError as error:
        raise UserError(f"{source}: no YAML: {' '.join(str(error).split())}") from error
    except (BadFileError, RecursionError, MemoryError) as error:
        raise UserError(f"{source}: can't be read ({first_line(error)})") from error
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    return config


def from_mapping(content: object, schema: type[T]) -> T:
    """Turn settings out of JSON, each key of them, into a frozen dataclass.

    Raises UserError for an unknown key or a value of another type; nothing in it is computed.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        if _holds_text(content, "${"):
            raise UserError("holds ${...}, which is for YAML")
        _check_keys(content, schema, schema)
        return cast(T, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), content)))
    except (OmegaConfBaseException, RecursionError, TypeError) as error:
        key = getattr(error, "full_key", None)
        raise UserError(f"{key}: {first_line(error)}" if key else first_line(error)) from error


def _holds_text(content: object, part: str) -> bool:
    if isinstance(content, dict):
        content = [*content.keys(), *content.values()]
    if isinstance(content, list):
        return any(_holds_text(value, part) for value in content)
    return isinstance(content, str) and part in content


def dump_config(config: TrainConfig) -> str:
    """Return the whole config as YAML; `load_config` reads it back to an equal one."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flat_config(config: TrainConfig) -> dict[str, object]:
    """Return all settings by their full keys, such as `loss.name`."""
    from omegaconf import OmegaConf

    return flat(OmegaConf.to_container(OmegaConf.structured(config)))


def flat(node: object, prefix: str = "") -> dict[str, object]:
    """Return the values of nested dicts by their keys, joined by points."""
    if not isinstance(node, dict):
        return {prefix: node}
    items = [flat(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in node.items()]
    return {key: value for item in items for key, value in item.items()}


def _is_text(schema: type, key: str) -> bool:
    """Return whether the setting of a full key is a text."""
    hint: Any = schema
    for name in key.split("."):
        hint = get_type_hints(hint).get(name) if is_dataclass(hint) else None
    return hint is str or set(get_args(hint)) == {str, type(None)}


def _expand_user(value: Any) -> Any:
    """Return settings with `~/` for the user's folder: no shell has read them."""
    if isinstance(value, dict):
        return {key: _expand_user(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_expand_user(v) for v in value]
    return os.path.expanduser(value) if isinstance(value, str) else value


def _refuse_resolvers(given: Any) -> None:
    """Raise UserError for a value of a file that OmegaConf would compute, as `${oc.env:NAME}`.

    It would put a variable of this shell into a config that somebody else wrote. `${loss.name}` is
    another setting, and stays.
    """
    if isinstance(given, dict):
        given = [*given.keys(), *given.values()]
    if isinstance(given, list):
        for value in given:
            _refuse_resolvers(value)
    elif isinstance(given, str) and _RESOLVER.search(given):
        raise UserError(f"{given[:80]!r}: a file may not read variables; write the value itself")


def _check_keys(given: Any, schema: type, root: type, prefix: str = "") -> None:
    """Raise UserError at the first key that `schema`, a part of `root`, lacks."""
    if not isinstance(given, dict):
        raise UserError(f"{prefix.rstrip('.') or 'the file'} must hold keys and values")
    hints = get_type_hints(schema)
    names = [f.name for f in fields(schema)]
    for key, value in given.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            everywhere = [full for full in _all_keys(root) if full.split(".")[-1] == key]
            best = [prefix + n for n in near] or everywhere
            hint = f"did you mean {best[0]!r}?" if best else f"keys here: {', '.join(names)}"
            raise UserError(f"unknown key {prefix + str(key)!r}; {hint}")
        if _is_text(schema, key) and not isinstance(value, str | None):
            raise UserError(
                f"{prefix}{key}: YAML reads {value!r} here, not a text; put it in quotes"
            )
        if is_dataclass(hints[key]):
            _check_keys(value, hints[key], root, f"{prefix}{key}.")
        for part in get_args(hints[key]):  # a list's items
            if isinstance(part, type) and is_dataclass(part) and isinstance(value, list):
                for item in value:
                    _check_keys(item, part, root, f"{prefix}{key}.")


def _all_keys(schema: type, prefix: str = "") -> list[str]:
    hints = get_type_hints(schema)
    keys = []
    for f in fields(schema):
        if is_dataclass(hints[f.name]):
            keys += _all_keys(hints[f.name], f"{prefix}{f.name}.")
        else:
            keys.append(prefix + f.name)
    return keys
