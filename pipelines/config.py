"""Recipes: frozen dataclasses, YAML for values, flags for overrides. The only file that knows pydantic and tyro."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

__all__ = [
    "BY_KIND",  # noqa: F822  made by __getattr__
    "RECIPES",
    "RecipeError",
    "Strict",
    "check_literals",
    "find_recipe",
    "flatten",
    "from_dict",
    "how",
    "in_order",
    "input_",
    "load_recipe",
    "packaged_recipes",
    "parse",
    "read_yaml",
    "to_dict",
    "to_yaml",
    "with_order",
]

T = TypeVar("T")
RECIPES = Path(__file__).parent / "recipes"


def __getattr__(name: str) -> Any:
    if name == "BY_KIND":  # Late: pydantic costs 0.1 s, and `vit --help` must not pay for it.
        from pydantic import Discriminator

        return Discriminator("kind")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class Strict:
    """Base of every recipe and config dataclass: an unknown key is an error."""

    __slots__ = ()
    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  pydantic reads a plain class attribute


def check_literals(values: object) -> None:
    """Raises ValueError for a field of type Literal that is none of its words.

    A dataclass that is made in Python has seen no pydantic: a misspelt word must not pass for another one.
    """
    kind: Any = type(values)
    for name, choices in _words_of(kind).items():
        if (value := getattr(values, name)) not in choices:
            raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")


@lru_cache
def _words_of(kind: Any) -> dict[str, tuple[object, ...]]:
    """The words that each field of type Literal, or Literal or None, may be."""
    found: dict[str, tuple[object, ...]] = {}
    for name, hint in typing.get_type_hints(kind).items():
        options = (hint, *typing.get_args(hint))  # The hint itself, or what stands in its union.
        words = [word for one in options if typing.get_origin(one) is typing.Literal for word in typing.get_args(one)]
        if words:
            found[name] = (*words, None) if type(None) in options else tuple(words)
    return found


class RecipeError(ValueError):
    """A recipe does not fit its dataclass; the message lists every problem."""


def how(**options: Any) -> Any:
    """A field that says how, not what: workers, prefetch, intervals, names. It is left out of the digest."""
    return dataclasses.field(metadata={"how": True}, **options)


def input_(**options: Any) -> Any:
    """A field that refers to another stage's output. The digest takes what it refers to, not its text."""
    return dataclasses.field(metadata={"input": True}, **options)


def in_order(*, first: tuple[str, ...] = (), **options: Any) -> Any:
    """A mapping whose order decides the result. The digest takes any order but the usual one: `first`, then by name."""
    return dataclasses.field(metadata={"in_order": first}, **options)


def with_order(value: Any, first: Sequence[str]) -> Any:
    """For a digest of JSON, which has no order of keys: what is not in its usual order becomes a list of pairs."""
    if not isinstance(value, Mapping):
        return value
    usual = sorted(value, key=lambda name: (first.index(name) if name in first else len(first), name))
    return value if list(value) == usual else [[name, own] for name, own in value.items()]


def packaged_recipes() -> list[str]:
    """Names of the recipes that ship with the package, such as "smoke/pretrain"."""
    return sorted(path.relative_to(RECIPES).with_suffix("").as_posix() for path in RECIPES.rglob("*.yaml"))


def find_recipe(name_or_path: str | Path) -> Path:
    """A path as it is, or the name of a packaged recipe."""
    path = Path(name_or_path)
    if path.is_file():
        return path
    packaged = RECIPES / f"{name_or_path}.yaml"
    if packaged.is_file():
        return packaged
    names = packaged_recipes()
    near = difflib.get_close_matches(str(name_or_path), names, n=3, cutoff=0.4)
    hint = f"; nearest: {', '.join(near)}" if near else ""
    raise RecipeError(
        f"recipe {str(name_or_path)!r} is neither a file nor a packaged recipe{hint}; `vit recipes` lists them all"
    )


def load_recipe(cls: type[T], name_or_path: str | Path, overrides: Mapping[str, Any] | None = None) -> T:
    """Read a recipe; `overrides` maps dotted field names to values and wins over the file."""
    path = find_recipe(name_or_path)
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of fields to values, got {type(values).__name__}")
    for dotted, value in (overrides or {}).items():
        *parents, leaf = dotted.split(".")
        node = values
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise RecipeError(f"{path}: override {dotted!r} reaches into {parent!r}, which is a plain value")
        node[leaf] = value
    return from_dict(cls, values, str(path))


def read_yaml(path: Path) -> Any:
    """What a YAML file says. RecipeError if it cannot be read, or names a key twice: one would silently win."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        twice = next(_keys_twice(yaml.compose(text, yaml.SafeLoader)), None)
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {error}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start:,}); is it a recipe?") from None
    except OSError as error:
        raise RecipeError(f"cannot read {path}: {error.strerror}") from None
    if twice is not None:
        raise RecipeError(f"{path}, line {twice.start_mark.line + 1}: key {twice.value!r} stands twice; keep one")
    return values


def _keys_twice(root: Any) -> Iterator[Any]:
    """The second node of each key that a mapping names twice."""
    import yaml

    waiting, known = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in known:  # An anchor may stand in itself.
            continue
        known.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            names: set[str] = set()
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    if key.value in names:
                        yield key
                    names.add(key.value)


def from_dict(cls: type[T], values: Mapping[str, Any], where: str = "recipe") -> T:
    """Check `values` against the dataclass; every problem at once, with the nearest right name."""
    from pydantic import ValidationError

    try:
        checked: T = _adapter(cls).validate_python(dict(values))  # type: ignore[arg-type]
        return checked
    except ValidationError as error:
        problems = [f"  {line}" for line in _problems(cls, error)]
        raise RecipeError("\n".join([f"{where}: {len(problems)} problem(s)", *problems])) from None


def parse(cls: type[T], argv: Sequence[str], prog: str = "vit") -> T:
    """`RECIPE [--dotted.flag value ...]`. Flags tune a recipe; they cannot change a `kind`. Exits 2 on a bad flag.

    A dataclass with `SUBJECT = "field"` also takes that field's value in place of a recipe: the rest at its default.
    """
    import tyro

    subject = getattr(cls, "SUBJECT", None)
    if not argv or argv[0].startswith("-"):
        word = f"RECIPE|{subject.upper()}" if subject else "RECIPE"
        if "--help" in argv or "-h" in argv:
            tyro.cli(cls, prog=f"{prog} {word}", args=["--help"], config=(tyro.conf.AvoidSubcommands,))
        what = f"a {subject}, or a recipe" if subject else "a recipe"
        raise RecipeError(f"{prog} needs {what}: a YAML path or the name of a packaged one; `vit recipes` lists them")
    name, *flags = argv
    flags = _nulls(cls, flags)
    default = from_dict(cls, {subject: name}, prog) if subject and not _is_recipe(name) else load_recipe(cls, name)
    if not flags:
        return default
    parsed = tyro.cli(cls, prog=f"{prog} {name}", args=flags, default=default, config=(tyro.conf.AvoidSubcommands,))
    # Through the checks again: tyro builds the object itself and knows no pydantic constraint.
    return from_dict(cls, to_dict(parsed), f"{name} {' '.join(flags)}")


def _is_recipe(word: str) -> bool:
    return word.endswith((".yaml", ".yml")) or (RECIPES / f"{word}.yaml").is_file()


def _nulls(cls: type, flags: Sequence[str]) -> list[str]:
    """`null`, as recipes write it, where tyro knows only `None`; a field that takes text alone keeps the word."""
    words = list(flags)
    for place, word in enumerate(words):
        flag, _, value = word.partition("=")
        if not (word.startswith("--") and value == "null"):
            if word != "null" or not place:
                continue
            flag = words[place - 1]
        *parents, field = flag.removeprefix("--").replace("-", "_").split(".")
        hints = [typing.get_type_hints(owner).get(field) for owner in _owners(cls, parents)]
        if any(type(None) in typing.get_args(hint) for hint in hints):
            words[place] = word.removesuffix("null") + "None"
    return words


def to_dict(recipe: Any) -> dict[str, Any]:
    """Plain JSON values of a recipe, nested as its dataclasses are."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Mapping):
            return {str(key): plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    result = plain(recipe)
    assert isinstance(result, dict)
    return result


def flatten(recipe: Any) -> dict[str, Any]:
    """Dotted names to plain values, for MLflow params and for comparing two recipes."""

    def walk(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, Mapping) and value:
            for key, item in value.items():
                yield from walk(f"{prefix}.{key}" if prefix else str(key), item)
        else:
            yield prefix, value

    return dict(walk("", recipe if isinstance(recipe, Mapping) else to_dict(recipe)))


def to_yaml(recipe: Any) -> str:
    import yaml

    return yaml.safe_dump(to_dict(recipe), sort_keys=False, allow_unicode=True)


@lru_cache(maxsize=64)
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


def _problems(cls: type, error: ValidationError) -> Iterator[str]:
    for problem in error.errors():
        parts = [str(part) for part in problem["loc"]]
        where = ".".join(parts)
        kind = problem["type"]
        if kind == "unexpected_keyword_argument":
            names = _field_names(cls, parts[:-1])
            near = difflib.get_close_matches(parts[-1], names, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            yield f"{where}: unknown key; {hint}"
        elif kind in {"missing", "missing_argument", "missing_keyword_only_argument"}:
            yield f"{where}: required, and not given"
        elif kind == "value_error":
            yield f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
        else:
            yield f"{where}: {problem['msg'][:1].lower()}{problem['msg'][1:]} (got {problem['input']!r})"


def _field_names(cls: type, parents: Sequence[str]) -> list[str]:
    """Field names of the dataclass that `parents` leads to."""
    return sorted({field.name for owner in _owners(cls, parents) for field in dataclasses.fields(owner)})


def _owners(cls: type, parents: Sequence[str]) -> list[Any]:
    """The dataclasses that `parents` leads to; a union member is picked by its tag or tried in turn."""
    owners: list[Any] = [cls]
    for parent in parents:
        following: list[Any] = []
        for owner in owners:
            if not dataclasses.is_dataclass(owner):
                continue
            hints = typing.get_type_hints(owner, include_extras=False)
            if parent in hints:
                following += _dataclasses_in(hints[parent])
            elif re.fullmatch(r"[a-z0-9_]+", parent):  # pydantic puts the tag of a union member into the location
                following.append(owner)
        owners = following or owners
    return [owner for owner in owners if dataclasses.is_dataclass(owner)]


def _dataclasses_in(hint: Any) -> list[Any]:
    if dataclasses.is_dataclass(hint):
        return [hint]
    return [found for argument in typing.get_args(hint) for found in _dataclasses_in(argument)]
